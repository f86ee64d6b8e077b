"""A low-rank adapter on a parallel linear layer.

As in peft, each HF weight inside a fused layer has its own A and B, so that adapters are written to PEFT folders, and
read from them, without arithmetic. Layouts, with t the size of the layer's tensor-parallel group:

    column parallel (output rows split): A `[rank, in]` on every rank, B `[rows / t, rank]`
    row parallel (input columns split):  A `[rank, columns / t]`, B `[out, rank]` on every rank
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from megatron.core.parallel_state import get_expert_tensor_parallel_group, get_tensor_model_parallel_group
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional

from mcore_swift.models.collectives import CopyToRanks
from mcore_swift.models.shards import ADAPTER, LiveShard
from mcore_swift.tuners.dora import row_norms
from mcore_swift.tuners.parts import Part
from mcore_swift.tuners.quantized import frozen_values, like_weight
from mcore_swift.tuners.settings import LoraSettings
from mcore_swift.tuners.starts import draw


class LoraLinear(nn.Module):
    """Wraps `base`: the same call, the same results plus the adapter's delta.

    The checkpoint keys of the base layer do not change; `own_shards` yields the adapter's tensors.
    """

    def __init__(
        self,
        base: nn.Module,
        parts: Sequence[Part],
        settings: LoraSettings,
        *,
        column: bool,
        is_expert: bool | None = None,
    ) -> None:
        """parts: the HF weights inside `base` that get an adapter. column: column parallel, else row parallel.

        is_expert: whether the layer belongs to an expert, if `base` has no attribute that says so.
        """
        super().__init__()
        self.base = base
        self.parts = list(parts)
        self.dropout = settings.dropout
        self.column = column
        self.is_expert = bool(getattr(base, "is_expert", is_expert))
        self.group = (
            get_expert_tensor_parallel_group() if self.is_expert else get_tensor_model_parallel_group()
        )
        split = self.group.size() > 1
        # megatron-core's dispatcher gathers the tokens before the experts and sums their outputs over ranks after.
        self.summed_outside = self.is_expert and split
        self.sequence_parallel = base.config.sequence_parallel and not self.is_expert and split
        weight = like_weight(base)
        self.lora_A, self.lora_B = nn.ParameterList(), nn.ParameterList()
        self.ranks = [settings.rank_of(part.module) for part in self.parts]
        self.scalings = [settings.scaling_of(part.module) for part in self.parts]
        for part, rank in zip(self.parts, self.ranks, strict=True):
            down, up = draw(part, rank, settings)
            self.lora_A.append(self._parameter(down.to(weight), shared=column))
            self.lora_B.append(self._parameter(up.to(weight), shared=not column))
        # DoRA: set to the norm of each row once the weight is loaded (`begin`).
        self.magnitudes: nn.ParameterList | None = None
        if settings.use_dora:
            ones = [weight.new_ones(part.num_rows) for part in self.parts]
            self.magnitudes = nn.ParameterList(self._parameter(part, shared=not column) for part in ones)
        # Multiplies the concatenated `x A^T` of all parts: one number, or one per column if parts differ.
        self.scaling: float | Tensor = self.scalings[0]
        if len(set(self.scalings)) > 1:
            scalings = torch.tensor(self.scalings, dtype=weight.dtype, device=weight.device)
            self.scaling = scalings.repeat_interleave(torch.tensor(self.ranks, device=weight.device))
        places = torch.cat([part.local_rows for part in self.parts])
        in_order = len(places) == weight.size(0) and bool((places[1:] > places[:-1]).all())
        # Row of the layer's output for each row of the concatenated parts; None if they are the same.
        self.places = None if in_order else places.to(weight.device)

    def _parameter(self, values: Tensor, *, shared: bool) -> nn.Parameter:
        """shared: replicated over the tensor-parallel ranks."""
        return adapter_parameter(
            values, self.base.weight, self.group, shared=shared, by_tokens=self.sequence_parallel
        )

    @property
    def adapters(self) -> "list[LoraLinear]":
        """Itself; a grouped layer has several."""
        return [self]

    @property
    def weight(self) -> nn.Parameter:
        """The frozen weight of the base layer."""
        return self.base.weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """x as `base` takes it: `[s, b, in]`, or `[tokens, in]` in an expert."""
        output, bias, multiplied = self.of_base(x, *args, **kwargs)
        await_parameters(self)
        dropped = self._dropped(multiplied)
        delta = self._delta(dropped)
        if self.magnitudes is None:
            return output + delta, bias
        if dropped is multiplied:
            plain = output
        else:  # as in peft, dropout also applies to the frozen weight's input where the magnitude multiplies it
            plain, _ = self.base(dropped, *args, **kwargs)
        if bias is None and self.base.bias is not None:  # the layer has already added it
            plain = plain - self._whole_output(self.base.bias)
        scale = self._whole_output(self._magnified())
        return output + (scale - 1) * plain + scale * delta, bias

    def of_base(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """Output and bias of `base`, and the input of its matrix product."""
        output, bias = self.base(x, *args, **kwargs)
        return output, bias, x

    def delta(self, x: Tensor) -> Tensor:
        """The adapter's contribution to the output. x: the input of the layer's matrix product."""
        await_parameters(self)
        return self._delta(self._dropped(x))

    @torch.no_grad()
    def begin(self) -> None:
        """Initialize the magnitudes from the frozen weight, which is loaded now. Collective over the layer's ranks."""
        if self.magnitudes is not None:
            for magnitude, norms in zip(self.magnitudes, self._norms(), strict=True):
                magnitude.copy_(norms)

    def _norms(self) -> list[Tensor]:
        """For each part, the row norms of its weight with the adapter added."""
        weight = frozen_values(self.base)
        group = None if self.column else self.group
        norms = []
        for part, down, up, scaling in zip(self.parts, self.lora_A, self.lora_B, self.scalings, strict=True):
            whole = self.places is None and len(self.parts) == 1
            rows = weight if whole else weight[part.local_rows.to(weight.device)]
            norms.append(row_norms(rows, down, scaling * up, group))
        return norms

    def _magnified(self) -> Tensor:
        """Scale of each row of the layer: its magnitude over its norm, `[rows]`; 1 for rows without an adapter."""
        magnitudes = list(self.magnitudes)
        if self.summed_outside and not self.column:  # each rank has only the gradient of its share of the sum
            magnitudes = [CopyToRanks.apply(magnitude, self.group) for magnitude in magnitudes]
        parts = [magnitude / norms for magnitude, norms in zip(magnitudes, self._norms(), strict=True)]
        scale = torch.cat(parts)
        if self.places is None:
            return scale
        return scale.new_ones(self.base.weight.size(0)).index_copy(0, self.places, scale)

    def _whole_output(self, values: Tensor) -> Tensor:
        """This rank's part of the output, gathered if the layer gathers its output."""
        if self.column and getattr(self.base, "gather_output", False):
            return gather_from_tensor_model_parallel_region(values, group=self.group)
        return values

    def _delta(self, x: Tensor) -> Tensor:
        """The adapter's contribution. x: after dropout."""
        down, up = list(self.lora_A), list(self.lora_B)
        if self.summed_outside:
            shared = down if self.column else up
            # each rank has only the gradient of its share of the sum
            shared[:] = [CopyToRanks.apply(matrix, self.group) for matrix in shared]
        hidden = functional.linear(x, torch.cat(down) if len(down) > 1 else down[0])
        hidden = self._cross(hidden)
        return self._whole_output(functional.linear(hidden * self.scaling, self._up(up)))

    def _up(self, matrices: Sequence[Tensor]) -> Tensor:
        """The B of all parts as one block matrix, `[rows of the layer, sum of ranks]`.

        Its zeros cost less than scattering the outputs of the parts, which have one row per token.
        """
        if len(matrices) == 1:
            whole = matrices[0]
        else:
            ends = list(accumulate(self.ranks))
            whole = torch.cat(
                [
                    functional.pad(matrix, (end - rank, ends[-1] - end))
                    for matrix, rank, end in zip(matrices, self.ranks, ends, strict=True)
                ]
            )
        if self.places is None:
            return whole
        return whole.new_zeros(self.base.weight.size(0), whole.size(1)).index_copy(0, self.places, whole)

    def _cross(self, hidden: Tensor) -> Tensor:
        """The communication between A and B, where the tensor is smallest: `[..., sum of ranks]`."""
        if self.group.size() == 1 or self.summed_outside:
            return hidden
        if self.column:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(hidden, group=self.group)
            return CopyToRanks.apply(hidden, self.group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(hidden, group=self.group)
        return reduce_from_tensor_model_parallel_region(hidden, group=self.group)

    def _dropped(self, x: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return x
        if (
            self.column and not self.sequence_parallel
        ):  # all ranks have the same tokens and draw the same mask
            return functional.dropout(x, self.dropout)
        with get_cuda_rng_tracker().fork():
            return functional.dropout(x, self.dropout)

    def merged(self) -> Tensor:
        """The layer's weight with the adapter merged, as a new tensor.

        Collective over the layer's ranks if a row-parallel layer has magnitudes.
        """
        with torch.no_grad():
            merged = frozen_values(self.base).to(torch.float32, copy=True)
            for part, scaling, down, up in zip(
                self.parts, self.scalings, self.lora_A, self.lora_B, strict=True
            ):
                rows = part.local_rows.to(merged.device)
                merged.index_add_(0, rows, scaling * (up.float() @ down.float()))
            if self.magnitudes is not None:
                merged *= self._magnified().float()[:, None]
            return merged.to(self.base.weight.dtype)

    def own_shards(self) -> Iterator[tuple[nn.Parameter, LiveShard]]:
        """Each matrix and magnitude vector of the adapter, with its region of the whole tensor in PEFT's shape."""
        magnitudes = self.magnitudes if self.magnitudes is not None else [None] * len(self.parts)
        for part, rank, down, up, magnitude in zip(
            self.parts, self.ranks, self.lora_A, self.lora_B, magnitudes, strict=True
        ):
            name = f"{ADAPTER}{part.module}"
            copies = (*part.replica[:1], self.group.rank(), *part.replica[2:])
            rows, columns = part.shape
            yield (
                down,
                LiveShard(
                    f"{name}.lora_A.weight",
                    down.detach(),
                    ((0, rank), part.columns),
                    (rank, columns),
                    copies if self.column else part.replica,
                ),
            )
            own, first = part.replica if self.column else copies, 0
            for start, stop in part.rows:
                run = slice(first, first + stop - start)
                first += stop - start
                region = ((start, stop), (0, rank))
                yield up, LiveShard(f"{name}.lora_B.weight", up.detach()[run], region, (rows, rank), own)
                if magnitude is not None:
                    key, held = f"{name}.lora_magnitude_vector", magnitude.detach()[run]
                    yield magnitude, LiveShard(key, held, region[:1], (rows,), own)

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The base layer's, under its own keys."""
        return self.base.sharded_state_dict(prefix, *args, **kwargs)


def adapter_parameter(
    values: Tensor, weight: nn.Parameter, group: Any, *, shared: bool, by_tokens: bool
) -> nn.Parameter:
    """A trained parameter of an adapter on `weight`, with the attributes that megatron-core's optimizer reads.

    shared: replicated over the ranks of `group`. by_tokens: each of them computes the gradient of its own tokens only.
    """
    parameter = nn.Parameter(values)
    parameter.allreduce = getattr(weight, "allreduce", True)
    # The gradient norm counts a replicated parameter once: on the first rank of the group.
    parameter.tensor_model_parallel = True
    parameter.shared = shared and group.rank() > 0
    # Without sequence parallelism all ranks compute the same gradient; with it, each computes that of its own
    # tokens, and megatron-core sums the gradients of parameters with this attribute.
    parameter.sequence_parallel = shared and by_tokens
    return parameter


def await_parameters(module: nn.Module) -> None:
    """Run the pre-forward hooks of parameter lists, which are never called as modules.

    With --overlap_param_gather such hooks wait until the stepped weights are gathered.
    """
    for child in module.children():
        if isinstance(child, nn.ParameterList):
            for hook in child._forward_pre_hooks.values():
                hook(child, ())
