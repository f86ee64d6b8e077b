"""Adapters outside the decoder's linear layers: on the output layer, the embedding and routers."""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional

from mcore_swift.models.collectives import CopyToRanks
from mcore_swift.models.shards import ADAPTER, LiveShard
from mcore_swift.tuners.lora import LoraLinear, adapter_parameter, await_parameters
from mcore_swift.tuners.parts import Part
from mcore_swift.tuners.settings import LoraSettings
from mcore_swift.tuners.starts import draw


class LoraOutput(LoraLinear):
    """The output layer with an adapter. For vocabulary padding, B has rows of zeros that receive no gradient."""

    def __init__(self, base: nn.Module, parts: list[Part], settings: LoraSettings) -> None:
        super().__init__(base, parts, settings, column=True)
        for matrix in self.lora_A:
            matrix.sequence_parallel = False  # `logits_of_gathered` sums over ranks itself

    def logits_of_gathered(self, hidden: Tensor) -> Tensor:
        """`[learnt, h]`, the same on all tensor-parallel ranks, which sum its gradient -> logits `[learnt, rows]`."""
        await_parameters(self)
        dropped = functional.dropout(hidden, self.dropout) if self.training and self.dropout else hidden
        matrix = self.lora_A[0]
        if self.group.size() > 1:  # each rank has only the gradient from its rows of the vocabulary
            matrix = CopyToRanks.apply(matrix, self.group)
        low = functional.linear(dropped, matrix) * self.scaling
        delta = functional.linear(low, self.lora_B[0])
        weight = self.base.weight
        plain = functional.linear(hidden, weight)
        if self.magnitudes is None:
            return plain + delta
        scale = self._magnified()
        turned = plain if dropped is hidden else functional.linear(dropped, weight)
        return plain + (scale - 1) * turned + scale * delta


class LoraEmbedding(nn.Module):
    """A vocabulary-parallel embedding with peft's adapter: A `[rank, words / t]`, initially zero, B `[hidden, rank]`.

    As in peft, there is no dropout.
    """

    def __init__(self, base: nn.Module, part: Part, settings: LoraSettings) -> None:
        super().__init__()
        self.base, self.part = base, part
        self.group = get_tensor_model_parallel_group()
        self.rank, self.scaling = settings.rank_of(part.module), settings.scaling_of(part.module)
        weight = base.weight
        generator = torch.Generator().manual_seed(
            zlib.crc32(f"{settings.seed} {part.module}.lora_B".encode())
        )
        drawn = torch.randn(part.shape[1], self.rank, generator=generator)
        # Rows that are not padding; a rank that has none gets one column, which is never looked up.
        self.words = sum(stop - start for start, stop in part.rows)
        down, up = weight.new_zeros(self.rank, max(self.words, 1)), drawn.to(weight)
        marks = {"weight": weight, "group": self.group, "by_tokens": base.reduce_scatter_embeddings}
        self.lora_A = nn.ParameterList([adapter_parameter(down, shared=False, **marks)])
        self.lora_B = nn.ParameterList([adapter_parameter(up, shared=True, **marks)])

    @property
    def weight(self) -> nn.Parameter:
        """The frozen weight, for code that looks at the layer."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids `[b, s]` -> `[b, s, hidden]`, or `[s / t, b, hidden]` if the base layer scatters what it sums."""
        await_parameters(self)
        output = self.base(ids)
        local = ids - self.base.vocab_start_index
        elsewhere = (local < 0) | (local >= self.words)
        low = functional.embedding(local.masked_fill(elsewhere, 0), self.lora_A[0].t())
        low = low.masked_fill(elsewhere[..., None], 0)
        if self.base.reduce_scatter_embeddings:
            low = reduce_scatter_to_sequence_parallel_region(
                low.transpose(0, 1).contiguous(), group=self.group
            )
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.group)
        return output + functional.linear(self.scaling * low, self.lora_B[0])

    def merged(self) -> Tensor:
        """The layer's weight with the adapter merged, as a new tensor. Not collective."""
        with torch.no_grad():
            delta = self.scaling * (self.lora_B[0].float() @ self.lora_A[0].float()).t()
            merged = self.base.weight.to(torch.float32, copy=True)
            merged[: self.words] += delta[: self.words]
            return merged.to(self.base.weight.dtype)

    def begin(self) -> None:
        """Nothing of it follows from the frozen weight."""

    def own_shards(self) -> Iterator[tuple[nn.Parameter, LiveShard]]:
        """A and B, each with its region of the whole tensor in PEFT's shape."""
        name, (words, hidden) = f"{ADAPTER}{self.part.module}", self.part.shape
        down, up = self.lora_A[0], self.lora_B[0]
        copies = (*self.part.replica[:1], self.group.rank(), *self.part.replica[2:])
        for start, stop in self.part.rows:
            yield (
                down,
                LiveShard(
                    f"{name}.lora_embedding_A",
                    down.detach(),
                    ((0, self.rank), (start, stop)),
                    (self.rank, words),
                    self.part.replica,
                ),
            )
        whole = ((0, hidden), (0, self.rank))
        yield (
            up,
            LiveShard(f"{name}.lora_embedding_B", up.detach(), whole, (hidden, self.rank), copies),
        )

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The base layer's, under its own keys."""
        return self.base.sharded_state_dict(prefix, *args, **kwargs)


