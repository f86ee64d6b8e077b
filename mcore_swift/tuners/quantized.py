"""Frozen weights of parallel linear layers in 4 bits (QLoRA, arXiv:2305.14314), with bitsandbytes.

Each rank quantizes its own shard while it is read, and each HF weight in it separately, row by row: without tensor
parallelism the values are those of transformers and peft. The full-precision weight exists only during a matrix
product, in the forward pass and again in the backward pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mcore_swift.accelerator import get_accelerator
from mcore_swift.models.without_memory import emptied
from mcore_swift.tuners.parts import Part

BLOCK = 64
"""Number of weights that share a scale."""


@dataclass(frozen=True)
class FourBit:
    """How weights are quantized. kind: nf4 or fp4. double: the scales are quantized too, to 8 bits in blocks of 256."""

    kind: str = "nf4"
    double: bool = True

    @classmethod
    def from_args(cls, args: Any) -> "FourBit | None":
        """From the flags of a command; None if they do not ask for quantization."""
        if getattr(args, "quant_method", None) is None:
            return None
        return cls(args.bnb_4bit_quant_type, args.bnb_4bit_use_double_quant)

    def quantize(self, values: Tensor) -> tuple[Tensor, Any]:
        """The packed bits, and bitsandbytes' state that `dequantize` needs."""
        from bitsandbytes import functional

        return functional.quantize_4bit(
            values.contiguous(), blocksize=BLOCK, compress_statistics=self.double, quant_type=self.kind
        )


def dequantize(packed: Tensor, state: Any) -> Tensor:
    """The values, in the dtype and shape they had before quantization."""
    from bitsandbytes import functional

    return functional.dequantize_4bit(packed, state)


class QuantizedLinear(nn.Module):
    """A parallel linear layer whose frozen weight is stored in 4 bits: the same call and results, except for rounding.

    `weight` is on the meta device and only carries shape, dtype and sharding; `dense()` returns its values.
    """

    def __init__(self, base: nn.Module, parts: Sequence[Part], form: FourBit) -> None:
        """parts: the HF weights inside `base`, which together make up all of it. `take` fills it later."""
        super().__init__()
        self.base = base
        self.form = form
        self.rows = [part.local_rows for part in parts]
        self.held: list[tuple[Tensor, Any]] = []
        if not base.weight.is_meta:
            base.weight = emptied(base.weight)

    @staticmethod
    def fits(layer: nn.Module, parts: Sequence[Part]) -> bool:
        """Whether a layer can be quantized: its weight is frozen and consists of HF weights only."""
        frozen = layer.weight is not None and not layer.weight.requires_grad
        return frozen and sum(part.num_rows for part in parts) == layer.weight.size(0)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @torch.no_grad()
    def take(self, values: Tensor) -> None:
        """Quantize `[rows, columns]`, the values of the whole layer."""
        self.held = [self.form.quantize(values[_span(rows)]) for rows in self.rows]

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The values in full precision, `[rows, columns]`: a new tensor."""
        parts = [dequantize(packed, state) for packed, state in self.held]
        if len(parts) == 1:
            return parts[0]
        whole = parts[0].new_empty(self.base.weight.shape)
        for rows, values in zip(self.rows, parts, strict=True):
            whole[_span(rows)] = values
        return whole

    merged = dense

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weight, without the lookup tables that all weights share."""
        return sum(tensor.nbytes for packed, state in self.held for tensor in _own_tensors(packed, state))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the base layer's."""
        dense = self.dense()
        place = (
            dense.untyped_storage().data_ptr()
        )  # a number, so that autograd does not keep the values alive

        def pack(saved: Tensor) -> Tensor | _View:
            if saved.untyped_storage().data_ptr() == place:
                return _View(saved.size(), saved.stride(), saved.storage_offset())
            return saved

        def unpack(saved: Tensor | _View) -> Tensor:
            return saved.of(self.dense()) if isinstance(saved, _View) else saved

        with _standing_in(self.base, dense), saved_tensors_hooks(pack, unpack):
            return self.base(x, *args, **kwargs)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The base layer's, under its own keys; the weight in it is on the meta device."""
        return self.base.sharded_state_dict(prefix, *args, **kwargs)


@dataclass(frozen=True)
class _View:
    """What autograd saves instead of the dense weight, or of a view of it."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, dense: Tensor) -> Tensor:
        return dense.as_strided(self.size, self.stride, self.offset)


@contextmanager
def _standing_in(layer: nn.Module, values: Tensor) -> Iterator[None]:
    """Inside the context, the layer has these values as its weight."""
    empty = layer._parameters["weight"]
    layer._parameters["weight"] = nn.Parameter(values, requires_grad=False)
    try:
        yield
    finally:
        layer._parameters["weight"] = empty


def _span(rows: Tensor) -> slice | Tensor:
    """The rows as a slice if they are consecutive."""
    first, last = int(rows[0]), int(rows[-1])
    whole = last - first + 1 == len(rows) and bool((rows[1:] > rows[:-1]).all())
    return slice(first, last + 1) if whole else rows


def _own_tensors(packed: Tensor, state: Any) -> Iterator[Tensor]:
    yield packed
    yield state.absmax
    if state.nested:
        yield state.offset
        yield state.state2.absmax


def frozen_values(layer: nn.Module) -> Tensor:
    """The weight of a layer under an adapter, dequantized if it is quantized."""
    return layer.dense() if isinstance(layer, QuantizedLinear) else layer.weight


def like_weight(layer: nn.Module) -> Tensor:
    """A tensor with the shape, dtype and device of the layer's weight, for `new_empty` and `.to`; not its values."""
    weight = layer.weight
    if not weight.is_meta:
        return weight
    return torch.empty(1, dtype=weight.dtype, device=get_accelerator().device).expand(weight.shape)


def quantized_layers(chunks: Sequence[nn.Module]) -> list[QuantizedLinear]:
    """The quantized layers in this rank's model chunks."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, QuantizedLinear)]
