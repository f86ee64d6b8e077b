"""Weights in 4 bits: what they take, what is kept for the backward pass, which values they stand for."""

import pytest
import torch
from torch import nn

from mcore_swift.config import MegatronSftArguments, parse
from mcore_swift.errors import UserError, UserErrors
from mcore_swift.tuners.parts import Part
from mcore_swift.tuners.quantized import BLOCK, FourBit, QuantizedLinear, frozen_values, like_weight


class Linear(nn.Linear):
    """A linear layer with the call and the results of a parallel one."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight.size(1), weight.size(0), bias=False)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight.allreduce = False

    def forward(self, x):
        return super().forward(x), None


def make(rows: int, columns: int, local: list[list[tuple[int, int]]], form: FourBit = FourBit()):  # noqa: B008
    """The layer, its values, and the values of each part."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    parts = [
        Part(f"p{number}.weight", (rows, columns), tuple(runs), tuple(runs), (0, columns), (0, 0, 0))
        for number, runs in enumerate(local)
    ]
    base = Linear(values.clone())
    assert QuantizedLinear.fits(base, parts)
    layer = QuantizedLinear(base, parts, form)
    assert (
        layer.weight.is_meta and layer.weight.allreduce is False and like_weight(layer).shape == values.shape
    )
    layer.take(values)
    return layer, values, [values[part.local_rows] for part in parts]


@pytest.mark.parametrize("form", [FourBit(), FourBit("fp4", double=False)])
def test_each_part_is_quantized_by_itself(form):
    functional = pytest.importorskip("bitsandbytes.functional")
    # three rows to a block and a half, parts that lie in each other as queries, keys and values do
    layer, values, parts = make(12, 24, [[(0, 2), (6, 8)], [(2, 4), (8, 10)], [(4, 6), (10, 12)]], form)
    found = frozen_values(layer)
    for runs, part in zip(([0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]), parts, strict=True):
        packed, state = functional.quantize_4bit(
            part, blocksize=BLOCK, compress_statistics=form.double, quant_type=form.kind
        )
        assert torch.equal(found[runs], functional.dequantize_4bit(packed, state))
    assert 0 < (found - values).norm() < 0.2 * values.norm()


def test_a_weight_takes_half_a_byte_and_a_scale_for_64():
    pytest.importorskip("bitsandbytes")
    layer, values, _ = make(256, 512, [[(0, 128)], [(128, 256)]])
    blocks = values.numel() // BLOCK
    # scales in a byte each; for 256 of them one of 4 bytes; for each of the two parts their mean
    assert layer.nbytes == values.numel() // 2 + blocks + blocks // 256 * 4 + 2 * 4
    assert layer.nbytes < 0.13 * values.nbytes
    held = [tensor for tensor in (*layer.parameters(), *layer.buffers()) if not tensor.is_meta]
    assert held == [], "and the full weight is nowhere"


def test_the_values_are_not_kept_for_the_backward_pass(monkeypatch):
    pytest.importorskip("bitsandbytes")
    layer, _, _ = make(64, 128, [[(0, 64)]])
    x = torch.randn(5, 128, requires_grad=True)
    made = []
    dense = QuantizedLinear.dense
    monkeypatch.setattr(QuantizedLinear, "dense", lambda self: made.append(dense(self)) or made[-1])
    output, bias = layer(x)
    assert bias is None and len(made) == 1 and layer.weight.is_meta
    weight = made.pop()
    torch.testing.assert_close(output, x @ weight.t())
    weight.untyped_storage().resize_(0)  # whoever still reads it fails
    output.square().sum().backward()
    assert len(made) == 1, "made again"
    torch.testing.assert_close(x.grad, 2 * output.detach() @ made[0])


def test_a_layer_that_trains_or_is_more_than_its_parts_stays_as_it_is():
    part = Part("p.weight", (8, 8), ((0, 6),), ((0, 6),), (0, 8), (0, 0, 0))
    assert not QuantizedLinear.fits(Linear(torch.zeros(8, 8)), [part])
    trained = Linear(torch.zeros(6, 8)).requires_grad_()
    assert not QuantizedLinear.fits(trained, [part])


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--load_in_4bit", "true"], "--tuner_type full trains all"),
        (["--load_in_8bit", "true", "--tuner_type", "lora"], "only 4 bits of bitsandbytes"),
        (
            ["--load_in_4bit", "true", "--tuner_type", "lora", "--transformer_impl", "transformer_engine"],
            "local",
        ),
        (
            ["--load_in_4bit", "true", "--tuner_type", "lora", "--bnb_4bit_compute_dtype", "float16"],
            "not supported on megatron-core",
        ),
        (
            ["--load_in_4bit", "true", "--tuner_type", "lora", "--perform_initialization", "true"],
            "random weights",
        ),
    ],
)
def test_what_megatron_layers_cannot_do_is_refused(argv, told):
    with pytest.raises((UserError, UserErrors)) as caught:
        parse(MegatronSftArguments, ["--model", "m", "--dataset", "d", *argv], notify=lambda notice: None)
    assert told in str(caught.value), str(caught.value)
