"""Context parallelism: every rank gets whole batches and keeps its part of each row."""

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mcore_swift.data.batch import Batch
from mcore_swift.models.segments import Segments, one_segment

BY_TOKEN = ("input_ids", "labels", "loss_mask", "position_ids", "padding")
"""Fields of a batch with one value per token, `[b, s]`; some may be None."""


def segments_of(batch: Batch, device: torch.device) -> Segments:
    """The segments of the batch's rows, and which of their tokens this rank holds.

    Raises ValueError for lengths that cannot be cut into chunks: the data room pads to `Layout.segment_multiple`.
    """
    size = parallel_state.get_context_parallel_world_size()
    rank = parallel_state.get_context_parallel_rank()
    if batch.cu_seqlens is None:
        return one_segment(batch.input_ids.size(1), device, size, rank)
    tokens = None
    if size > 1 and batch.padding is not None:
        before = torch.nn.functional.pad((~batch.padding[0]).cumsum(0), (1, 0))
        tokens = before[batch.cu_seqlens].diff().tolist()
    return Segments(batch.cu_seqlens.diff().tolist(), device, size, rank, tokens)


def take_part(batch: Batch, segments: Segments) -> Batch:
    """A batch on the host with only this rank's tokens, `[b, s / CP]`; cu_seqlens still describe whole rows."""
    if segments.size == 1:
        return batch
    mine = segments.held_by(segments.rank)
    parts = {name: getattr(batch, name)[:, mine] for name in BY_TOKEN if getattr(batch, name) is not None}
    return replace(batch, **parts)


def whole_rows(part: Tensor, segments: Segments) -> Tensor:
    """Gather the parts of all ranks, `[b, s / CP, ...]`, into whole rows `[b, s, ...]`. No gradient."""
    if segments.size == 1:
        return part
    by_token = part.transpose(0, 1).contiguous()
    ranks = by_token.new_empty(segments.size * by_token.size(0), *by_token.shape[1:])
    dist.all_gather_into_tensor(ranks, by_token, group=parallel_state.get_context_parallel_group())
    return ranks.index_select(0, segments.natural).transpose(0, 1)


def of_whole_rows(loss: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Convert a rank's sum and count to ones whose quotient, averaged over ranks, is the mean over whole rows."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return loss, count
    count = count.clone()
    dist.all_reduce(count, group=parallel_state.get_context_parallel_group())
    return loss * size, count
