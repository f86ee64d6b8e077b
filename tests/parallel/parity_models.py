"""Tiny checkpoints of every family and transformers' results for them: the reference for the parity grid."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parity_multi_token import (
    FACTOR,
    add_to_checkpoint,
    copies_of,
    further_loss,
    multi_token_layers,
    names_of,
)
from safetensors.torch import load_file
from torch import Tensor

SIZES = {
    "vocab_size": 101,  # prime, so it is padded under every TP
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,  # else transformers drops the gradient of the padding token's embedding
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.67,
    "short_factor": [1.0, 1.3],
    "long_factor": [2.0, 5.0],
    "original_max_position_embeddings": 16,  # some of the samples are longer
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.67}  # 4 of 6 dimensions
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
GLM4 = {
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "routed_scaling_factor": 1.5,
    "head_dim": 8,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0},
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "num_nextn_predict_layers": 0,
}
DEEPSEEK_EXPERTS = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 12,
    "routed_scaling_factor": 1.7,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3-rope-tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral-window": ("Mistral", {"sliding_window": 7, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 10, "tie_word_embeddings": False}),
    "qwen2-moe": (
        "Qwen2Moe",
        EXPERTS
        | {"shared_expert_intermediate_size": 20, "decoder_sparse_step": 2, "tie_word_embeddings": False},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 7, "tie_word_embeddings": False}),
    "olmoe": (
        "Olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": None, "eos_token_id": None},
    ),
    "glm4-moe": ("Glm4Moe", GLM4 | {"use_qk_norm": True, "tie_word_embeddings": False}),
    "glm4-moe-groups": (
        "Glm4Moe",
        GLM4
        | {
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "num_nextn_predict_layers": 0,
        },
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        EXPERTS
        | {"head_dim": 10, "norm_topk_prob": True, "mlp_only_layers": [1], "tie_word_embeddings": False},
    ),
    "llama-biases": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": DYNAMIC, "max_position_embeddings": 16},
    ),
    "qwen2-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "rope_parameters": YARN},
    ),
    "qwen3-yarn": ("Qwen3", {"head_dim": 10, "attention_bias": True, "rope_parameters": YARN}),
    "gemma": ("Gemma", {"head_dim": 10}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 10,
            "sliding_window": 7,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 1.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 10,
            "sliding_window": 7,
            "layer_types": MIXED_LAYERS,
            "query_pre_attn_scalar": 20,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 9}),
    "phi3-longrope": ("Phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 16}),
    "glm": ("Glm", {"head_dim": 12}),
    "glm4": ("Glm4", {"head_dim": 12}),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 7,
            "layer_types": MIXED_LAYERS,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": 7}),
    "starcoder2": ("Starcoder2", {"sliding_window": 9, "tie_word_embeddings": True}),
    "stablelm": ("StableLm", {"use_qkv_bias": True, "rope_parameters": PARTIAL}),
    "stablelm-parallel": ("StableLm", {"use_parallel_residual": True, "rope_parameters": PARTIAL}),
    "cohere": ("Cohere", {"use_qk_norm": True, "tie_word_embeddings": True, "logit_scale": 0.5}),
    "cohere2": ("Cohere2", {"sliding_window": 7, "layer_types": MIXED_LAYERS, "head_dim": 6}),
    "seed-oss": (
        "SeedOss",
        {"head_dim": 10, "attention_out_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0},
    ),
    "ernie4_5": ("Ernie4_5", {"head_dim": 10, "use_bias": True}),
    "arcee": ("Arcee", {}),
    "helium": ("Helium", {"head_dim": 6, "attention_bias": True, "mlp_bias": True}),
    "exaone4": ("Exaone4", {"sliding_window": 7, "layer_types": MIXED_LAYERS}),
    "nemotron": ("Nemotron", {"rope_parameters": PARTIAL}),
    "jais2": ("Jais2", {}),
    "ministral": ("Ministral", {"head_dim": 6, "sliding_window": 7, "layer_types": MIXED_LAYERS}),
    "cwm": ("Cwm", {"sliding_window": 7, "head_dim": 6, "rope_parameters": LLAMA3_ROPE}),
    "hyperclovax": (
        "HyperCLOVAX",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
        },
    ),
    "vaultgemma": ("VaultGemma", {"head_dim": 10, "sliding_window": 7, "attn_logit_softcapping": 0.5}),
    "gpt-neox": ("GPTNeoX", {"num_key_value_heads": 4, "rope_parameters": PARTIAL}),
    "gpt-neox-serial": (
        "GPTNeoX",
        {"num_key_value_heads": 4, "rope_parameters": PARTIAL, "use_parallel_residual": False},
    ),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 6, "rope_parameters": DYNAMIC | {"alpha": 7.0}}),
    "deepseek-v2": (
        "DeepseekV2",
        LATENT | DEEPSEEK_EXPERTS | {"q_lora_rank": 12, "topk_method": "group_limited_greedy"},
    ),
    "deepseek-v2-lite": (
        "DeepseekV2",
        LATENT | DEEPSEEK_EXPERTS | {"q_lora_rank": None, "rope_parameters": {"rope_type": "default"}},
    ),
    "deepseek-v3": ("DeepseekV3", LATENT | DEEPSEEK_EXPERTS | {"q_lora_rank": 12}),
    "deepseek-v3-mtp": (
        "DeepseekV3",
        LATENT
        | DEEPSEEK_EXPERTS
        | {"q_lora_rank": None, "num_nextn_predict_layers": 2, "rope_interleave": False},
    ),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 10,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
            "swiglu_limit": 0.5,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
        },
    ),
}
THOROUGH = ("llama3-rope-tied", "qwen3", "qwen3-moe")
"""Variants that are tested in every layout; the others, in a few that mix the axes."""
SIX_LAYERS = {"six-tied": "qwen2", "six-untied": "qwen3", "six-mtp": "deepseek-v3-mtp"}
"""Folder of a reference for uneven pipelines -> its variant."""
LENGTHS = [24, 9, 17, 24, 5, 21, 13, 24]
PROMPT = 3
"""The first tokens of each sample are not learnt."""
LEARNING_RATE = 1.0


@dataclass
class Reference:
    """samples: token ids; logits: one `[length, vocabulary]` each; loss: mean over learnt tokens.

    further: the loss of each multi-token layer, over the tokens that have a label that far ahead.
    weights: by HF name, after one plain SGD step of LEARNING_RATE, so that they reveal every gradient.
    """

    samples: list[Tensor]
    logits: list[Tensor]
    loss: float
    grad_norm: float
    weights: dict[str, Tensor]
    further: list[float]


def config_class(architecture: str) -> Any:
    """transformers' config class: `...TextConfig` if there is one, since a multimodal model then has the plain name."""
    import transformers

    return getattr(transformers, f"{architecture}TextConfig", None) or getattr(
        transformers, f"{architecture}Config"
    )


