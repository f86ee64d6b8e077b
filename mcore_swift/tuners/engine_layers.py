"""The linear layers that support adapters, by class name: megatron-core's and Transformer Engine's.

Transformer Engine's classes are matched by name, so that it need not be installed; their arguments and results follow
megatron-core's wrappers (`megatron.core.extensions.transformer_engine`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcore_swift.errors import UserError
from mcore_swift.tuners.lora import LoraLinear
from mcore_swift.tuners.parts import Part
from mcore_swift.tuners.settings import LoraSettings


@dataclass(frozen=True)
class Kind:
    """How a linear layer is built.

    column: output rows are split over tensor-parallel ranks, else input columns. normed: the layer normalizes its
    input. grouped: it has one matrix per expert, `weight0`, `weight1` and so on. own: of megatron-core, not of
    Transformer Engine.
    """

    column: bool
    normed: bool = False
    grouped: bool = False
    own: bool = False


KINDS: Mapping[str, Kind] = {
    "ColumnParallelLinear": Kind(column=True, own=True),
    "RowParallelLinear": Kind(column=False, own=True),
    "TEColumnParallelLinear": Kind(column=True),
    "TERowParallelLinear": Kind(column=False),
    "TELayerNormColumnParallelLinear": Kind(column=True, normed=True),
    "TEColumnParallelGroupedLinear": Kind(column=True, grouped=True),
    "TERowParallelGroupedLinear": Kind(column=False, grouped=True),
}


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a layer, by its class or the nearest base class; None if it supports no adapter."""
    return next((KINDS[cls.__name__] for cls in type(layer).__mro__ if cls.__name__ in KINDS), None)


def weights_in(layer: nn.Module, kind: Kind) -> list[nn.Parameter]:
    """The matrices of a layer, in the order of its experts."""
    if not kind.grouped:
        return [layer.weight] if layer.weight is not None else []
    return [getattr(layer, f"weight{number}") for number in range(layer.num_gemms)]


class LoraNormLinear(LoraLinear):
    """An adapter on a layer that normalizes its input itself: the adapter takes the normalized input.

    With sequence parallelism it is that of this rank's tokens, as from a separate norm module.
    """

    def __init__(self, base: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base, *args, **kwargs)
        base.return_layernorm_output = True
        base.return_layernorm_output_gathered = False

    def of_base(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """Output, bias, and the normalized input.

        The layer returns (output, bias, normalized) if it returns a bias, else ((output, normalized), None).
        """
        given = self.base(x, *args, **kwargs)
        if len(given) == 3:
            return given
        (output, normalized), bias = given
        return output, bias, normalized


class LoraGroupedLinear(nn.Module):
    """Adapters on a layer that multiplies the tokens of several experts, each with its own matrix."""

    def __init__(
        self, base: nn.Module, parts: Sequence[Sequence[Part]], settings: LoraSettings, *, column: bool
    ) -> None:
        """parts: for each expert, the HF weights in its matrix that get an adapter; possibly none."""
        super().__init__()
        self.base = base
        self.of_expert = nn.ModuleDict(
            {
                str(number): LoraLinear(_OneOf(base, number), held, settings, column=column)
                for number, held in enumerate(parts)
                if held
            }
        )

    @property
    def adapters(self) -> list[LoraLinear]:
        """Those of the experts that have one."""
        return list(self.of_expert.values())

    def forward(self, x: Tensor, m_splits: Sequence[int], *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """x: `[tokens, in]`, the tokens of the first expert first. m_splits: how many tokens each expert has."""
        output, bias = self.base(x, m_splits, *args, **kwargs)
        deltas = [
            self.of_expert[str(number)].delta(tokens)
            if str(number) in self.of_expert
            else output.new_zeros(len(tokens), output.size(-1))
            for number, tokens in enumerate(x.split(list(m_splits)))
        ]
        return output + torch.cat(deltas), bias

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The base layer's, under its own keys."""
        return self.base.sharded_state_dict(prefix, *args, **kwargs)

    def backward_dw(self) -> None:
        """The base layer's."""
        self.base.backward_dw()


class _OneOf:
    """One expert of a grouped layer, with the attributes of a layer that `LoraLinear` reads. Owns no parameter."""

    is_expert = True

    def __init__(self, layer: nn.Module, number: int) -> None:
        self.config = layer.config
        self.weight: nn.Parameter = getattr(layer, f"weight{number}")


def adapt(
    layer: nn.Module, kind: Kind, parts: Sequence[Sequence[Part]], settings: LoraSettings, *, is_expert: bool
) -> LoraLinear | LoraGroupedLinear:
    """The layer, wrapped with adapters on the given parts of its matrices (`weights_in`).

    Raises UserError for a kind of adapter that the layer does not support.
    """
    if settings.use_dora and not kind.own:
        raise UserError(
            f"--use_dora: layers of class {type(layer).__name__} do not support magnitudes yet",
            "use --transformer_impl local",
        )
    if kind.grouped:
        return LoraGroupedLinear(layer, parts, settings, column=kind.column)
    cls = LoraNormLinear if kind.normed else LoraLinear
    return cls(layer, parts[0], settings, column=kind.column, is_expert=is_expert)
