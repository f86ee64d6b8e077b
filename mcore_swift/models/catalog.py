"""Which Hugging Face architectures we know, as plain data: readable without torch, before any process starts."""

SUPPORTED_ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
"""Architecture named in a config.json -> our family, a module of `mcore_swift.models.families`."""