def make_model(variant: str, folder: Path, *, attention: str = "eager", **sizes: Any) -> Any:
    """A random fp32 model of transformers, whose checkpoint is written to `folder`.

    sizes: fields of config.json that are not the variant's.
    """
    import transformers

    architecture, changes = VARIANTS[variant]
    torch.manual_seed(sum(map(ord, variant)))
    config = config_class(architecture)(**(SIZES | changes | sizes))
    config.architectures = [f"{architecture}ForCausalLM"]
    model = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: ones and zeros would hide a mix-up
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.dim() == 1))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # of the router's choice
                buffer.copy_(torch.randn(buffer.shape) * 0.1)
    model.save_pretrained(folder)
    return model


def make_reference(variant: str, folder: Path, *, attention: str = "eager", **sizes: Any) -> None:
    """Write a random fp32 checkpoint to `folder`/model and its Reference to `folder`/reference.pt.

    sizes: fields of config.json that are not the variant's.
    """
    model = make_model(variant, folder / "model", attention=attention, **sizes)
    depths = multi_token_layers(model)
    with torch.no_grad():
        for name, tensor in depths.state_dict().items():
            norm = tensor.dim() == 1 and "bias" not in name
            tensor.copy_(torch.randn(tensor.shape) * 0.1 + norm)
    add_to_checkpoint(folder / "model", model, depths)
    samples = [torch.randint(0, SIZES["vocab_size"], (length,)) for length in LENGTHS]
    torch.save(reference_of(model, depths, samples, folder / "stepped"), folder / "reference.pt")


def reference_of(model: Any, depths: torch.nn.ModuleList, samples: list[Tensor], stepped: Path) -> Reference:
    """Results of a model and its multi-token layers on the samples. Takes the SGD step and saves to `stepped`."""
    outputs = [model(input_ids=sample[None], output_hidden_states=True) for sample in samples]
    logits = [output.logits[0] for output in outputs]
    terms = [
        torch.nn.functional.cross_entropy(rows[PROMPT - 1 : -1], sample[PROMPT:], reduction="sum")
        for rows, sample in zip(logits, samples, strict=True)
    ]
    learnt = sum(length - PROMPT for length in LENGTHS)
    loss = torch.stack(terms).sum() / learnt
    total = loss
    means = torch.zeros(0)
    if depths:
        each = [
            further_loss(model, depths, sample, output.hidden_states[-1], PROMPT)
            for sample, output in zip(samples, outputs, strict=True)
        ]
        further = torch.stack(each).sum(dim=0)
        total = loss + FACTOR / len(depths) * further.sum() / learnt
        # position t predicts token t + 1 + k, if that is learnt
        terms = [sum(length - max(PROMPT, k + 1) for length in LENGTHS) for k in range(1, len(depths) + 1)]
        means = further.detach() / torch.tensor(terms)
    total.backward()
    parameters = [*model.parameters(), *depths.parameters()]
    gradients = [parameter.grad for parameter in parameters]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    with torch.no_grad():
        for parameter in parameters:
            parameter -= LEARNING_RATE * parameter.grad
    model.save_pretrained(stepped)  # to get a checkpoint's names: in memory, experts are fused
    return Reference(
        samples,
        [rows.detach() for rows in logits],
        loss.item(),
        norm.item(),
        load_file(stepped / "model.safetensors")
        | {
            name: tensor.detach()
            for name, tensor in (names_of(model, depths) | copies_of(model, depths)).items()
        },
        means.tolist(),
    )
