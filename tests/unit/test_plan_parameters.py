"""Parameters, total and active, against transformers' own models and against published totals."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from parity_models import SIZES, VARIANTS, config_class  # noqa: E402

from mcore_swift.plan import Layout, ModelShape, active_parameters, parameters  # noqa: E402
from mcore_swift.plan.count import matmul_parameters, mtp_sizes  # noqa: E402
from mcore_swift.plan.low_rank import matrices  # noqa: E402

SMALL = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 101, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = SMALL | {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = EXPERTS | {
    "n_routed_experts": 4, "kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 10, "num_key_value_heads": 6, "n_group": 1, "topk_group": 1,
}  # fmt: skip
CASES = [
    ("Gemma", SMALL | {"head_dim": 8}),
    ("Gemma2", SMALL | {"head_dim": 8}),
    ("Gemma3", SMALL | {"head_dim": 8}),
    ("Phi3", SMALL),
    ("Glm", SMALL | {"head_dim": 8}),
    ("Glm4", SMALL | {"head_dim": 8, "attention_bias": True}),
    ("Olmo2", SMALL),
    ("Olmo2", SMALL | {"attention_bias": True}),
    ("Olmo3", SMALL),
    ("Granite", SMALL | {"attention_bias": True, "mlp_bias": True}),
    ("SmolLM3", SMALL),
    ("SeedOss", SMALL | {"head_dim": 8, "attention_bias": True, "attention_out_bias": True}),
    ("Ernie4_5", SMALL | {"head_dim": 8, "use_bias": True}),
    ("Arcee", SMALL | {"mlp_bias": True}),
    ("Cohere", SMALL | {"use_qk_norm": True}),
    ("Cohere2", SMALL),
    ("Cwm", SMALL | {"head_dim": 8}),
    ("Exaone4", SMALL),
    ("GPTNeoX", {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}),
    ("Helium", SMALL | {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    ("HunYuanDenseV1", SMALL | {"head_dim": 8}),
    ("HyperCLOVAX", SMALL),
    ("Jais2", SMALL),
    ("Ministral", SMALL | {"head_dim": 8}),
    ("Nemotron", SMALL),
    ("StableLm", SMALL | {"use_qkv_bias": True}),
    ("Starcoder2", SMALL),
    ("VaultGemma", SMALL | {"head_dim": 8}),
    ("Mixtral", SMALL | {"num_local_experts": 4}),
    ("GraniteMoe", SMALL | {"num_local_experts": 4}),
    ("Olmoe", SMALL | {"num_experts": 4, "num_experts_per_tok": 2}),
    ("Qwen2Moe", EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 40}),
    ("Qwen2Moe", EXPERTS | {"num_experts": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    ("Qwen3Moe", EXPERTS | {"num_experts": 4, "head_dim": 8, "attention_bias": True}),
    ("Qwen3Moe", EXPERTS | {"num_experts": 4, "head_dim": 8, "mlp_only_layers": [0]}),
    ("DeepseekV2", LATENT | {"first_k_dense_replace": 1, "n_shared_experts": 2}),
    ("DeepseekV2", LATENT | {"q_lora_rank": None, "attention_bias": True}),
    ("DeepseekV3", LATENT | {"first_k_dense_replace": 2, "attention_bias": True}),
    (
        "Glm4Moe",
        EXPERTS | {"n_routed_experts": 4, "head_dim": 8, "use_qk_norm": True, "attention_bias": True},
    ),
    ("GptOss", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
]


CASES += [(family, SIZES | changes) for family, changes in VARIANTS.values()]  # every family we train


@pytest.mark.parametrize("family, sizes", CASES)
def test_parameters_are_counted_as_transformers_counts(family: str, sizes: dict) -> None:
    import torch
    import transformers

    model_class = getattr(transformers, f"{family}ForCausalLM")
    config = config_class(family)(**sizes)
    with torch.device("meta"):
        model = model_class(config)
    shape = ModelShape.from_config_dict(config.to_dict() | {"architectures": [model_class.__name__]})
    assert parameters(shape) == sum(parameter.numel() for parameter in model.parameters())
    # what a token does not see are all routed experts but a few, which transformers keeps as [experts, ...]
    seen = getattr(config, "num_experts_per_tok", 0)
    routed = [value for name, value in model.named_parameters() if ".experts." in name]
    idle = sum(value.numel() // len(value) * (len(value) - seen) for value in routed)
    assert active_parameters(shape) == parameters(shape) - idle
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    gates = [
        value for name, value in model.named_parameters() if name.endswith(("gate.weight", "router.weight"))
    ]
    multiplied = {id(module.weight): module.weight.numel() for module in linear}
    multiplied |= {id(value): value.numel() for value in gates}
    multiplied |= {id(value): value.numel() // len(value) * seen for value in routed if value.dim() == 3}
    assert matmul_parameters(shape) == sum(multiplied.values())
    adapted = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and ".layers." in name
        and not name.endswith(("gate", "router"))
    ]
    adapted += [value for value in routed if value.dim() == 3 and not shape.expert_bias]
    found = [matrix.held(Layout()) for index in range(shape.num_layers) for matrix in matrices(shape, index)]
    assert sum(found) == sum(weight.numel() for weight in adapted)


# config.json of published checkpoints, as far as sizes go, with the totals that their authors state, in 10^9
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
}  # fmt: skip
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "intermediate_size": 18432,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "num_nextn_predict_layers": 1,
}  # fmt: skip
PUBLISHED = [
    (QWEN3_30B, 30.5, 3.3),
    (
        QWEN3_30B
        | {
            "hidden_size": 4096,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "moe_intermediate_size": 1536,
        },  # fmt: skip
        235,
        22,
    ),
    (DEEPSEEK_V3, 671, 37),
    (
        {
            "architectures": ["MixtralForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },  # fmt: skip
        46.7,
        12.9,
    ),
    (
        {
            "architectures": ["GptOssForCausalLM"],
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 201088,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
        },  # fmt: skip
        116.8,
        5.7,  # the model card's 5.1 leaves the input embedding out
    ),
]


@pytest.mark.parametrize("config, total, active", PUBLISHED, ids=lambda value: str(value)[:30])
def test_published_totals(config: dict, total: float, active: float) -> None:
    shape = ModelShape.from_config_dict(config)
    # half of the last digit that is published
    assert parameters(shape) / 1e9 == pytest.approx(total, abs=0.5 if total > 200 else 0.05)
    assert active_parameters(shape) / 1e9 == pytest.approx(active, abs=0.6 if total > 200 else 0.06)


def test_multi_token_prediction_of_deepseek_v3() -> None:
    """The repository holds 685 billion parameters, 14 of them of the one MTP layer; of these two embeddings
    are shared with the model."""
    shape = ModelShape.from_config_dict(DEEPSEEK_V3)
    shared = 2 * shape.vocab_size * shape.hidden_size
    assert (mtp_sizes(shape).total + shared) / 1e9 == pytest.approx(13.5, abs=0.5)


def test_layers_with_experts_and_with_windows() -> None:
    shape = ModelShape.from_config_dict(DEEPSEEK_V3)
    assert [shape.is_moe_layer(index) for index in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert shape.is_mla and shape.has_dense_layers and shape.num_mtp_layers == 1
    oss = ModelShape.from_config_dict(PUBLISHED[-1][0])
    assert [oss.window(index) for index in range(3)] == [128, None, 128]
    assert not oss.has_dense_layers
