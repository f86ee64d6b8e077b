"""What transformers' configuration and model classes fix for each architecture, as plain data.

A config.json describes only part of a model: the defaults of missing keys, which layers have biases, and how many
norms a layer has are in transformers' classes. The facts below are taken from them (transformers 4.57 and 5.19);
`tests/unit/test_plan_parameters.py` checks them against the parameter counts of transformers' own models.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

Bias = bool | str  # True: always; False: never; a string: the key of config.json that decides


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family as `ModelShape.from_config_dict` reads it.

    defaults: keys that a config.json may leave out. qkv_bias, output_bias, mlp_bias: biases of linear layers.
    norms_per_layer: norms of hidden size in a layer, one less where the key `one_less_if` of config.json is true;
    norm_bias: these norms have a bias. gated: the MLP has a gate.
    qk_norm: each head's queries and keys are normalized, or the key of config.json that decides; qk_norm_full: with a
    weight for every head.
    windows: 'none'; 'all': every layer has `sliding_window`; 'types': the layers that layer_types (by default all but
    every `full_every`-th) calls sliding.
    experts: 'none', 'mixtral' (every layer, of intermediate_size), 'qwen' (decoder_sparse_step and
    mlp_only_layers), 'deepseek' (first_k_dense_replace, shared experts). mla: multi-head latent attention.
    """

    family: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    qkv_bias: Bias = "attention_bias"
    output_bias: Bias = "attention_bias"
    mlp_bias: Bias = False
    norms_per_layer: int = 2
    one_less_if: str = ""
    qk_norm: Bias = False
    qk_norm_full: bool = False
    gated: bool = True
    norm_bias: bool = False
    sinks: bool = False
    windows: str = "none"
    full_every: int = 0
    experts: str = "none"
    expert_bias: bool = False
    mla: bool = False


def _family(name: str, facts: Mapping[str, Any] | None = None, **defaults: Any) -> Architecture:
    return Architecture(name, {"max_position_embeddings": 2048} | defaults, **(facts or {}))


