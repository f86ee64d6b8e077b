"""Sizes read from config.json, and the parameter count, against transformers' own models."""

import pytest

from mcore_swift.errors import UserError, UserErrors
from mcore_swift.plan import ModelShape, padded_vocab_size, parameters
from mcore_swift.plan.count import matmul_parameters

SMALL = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 101,
}  # fmt: skip
CASES = [
    ("Llama", SMALL),
    ("Llama", SMALL | {"tie_word_embeddings": True, "head_dim": 16}),
    ("Llama", SMALL | {"attention_bias": True, "mlp_bias": True}),
    ("Llama", SMALL | {"num_key_value_heads": None}),
    ("Mistral", SMALL),
    ("Mistral", SMALL | {"head_dim": 12}),
    ("Qwen2", SMALL),
    ("Qwen2", SMALL | {"tie_word_embeddings": True}),
    ("Qwen3", SMALL | {"head_dim": 8}),
    ("Qwen3", SMALL | {"attention_bias": True, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize("family, sizes", CASES)
def test_parameters_are_counted_as_transformers_counts(family: str, sizes: dict) -> None:
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    shape = ModelShape.from_config_dict(config.to_dict() | {"architectures": [f"{family}ForCausalLM"]})
    assert parameters(shape) == sum(parameter.numel() for parameter in model.parameters())
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert matmul_parameters(shape) == sum(module.weight.numel() for module in linear)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_keys_that_are_not_there_get_transformers_defaults(family: str) -> None:
    import transformers

    sizes = {key: 64 for key in SMALL if key != "num_key_value_heads"} | {"hidden_size": 4096}
    config = getattr(transformers, f"{family}Config")(**sizes)
    shape = ModelShape.from_config_dict(sizes | {"architectures": [f"{family}ForCausalLM"]})
    assert shape.num_query_groups == config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert shape.head_dim == head_dim
    assert shape.max_position_embeddings == config.max_position_embeddings
    assert shape.tied == config.tie_word_embeddings


def test_rope_of_both_generations_of_transformers() -> None:
    base = SMALL | {"architectures": ["LlamaForCausalLM"]}
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}
    read = ModelShape.from_config_dict
    assert (read(base | old).rope_theta, read(base | old).rope_type) == (5e5, "linear")
    assert (read(base | new).rope_theta, read(base | new).rope_type) == (5e5, "llama3")
    assert (read(base).rope_theta, read(base).rope_type) == (10000.0, "default")


def test_an_architecture_that_is_not_known() -> None:
    with pytest.raises(UserError, match="GPT2LMHeadModel is not supported") as caught:
        ModelShape.from_config_dict(SMALL | {"architectures": ["GPT2LMHeadModel"]}, "m/config.json")
    assert "m/config.json" in str(caught.value) and "Qwen3ForCausalLM" in caught.value.remedy
    with pytest.raises(UserError, match="names no architecture"):
        ModelShape.from_config_dict(SMALL)


def test_missing_and_senseless_sizes_are_told_together() -> None:
    config = SMALL | {"architectures": ["LlamaForCausalLM"], "hidden_size": 0}
    del config["vocab_size"]
    with pytest.raises(UserErrors) as caught:
        ModelShape.from_config_dict(config)
    assert "hidden_size is 0" in str(caught.value) and "vocab_size is missing" in str(caught.value)


@pytest.mark.parametrize("vocab_size", [1, 997, 1024, 151936])
@pytest.mark.parametrize("divisible_by", [1, 64, 128])
@pytest.mark.parametrize("tp", [1, 2, 3, 8])
def test_padded_vocabulary(vocab_size: int, divisible_by: int, tp: int) -> None:
    padded = padded_vocab_size(vocab_size, divisible_by, tp)
    assert padded >= vocab_size and padded % divisible_by == 0 and padded % tp == 0
    assert padded - vocab_size < divisible_by * tp
