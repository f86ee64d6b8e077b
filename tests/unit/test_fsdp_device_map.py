"""Models laid over devices. Without GPUs: where modules go, that nothing changes, and that too little room is told."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mcore_swift.engines.fsdp import device_map
from mcore_swift.engines.fsdp.model import TransformersPlan, build_on_meta
from mcore_swift.errors import UserError

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def arguments(size="100KB", kind="sequential"):
    return SimpleNamespace(device_map=kind, max_memory={"0": size, "1": size})


def test_layers_fill_one_device_after_the_other(two_gpus):
    found = device_map.device_map_of(
        build_on_meta(TransformersPlan(CONFIG, "llama"), None), arguments("35KB")
    )
    layers = [found[f"model.layers.{number}"] for number in range(4)]
    assert set(found.values()) == {0, 1} and layers == sorted(layers)


def test_devices_that_are_too_small_are_told(two_gpus):
    base = build_on_meta(TransformersPlan(CONFIG, "llama"), None)
    with pytest.raises(UserError, match="--device_map sequential: .* do not fit on the 2 devices"):
        device_map.device_map_of(base, arguments("8KB"))


def test_one_device_needs_no_map():
    assert device_map.device_map_of(None, arguments()) is None


def test_a_placed_model_is_the_model():
    base = build_on_meta(TransformersPlan(CONFIG, "llama"), None)
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    device_map.place(base, places | {f"model.layers.{number}": "cpu" for number in range(4)})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    base.load_state_dict(model.state_dict())
    assert base.lm_head.weight is base.model.embed_tokens.weight
    ids = torch.arange(10)[None]
    assert torch.equal(base.eval()(ids).logits, model.eval()(ids).logits)