class RouterAdapter(nn.Module):
    """A and B for a router's weight, replicated on every rank like the router. Assigned to `router.adapter`."""

    def __init__(self, router: nn.Module, part: Part, settings: LoraSettings) -> None:
        super().__init__()
        self.part, self.dropout = part, settings.dropout
        self.group = get_tensor_model_parallel_group()
        self.rank, self.scaling = settings.rank_of(part.module), settings.scaling_of(part.module)
        self.sequence_parallel = router.config.sequence_parallel
        self._router = [router]  # in a list, so that the parent module is not registered as a child
        weight = router.weight
        marks = {
            "weight": weight,
            "group": self.group,
            "by_tokens": router.config.sequence_parallel,
            "shared": True,
        }
        down, up = (matrix.to(weight) for matrix in draw(part, self.rank, settings))
        self.lora_A = nn.ParameterList([adapter_parameter(down, **marks)])
        self.lora_B = nn.ParameterList([adapter_parameter(up, **marks)])

    @property
    def weight(self) -> nn.Parameter:
        """The router's frozen weight."""
        return self._router[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """`[s, b, h]` -> the adapter's contribution to the router logits, `[s, b, experts]`."""
        await_parameters(self)
        if self.training and self.dropout:
            if self.sequence_parallel:
                with get_cuda_rng_tracker().fork():
                    x = functional.dropout(x, self.dropout)
            else:
                x = functional.dropout(x, self.dropout)
        return functional.linear(self.scaling * functional.linear(x, self.lora_A[0]), self.lora_B[0])

    def merged(self) -> Tensor:
        """The router's weight with the adapter merged, as a new tensor. Not collective."""
        with torch.no_grad():
            delta = self.scaling * (self.lora_B[0].float() @ self.lora_A[0].float())
            return (self.weight.float() + delta).to(self.weight.dtype)

    def begin(self) -> None:
        """Nothing of it follows from the frozen weight."""

    def own_shards(self) -> Iterator[tuple[nn.Parameter, LiveShard]]:
        """A and B, whole, in PEFT's shapes."""
        name, replica = f"{ADAPTER}{self.part.module}", self.part.replica
        for matrix, parameter in (("A", self.lora_A[0]), ("B", self.lora_B[0])):
            shape = tuple(parameter.shape)
            region = tuple((0, size) for size in shape)
            yield (
                parameter,
                LiveShard(f"{name}.lora_{matrix}.weight", parameter.detach(), region, shape, replica),
            )

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Empty: `own_shards` yields the adapter's tensors."""
        return {}
