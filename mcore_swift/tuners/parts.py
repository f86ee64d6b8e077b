"""Which Hugging Face weights a parallel linear layer holds on this rank, and which of their rows and columns.

A fused layer (queries, keys and values; gate and up) contains several HF weights. The weight rules say which of its
local rows belong to which, so that adapters depend on neither the model family nor the layout.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mcore_swift.models.rules import RuleTable, Shape, Vocab
from mcore_swift.models.shards import LiveShard, parameter_shards, unwrap

Run = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """The local share of one HF weight `[rows, columns]` inside one linear layer.

    name, shape: of the whole HF weight.
    rows: the runs of its rows that are on this rank, in order; local: where each run lies in the layer's weight.
    columns: its columns that are on this rank.
    padding: rows of vocabulary padding at the end of the layer's weight, which the HF weight does not have.
    replica: megatron-core's replica_id of this copy among the ranks that hold the same values.
    """

    name: str
    shape: Shape
    rows: tuple[Run, ...]
    local: tuple[Run, ...]
    columns: Run
    replica: tuple[int, ...]
    padding: int = 0

    @property
    def module(self) -> str:
        """Full name of the HF module whose weight it is."""
        return self.name.removesuffix(".weight")

    @property
    def num_rows(self) -> int:
        """Rows in the layer."""
        return sum(stop - start for start, stop in self.rows) + self.padding

    @property
    def local_rows(self) -> torch.Tensor:
        """Row in the layer's weight for each of its rows, int64 `[num_rows]`."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.local])


def parts_by_weight(chunks: Iterable[nn.Module], table: RuleTable) -> dict[nn.Parameter, list[Part]]:
    """The parts of every matrix in this rank's model chunks that has a weight rule, in row order."""
    table = table.matrices
    shards: dict[nn.Parameter, list[LiveShard]] = {}
    for chunk in chunks:
        for parameter, shard in parameter_shards(unwrap(chunk)):
            if parameter.dim() == 2 and shard.key in table.by_mcore:
                shards.setdefault(parameter, []).append(shard)
    return {parameter: _parts(parameter, held, table) for parameter, held in shards.items()}


def _parts(parameter: nn.Parameter, shards: Iterable[LiveShard], table: RuleTable) -> list[Part]:
    shards = list(shards)
    if isinstance(table.by_mcore[shards[0].key], Vocab):
        return [_vocabulary(parameter, shards[0], table)]
    runs: dict[str, list[tuple[Run, Run]]] = {}
    about: dict[str, tuple[Shape, Run, tuple[int, ...]]] = {}
    for shard in shards:
        rule = table.by_mcore[shard.key]
        shapes: Mapping[str, Shape] = rule.hf_shapes(shard.global_shape)
        first = (shard.data.storage_offset() - parameter.storage_offset()) // parameter.size(1)
        for block in rule.blocks(shard.region, shapes):
            if len(block.hf) != 2:
                return []  # several matrices in one HF tensor: not a module, so peft has no adapter for it
            start, stop = block.mcore[-2]
            runs.setdefault(block.name, []).append((block.hf[0], (first + start, first + stop)))
            about[block.name] = (shapes[block.name], block.hf[1], shard.replica)
    parts = []
    for name, pairs in runs.items():
        rows, local = zip(*_joined(sorted(pairs)), strict=True)
        shape, columns, replica = about[name]
        parts.append(Part(name, shape, rows, local, columns, replica))
    return parts


def _vocabulary(parameter: nn.Parameter, shard: LiveShard, table: RuleTable) -> Part:
    """An embedding or output layer; a rank may hold nothing but padding."""
    rule = table.by_mcore[shard.key]
    name, shapes = rule.hf[0], rule.hf_shapes(shard.global_shape)
    runs = [block.hf[0] for block in rule.blocks(shard.region, shapes) if block.name == name]
    padding = parameter.size(0) - sum(stop - start for start, stop in runs)
    whole = ((0, parameter.size(0)),)
    return Part(name, shapes[name], tuple(runs), whole, shard.region[1], shard.replica, padding)


def _joined(pairs: Iterable[tuple[Run, Run]]) -> list[tuple[Run, Run]]:
    """Merge runs that are adjacent both in the HF weight and in the layer."""
    joined: list[tuple[Run, Run]] = []
    for rows, local in pairs:
        if joined and joined[-1][0][1] == rows[0] and joined[-1][1][1] == local[0]:
            (first, _), (low, _) = joined[-1]
            joined[-1] = ((first, rows[1]), (low, local[1]))
        else:
            joined.append((rows, local))
    return joined
