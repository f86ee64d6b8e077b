"""Small models of every family, and their checkpoints, for the converters' tests."""

import torch

from mcore_swift.models.family import family_of

SIZES = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,  # two pipeline stages of two virtual ones
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "num_nextn_predict_layers": 0,
}
FAMILIES = ("llama", "llama-tied", "mistral", "qwen2", "qwen3", "qwen3-tied", "qwen3moe")
OTHER_KINDS = ("phi3", "cohere-tied", "starcoder2-tied", "deepseekv3", "gptoss")
"""Families with rules of other kinds; tests/parallel/test_parity.py takes every family through a live model."""


def hf_config(name):
    import transformers

    family, _, tied = name.partition("-")
    architecture = {
        "llama": "Llama",
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "qwen3moe": "Qwen3Moe",
        "qwen2moe": "Qwen2Moe",
        "mixtral": "Mixtral",
        "phi3": "Phi3",
        "cohere": "Cohere",
        "starcoder2": "Starcoder2",
        "deepseekv3": "DeepseekV3",
        "gptoss": "GptOss",
    }[family]
    sizes = dict(SIZES)
    if family.startswith("qwen3"):
        sizes["head_dim"] = 10  # not hidden_size / heads, as in real ones
    if family in ("phi3", "cohere"):
        sizes["pad_token_id"] = 0  # theirs is outside of this vocabulary
    if family == "cohere":
        sizes["use_qk_norm"] = True
    if family == "qwen3moe":
        sizes |= {"num_experts": 4, "moe_intermediate_size": 12, "mlp_only_layers": [1]}
    if family == "qwen2moe":
        sizes |= {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
        sizes["mlp_only_layers"] = [1]
    if family == "gptoss":
        sizes |= {"num_local_experts": 4, "head_dim": 10}
    if family == "deepseekv3":
        sizes |= LATENT | {"n_routed_experts": 8, "moe_intermediate_size": 12, "n_group": 4, "topk_group": 2}
    config = getattr(transformers, f"{architecture}Config")(**sizes, tie_word_embeddings=bool(tied))
    config.architectures = [f"{architecture}ForCausalLM"]
    return config


def rule_table(name):
    config = hf_config(name)
    return family_of(config).rules(config)


def make_checkpoint(name, folder, dtype=torch.float32, max_shard_size="5GB", seed=0):
    """A random checkpoint, written by transformers; returns the model."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(hf_config(name)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms are all ones otherwise, and would hide a mix-up
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (parameter.dim() == 1))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
