"""What context-parallel ranks exchange for attention: all keys and values, or all tokens of fewer heads.

Tensors are `[s, b, heads or groups, d]`; s stands for the whole row, in its order, and s / N for one rank's part.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_swift.models.collectives import AllGather, AllToAll
from mcore_swift.models.segments import Segments


def gather_keys(
    key: Tensor, value: Tensor, segments: Segments, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Keys and values of a rank, `[s / N, b, groups, d]`, -> those of the whole row, `[s, b, groups, d]`.

    In the backward pass, each rank gets the gradient of its keys and values, summed over all ranks' queries.
    """
    both = torch.cat((key.flatten(2), value.flatten(2)), dim=-1)
    row = AllGather.apply(both, group).index_select(0, segments.natural)
    keys, values = row.split((key.shape[2:].numel(), value.shape[2:].numel()), dim=-1)
    return keys.unflatten(-1, key.shape[2:]), values.unflatten(-1, value.shape[2:])


def share_heads(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of a rank's tokens -> a part of the heads of all tokens (DeepSpeed Ulysses, arXiv:2309.14509).

    query `[s / N, b, heads, d]` -> `[s, b, heads / N, d]`; key and value likewise by their groups, which are
    repeated until N divides their number.
    """
    size = group.size()
    repeat = math.lcm(key.size(2), size) // key.size(2)
    if repeat > 1:
        key, value = (tensor.repeat_interleave(repeat, dim=2) for tensor in (key, value))
    # [s / N, b, N, (heads / N) * d], so that one message carries all three
    parts = [tensor.unflatten(2, (size, -1)).flatten(3) for tensor in (query, key, value)]
    message = torch.cat(parts, dim=-1).movedim(2, 0)
    row = AllToAll.apply(message, group).flatten(0, 1).index_select(0, segments.natural)
    parted = row.split([part.size(-1) for part in parts], dim=-1)
    return tuple(
        part.unflatten(-1, (-1, tensor.size(-1)))
        for part, tensor in zip(parted, (query, key, value), strict=True)
    )


def unite_heads(out: Tensor, segments: Segments, group: dist.ProcessGroup) -> Tensor:
    """The way back: a part of the heads of all tokens `[s, b, heads / N, d]` -> all heads `[s / N, b, heads, d]`."""
    message = out.index_select(0, segments.by_rank).unflatten(0, (group.size(), -1))
    return AllToAll.apply(message, group).movedim(0, 2).flatten(2, 3)
