"""Supported Hugging Face architectures, as plain data: readable without torch, before any process starts."""

SUPPORTED_ARCHITECTURES: dict[str, str] = {
    "ArceeForCausalLM": "arcee",
    "Cohere2ForCausalLM": "cohere2",
    "CohereForCausalLM": "cohere",
    "CwmForCausalLM": "cwm",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "Exaone4ForCausalLM": "exaone4",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "GemmaForCausalLM": "gemma",
    "Glm4ForCausalLM": "glm4",
    "Glm4MoeForCausalLM": "glm4_moe",
    "GlmForCausalLM": "glm",
    "GPTNeoXForCausalLM": "gpt_neox",
    "GptOssForCausalLM": "gpt_oss",
    "GraniteForCausalLM": "granite",
    "HeliumForCausalLM": "helium",
    "HunYuanDenseV1ForCausalLM": "hunyuan_v1_dense",
    "HyperCLOVAXForCausalLM": "hyperclovax",
    "Jais2ForCausalLM": "jais2",
    "LlamaForCausalLM": "llama",
    "MinistralForCausalLM": "ministral",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "NemotronForCausalLM": "nemotron",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "OlmoeForCausalLM": "olmoe",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "SeedOssForCausalLM": "seed_oss",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
    "VaultGemmaForCausalLM": "vaultgemma",
}
"""Architecture named in a config.json -> our family, a module of `mcore_swift.models.families`."""

FEATURES: dict[str, tuple[str, ...]] = {
    "arcee": ("MLP without gate",),
    "cohere": ("attention beside MLP", "logit scale", "norms on query and key heads"),
    "cohere2": ("attention beside MLP", "sliding window", "layers without rotary embedding", "logit scale"),
    "cwm": ("sliding window",),
    "deepseek_v2": ("latent attention", "experts", "shared experts", "yarn"),
    "deepseek_v3": (
        "latent attention",
        "experts",
        "shared experts",
        "router with a bias",
        "multi-token layers",
        "yarn",
    ),
    "ernie4_5": ("biases",),
    "exaone4": (
        "norms behind",
        "norms on query and key heads",
        "sliding window",
        "layers without rotary embedding",
    ),
    "gemma": ("embedding scale",),
    "gemma2": ("sliding window", "norms on both sides", "soft caps", "embedding scale"),
    "gemma3": (
        "sliding window",
        "norms on both sides",
        "two rotary embeddings",
        "norms on query and key heads",
    ),
    "glm": ("partial rotary embedding",),
    "glm4": ("partial rotary embedding", "norms on both sides"),
    "glm4_moe": (
        "experts",
        "shared experts",
        "router with a bias",
        "multi-token layers",
        "partial rotary embedding",
    ),
    "gpt_oss": ("experts", "sinks", "sliding window", "biases", "yarn", "MXFP4 checkpoints"),
    "gpt_neox": (
        "LayerNorm",
        "attention beside MLP",
        "MLP without gate",
        "biases",
        "partial rotary embedding",
    ),
    "granite": ("embedding, attention, residual and logit scales",),
    "helium": ("biases",),
    "hunyuan_v1_dense": ("norms on query and key heads",),
    "hyperclovax": ("norms on both sides", "embedding, attention, residual and logit scales"),
    "jais2": ("LayerNorm", "MLP without gate", "biases"),
    "llama": ("rope scaling: linear, dynamic, llama3, yarn", "biases"),
    "ministral": ("sliding window",),
    "mistral": ("sliding window",),
    "mixtral": ("experts", "sliding window"),
    "nemotron": ("LayerNorm", "MLP without gate", "partial rotary embedding"),
    "olmo2": ("norms behind", "norms on queries and keys"),
    "olmo3": ("norms behind", "norms on queries and keys", "sliding window", "two rotary embeddings"),
    "olmoe": ("experts", "norms on queries and keys"),
    "phi3": ("longrope", "partial rotary embedding", "sliding window"),
    "qwen2": ("sliding window", "yarn"),
    "qwen2_moe": ("experts", "gated shared expert", "sliding window", "yarn"),
    "qwen3": ("sliding window", "yarn", "norms on query and key heads"),
    "qwen3_moe": ("experts", "norms on query and key heads"),
    "seed_oss": ("biases",),
    "smollm3": ("layers without rotary embedding",),
    "stablelm": ("LayerNorm", "partial rotary embedding", "attention beside MLP"),
    "starcoder2": ("LayerNorm", "MLP without gate", "biases", "sliding window"),
    "vaultgemma": ("sliding window", "soft caps", "embedding scale"),
}
"""Family -> what its models have that Llama's do not."""

PROVEN_DENSE = ("TP", "SP", "PP", "VPP", "CP")
PROVEN: dict[str, tuple[str, ...]] = {
    "llama": (*PROVEN_DENSE, "DP"),
    "qwen3": (*PROVEN_DENSE, "DP"),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
        (*PROVEN_DENSE, "DP", "EP", "ETP"),
    ),
}
"""Family -> the kinds of parallelism in which tests/parallel/test_parity.py compares its logits, loss and every
gradient with transformers' (docs/parity.md has the errors). Families not listed have `PROVEN_DENSE`.
"""


def proven(family: str) -> tuple[str, ...]:
    """The kinds of parallelism in which a family is compared with transformers; see `PROVEN`."""
    return PROVEN.get(family, PROVEN_DENSE)
