"""Tiny checkpoints of every family and what transformers says of them: the reference of the parity grid."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

SIZES = {
    "vocab_size": 101,  # no multiple of anything: padded under every TP
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
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
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3-rope-tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral-window": ("Mistral", {"sliding_window": 7, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 10, "tie_word_embeddings": False}),
    "qwen3-moe": (
        "Qwen3Moe",
        EXPERTS
        | {"head_dim": 10, "norm_topk_prob": True, "mlp_only_layers": [1], "tie_word_embeddings": False},
    ),
}
THOROUGH = ("llama3-rope-tied", "qwen3", "qwen3-moe")
"""Variants that go through every layout, packed and unpacked; the others through a few that mix the axes."""
SIX_LAYERS = {"six-tied": "qwen2", "six-untied": "qwen3"}
"""Folder of a reference for uneven pipelines -> its variant."""
LENGTHS = [24, 9, 17, 24, 5, 21, 13, 24]
PROMPT = 3
"""The first tokens of each sample are not learnt."""
LEARNING_RATE = 1.0


@dataclass
class Reference:
    """samples: token ids; logits: one `[length, vocabulary]` each; loss: mean over learnt tokens.

    weights: by HF name, after one plain SGD step of LEARNING_RATE, so that they tell every gradient.
    """

    samples: list[Tensor]
    logits: list[Tensor]
    loss: float
    grad_norm: float
    weights: dict[str, Tensor]


def make_model(variant: str, folder: Path, *, attention: str = "eager", **sizes: Any) -> Any:
    """A random fp32 model of transformers, after its checkpoint was written to `folder`.

    sizes: fields of config.json that are not the variant's.
    """
    import transformers

    architecture, changes = VARIANTS[variant]
    torch.manual_seed(sum(map(ord, variant)))
    config = getattr(transformers, f"{architecture}Config")(**(SIZES | changes | sizes))
    config.architectures = [f"{architecture}ForCausalLM"]
    model = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: ones and zeros would hide a mix-up
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.dim() == 1))
    model.save_pretrained(folder)
    return model


def make_reference(variant: str, folder: Path, *, attention: str = "eager", **sizes: Any) -> None:
    """Write a random fp32 checkpoint to `folder`/model and its Reference to `folder`/reference.pt.

    sizes: fields of config.json that are not the variant's.
    """
    model = make_model(variant, folder / "model", attention=attention, **sizes)
    samples = [torch.randint(0, SIZES["vocab_size"], (length,)) for length in LENGTHS]
    logits = [model(input_ids=sample[None]).logits[0] for sample in samples]
    terms = [
        torch.nn.functional.cross_entropy(rows[PROMPT - 1 : -1], sample[PROMPT:], reduction="sum")
        for rows, sample in zip(logits, samples, strict=True)
    ]
    loss = torch.stack(terms).sum() / sum(length - PROMPT for length in LENGTHS)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LEARNING_RATE * parameter.grad
    model.save_pretrained(folder / "stepped")  # a checkpoint's names: in memory experts are fused
    reference = Reference(
        samples,
        [rows.detach() for rows in logits],
        loss.item(),
        norm.item(),
        load_file(folder / "stepped" / "model.safetensors"),
    )
    torch.save(reference, folder / "reference.pt")