_NO_ATTENTION_BIAS = {"qkv_bias": False, "output_bias": False}
_GEMMA = {"tie_word_embeddings": True, "head_dim": 256}
_DEEPSEEK = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": _family("llama", {"mlp_bias": "mlp_bias"}),
    "MistralForCausalLM": _family(
        "mistral",
        {"qkv_bias": False, "output_bias": False, "windows": "all"},
        num_key_value_heads=8,
        max_position_embeddings=131072,
        sliding_window=4096,
    ),
    "Qwen2ForCausalLM": _family(
        "qwen2",
        {"qkv_bias": True, "output_bias": False},
        num_key_value_heads=32,
        max_position_embeddings=32768,
    ),
    "Qwen3ForCausalLM": _family(
        "qwen3", {"qk_norm": True}, num_key_value_heads=32, head_dim=128, max_position_embeddings=32768
    ),
    "GemmaForCausalLM": _family(
        "gemma", None, **_GEMMA, num_key_value_heads=16, max_position_embeddings=8192
    ),
    "Gemma2ForCausalLM": _family(
        "gemma2",
        {"norms_per_layer": 4, "windows": "types", "full_every": 2},
        **_GEMMA,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        sliding_window=4096,
    ),
    "Gemma3ForCausalLM": _family(
        "gemma3",
        {"norms_per_layer": 4, "qk_norm": True, "windows": "types", "full_every": 6},
        **_GEMMA,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        sliding_window=4096,
        vocab_size=262208,
    ),
    "Phi3ForCausalLM": _family(
        "phi3", {"qkv_bias": False, "output_bias": False, "windows": "all"}, max_position_embeddings=4096
    ),
    "GlmForCausalLM": _family(
        "glm",
        {"output_bias": False},
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=True,
        max_position_embeddings=131072,
    ),
    "Glm4ForCausalLM": _family(
        "glm4",
        {"output_bias": False, "norms_per_layer": 4},
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=True,
        max_position_embeddings=131072,
    ),
    "Olmo2ForCausalLM": _family("olmo2", {"qk_norm": True, "qk_norm_full": True}),
    "Olmo3ForCausalLM": _family(
        "olmo3",
        {"qk_norm": True, "qk_norm_full": True, "windows": "types", "full_every": 4},
        sliding_window=4096,
    ),
    "GraniteForCausalLM": _family("granite", {"mlp_bias": "mlp_bias"}),
    "SmolLM3ForCausalLM": _family(
        "smollm3",
        {"mlp_bias": "mlp_bias"},
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
    ),
    "SeedOssForCausalLM": _family(
        "seed_oss",
        {"output_bias": "attention_out_bias", "mlp_bias": "mlp_bias"},
        num_key_value_heads=8,
        head_dim=128,
        attention_bias=True,
        max_position_embeddings=524288,
    ),
    "Ernie4_5ForCausalLM": _family(
        "ernie4_5",
        {"qkv_bias": "use_bias", "output_bias": "use_bias", "mlp_bias": "use_bias"},
        num_key_value_heads=2,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
    ),
    "InternLM3ForCausalLM": _family(
        "internlm3",
        {"qkv_bias": "qkv_bias", "output_bias": "bias", "mlp_bias": "bias"},
        max_position_embeddings=32768,
    ),
    "ArceeForCausalLM": _family("arcee", {"mlp_bias": "mlp_bias", "gated": False}),
    "CohereForCausalLM": _family(
        "cohere",
        {"norms_per_layer": 1, "qk_norm": "use_qk_norm", "qk_norm_full": True},
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    ),
    "Cohere2ForCausalLM": _family(
        "cohere2",
        {"norms_per_layer": 1, "windows": "types", "full_every": 4},
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        sliding_window=4096,
    ),
    "CwmForCausalLM": _family(
        "cwm",
        {**_NO_ATTENTION_BIAS, "windows": "types"},
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        sliding_window=8192,
    ),
    "Exaone4ForCausalLM": _family(
        "exaone4",
        {**_NO_ATTENTION_BIAS, "qk_norm": True, "windows": "types", "full_every": 4},
        num_key_value_heads=32,
        sliding_window=4096,
    ),
    "GPTNeoXForCausalLM": _family(
        "gpt_neox", {"mlp_bias": True, "gated": False, "norm_bias": True}, attention_bias=True
    ),
    "HeliumForCausalLM": _family(
        "helium",
        {"output_bias": False, "mlp_bias": "mlp_bias"},
        num_key_value_heads=20,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "HunYuanDenseV1ForCausalLM": _family("hunyuan_v1_dense", {"qk_norm": True}),
    "HyperCLOVAXForCausalLM": _family("hyperclovax", {"mlp_bias": "mlp_bias", "norms_per_layer": 4}),
    "Jais2ForCausalLM": _family(
        "jais2",
        {"mlp_bias": "mlp_bias", "gated": False, "norm_bias": True},
        attention_bias=True,
        mlp_bias=True,
        max_position_embeddings=8192,
    ),
    "MinistralForCausalLM": _family(
        "ministral",
        {**_NO_ATTENTION_BIAS, "windows": "types"},
        num_key_value_heads=8,
        max_position_embeddings=131072,
        sliding_window=4096,
    ),
    "NemotronForCausalLM": _family(
        "nemotron", {"mlp_bias": "mlp_bias", "gated": False, "norm_bias": True}, max_position_embeddings=4096
    ),
    "StableLmForCausalLM": _family(
        "stablelm",
        {
            "qkv_bias": "use_qkv_bias",
            "output_bias": False,
            "norm_bias": True,
            "one_less_if": "use_parallel_residual",
        },
        num_key_value_heads=32,
        max_position_embeddings=4096,
    ),
    "Starcoder2ForCausalLM": _family(
        "starcoder2",
        {
            "qkv_bias": "use_bias",
            "output_bias": "use_bias",
            "mlp_bias": "use_bias",
            "gated": False,
            "norm_bias": True,
            "windows": "all",
        },
        num_key_value_heads=2,
        use_bias=True,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    ),
    "VaultGemmaForCausalLM": _family(
        "vaultgemma",
        {"windows": "types", "full_every": 2},
        **_GEMMA,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        sliding_window=4096,
    ),
    "MixtralForCausalLM": _family(
        "mixtral",
        {"qkv_bias": False, "output_bias": False, "windows": "all", "experts": "mixtral"},
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=131072,
    ),
    "GraniteMoeForCausalLM": _family(
        "granitemoe", {"experts": "mixtral"}, num_local_experts=8, num_experts_per_tok=2
    ),
    "OlmoeForCausalLM": _family(
        "olmoe",
        {"qk_norm": True, "qk_norm_full": True, "experts": "mixtral"},
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
    ),
    "Qwen2MoeForCausalLM": _family(
        "qwen2_moe",
        {"qkv_bias": "qkv_bias", "output_bias": False, "experts": "qwen"},
        qkv_bias=True,
        num_key_value_heads=16,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        max_position_embeddings=32768,
    ),
    "Qwen3MoeForCausalLM": _family(
        "qwen3_moe",
        {"qk_norm": True, "experts": "qwen"},
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        max_position_embeddings=32768,
    ),
    "DeepseekV2ForCausalLM": _family(
        "deepseek_v2",
        {"experts": "deepseek", "mla": True},
        **_DEEPSEEK,
        first_k_dense_replace=0,
        n_routed_experts=64,
        n_shared_experts=2,
        moe_intermediate_size=1407,
        num_experts_per_tok=6,
    ),
    "DeepseekV3ForCausalLM": _family(
        "deepseek_v3",
        {"experts": "deepseek", "mla": True},
        **_DEEPSEEK,
        first_k_dense_replace=3,
        n_routed_experts=256,
        n_shared_experts=1,
        moe_intermediate_size=2048,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
    ),
    "Glm4MoeForCausalLM": _family(
        "glm4_moe",
        {"output_bias": False, "qk_norm": "use_qk_norm", "experts": "deepseek"},
        num_key_value_heads=8,
        first_k_dense_replace=1,
        n_routed_experts=128,
        n_shared_experts=1,
        moe_intermediate_size=1408,
        num_experts_per_tok=8,
        max_position_embeddings=131072,
    ),
    "GptOssForCausalLM": _family(
        "gpt_oss",
        {"sinks": True, "windows": "types", "full_every": 2, "experts": "mixtral", "expert_bias": True},
        num_key_value_heads=8,
        head_dim=64,
        attention_bias=True,
        num_local_experts=128,
        num_experts_per_tok=4,
        sliding_window=128,
        max_position_embeddings=131072,
    ),
}
"""By the name in config.json's `architectures`."""
