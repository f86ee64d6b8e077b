"""Switches of the transformers engine, and which layers of Megatron's take adapters."""

import pytest
import torch
from torch import nn

from mcore_swift.accelerator import get_accelerator
from mcore_swift.engines.fsdp import switches
from mcore_swift.engines.fsdp.model import attention_implementation
from mcore_swift.errors import UserError

get_accelerator().install()

from mcore_swift.tuners.attach import _left_out  # noqa: E402
from mcore_swift.tuners.engine_layers import adapt, kind_of, weights_in  # noqa: E402
from mcore_swift.tuners.parts import Part  # noqa: E402
from mcore_swift.tuners.settings import LoraSettings  # noqa: E402


class Toy(nn.Module):
    _no_split_modules = ("Linear",)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(7, 16), nn.Linear(16, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids):
        return self.layer(self.embed(ids))


def test_noise_on_embeddings_is_bounded_and_there_in_training_only():
    torch.manual_seed(0)
    model, ids = Toy(), torch.arange(7)[None]
    plain = model.embed(ids)
    switches.add_noise(model, 5.0)
    noise = (model.embed(ids) - plain).abs().max()
    bound = 5 / (7 * 16) ** 0.5  # alpha / sqrt(length * width)
    assert 0.8 * bound < noise <= bound
    assert torch.equal(model.eval().embed(ids), plain)


def test_layers_are_compiled_in_place_and_compute_the_same():
    model, ids = Toy(), torch.arange(7)[None]
    names, expected = list(model.state_dict()), model(ids)
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    switches.compile_layers(model, backend)
    assert torch.allclose(model(ids), expected) and len(calls) == 1
    assert list(model.state_dict()) == names


def test_what_this_machine_lacks_is_told(monkeypatch):
    monkeypatch.setattr(switches, "_missing_compiler", lambda: "there is no C++ compiler here")
    with pytest.raises(UserError, match="no C\\+\\+ compiler"):
        switches.compile_layers(Toy(), "inductor")
    if not get_accelerator().is_cuda:
        with pytest.raises(UserError, match="Triton"):
            switches.use_liger(Toy())
        assert attention_implementation("flash_attn", end_to_end=True) == "sdpa", (
            "as --use_flash_attn means it"
        )
        with pytest.raises(UserError, match="flash-attn"):
            attention_implementation("flash_attention_2", end_to_end=True)


class TELinear(nn.Linear):
    """Transformer Engine's layer that every tensor-parallel rank has whole."""


class TERowParallelLinear(TELinear):
    pass


class TERowParallelGroupedLinear(nn.Module):
    num_gemms = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight0, self.weight1 = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))


def test_layers_are_known_by_the_nearest_class():
    row, grouped = TERowParallelLinear(2, 2), TERowParallelGroupedLinear()
    assert kind_of(TELinear(2, 2)) is None
    assert not kind_of(row).column and weights_in(row, kind_of(row)) == [row.weight]
    assert weights_in(grouped, kind_of(grouped))[1] is grouped.weight1


def test_a_layer_that_takes_no_adapter_is_refused_by_name():
    layer = nn.ModuleDict({"linear_q_down_proj": TELinear(2, 2)})
    part = Part("a.q_a_proj.weight", (2, 2), ((0, 2),), ((0, 2),), (0, 2), (0, 0, 0))
    parts = {layer["linear_q_down_proj"].weight: [part]}
    error = _left_out([layer], parts, {"a.q_a_proj"}, [])
    assert "a.q_a_proj is in a layer of class TELinear" in str(error)
    assert _left_out([layer], parts, {"b"}, []) is None
    row = TERowParallelLinear(2, 2)
    with pytest.raises(UserError, match="--use_dora: layers of class TERowParallelLinear"):
        adapt(row, kind_of(row), [[part]], LoraSettings(use_dora=True), is_expert=False)
