"""One pass of microbatches through the pipeline: batch in, loss out, gradients in their buffers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_model_config
from torch import Tensor

from mcore_swift.data.batch import Batch
from mcore_swift.engines.megatron.context_parallel import (
    BY_TOKEN,
    of_whole_rows,
    segments_of,
    take_part,
    whole_rows,
)
from mcore_swift.models.packing import Packing
from mcore_swift.models.segments import Segments
from mcore_swift.models.targets import Targets, learnt_in, look_ahead
from mcore_swift.objectives.base import Objective


@dataclass
class Microbatch:
    """This rank's part of a batch on the device, with what every model chunk takes of it.

    segments: how the whole rows are made up and which tokens of them this rank holds. targets: the positions with a
    loss, and what multi-token layers are given and asked.
    """

    batch: Batch
    segments: Segments
    packing: Packing | None
    targets: Targets


def to_device(batch: Batch, device: torch.device, *, thd: bool, depth: int = 0) -> Microbatch:
    """This rank's part of a batch that all context-parallel ranks have whole.

    thd: pack for Transformer Engine's attention rather than for ours. depth: multi-token layers of the model.
    """
    segments = segments_of(batch, device)
    packing = Packing.of(batch.cu_seqlens, segments, thd=thd) if batch.cu_seqlens is not None else None
    ahead = look_ahead(batch.input_ids, batch.labels, batch.loss_mask, batch.cu_seqlens, depth)
    if segments.size > 1:  # whole rows know what comes next, a rank's part of them does not
        ahead = [step.part(segments.held_by(segments.rank)) for step in ahead]
    batch = take_part(batch, segments)
    # on the host: no wait for the device
    targets = Targets(learnt_in(batch.loss_mask), ahead)
    tensors = {
        name: getattr(batch, name).to(device, non_blocking=True)
        for name in BY_TOKEN
        if getattr(batch, name) is not None
    }
    return Microbatch(replace(batch, **tensors), segments, packing, targets.to(device))


def run_microbatches(
    model: list[Any],
    microbatches: Sequence[Microbatch],
    objective: Objective,
    *,
    forward_only: bool,
    ahead_weight: float = 0.0,
) -> Tensor:
    """Forward (and backward) over the microbatches of one step of this rank.

    Returns fp64 `[2 + metrics + 2 depths]`: the sums of loss, count and each metric over the microbatches, then sum
    and count of each multi-token layer's loss, on the last pipeline stage; zeros elsewhere. Gradients, when asked
    for, are complete when it returns: summed over data parallel ranks and divided by the global count. To them the
    multi-token layers' mean is added with the weight `ahead_weight`.
    """
    b, s = _whole_shape(microbatches[0])
    pass_through = get_forward_backward_func()
    reports = pass_through(
        forward_step_func=partial(_forward_step, objective=objective, ahead_weight=ahead_weight),
        data_iterator=[iter(microbatches) for _ in model] if len(model) > 1 else iter(microbatches),
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(microbatches),
        seq_length=s,
        micro_batch_size=b,
        forward_only=forward_only,
    )
    if reports:
        return torch.stack(reports).sum(dim=0)
    reported = 2 + len(objective.metrics) + 2 * len(microbatches[0].targets.ahead)
    return torch.zeros(reported, dtype=torch.float64, device=microbatches[0].batch.input_ids.device)


@torch.no_grad()
def run_logits(model: list[Any], microbatches: Sequence[Microbatch], vocab_size: int) -> list[Tensor]:
    """Logits `[b, s, vocab_size]` of each microbatch, on all tensor-parallel ranks of the last pipeline stage.

    Other stages get an empty list. For checks: a whole row of logits is large.
    """
    b, s = _whole_shape(microbatches[0])
    outputs = get_forward_backward_func()(
        forward_step_func=_logits_step,
        data_iterator=[iter(microbatches) for _ in model] if len(model) > 1 else iter(microbatches),
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(microbatches),
        seq_length=s,
        micro_batch_size=b,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return [
        whole_rows(gather_from_tensor_model_parallel_region(shard)[..., :vocab_size], microbatch.segments)
        for shard, microbatch in zip(outputs, microbatches, strict=False)  # no outputs on other stages
    ]


def _whole_shape(microbatch: Microbatch) -> tuple[int, int]:
    """Rows and tokens of a row over all context-parallel ranks; the schedules divide the messages' size."""
    return microbatch.batch.input_ids.size(0), microbatch.segments.total


def _logits_step(data: Any, model: Any) -> tuple[Tensor, Callable[..., Tensor]]:
    return _forward(next(data), model, labels=None), lambda logits, non_loss_data: logits


def _forward(microbatch: Microbatch, model: Any, labels: Tensor | None) -> Tensor:
    return model(
        input_ids=microbatch.batch.input_ids,
        position_ids=microbatch.batch.position_ids,
        attention_mask=None,
        labels=labels,
        packed_seq_params=microbatch.packing,
        loss_mask=microbatch.targets,
        padding_mask=microbatch.batch.padding,
    )


def _forward_step(
    data: Any, model: Any, objective: Objective, ahead_weight: float
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    microbatch: Microbatch = next(data)
    output = _forward(microbatch, model, microbatch.batch.labels)
    by_microbatch = not get_model_config(model).calculate_per_token_loss
    return output, partial(
        _loss,
        microbatch=microbatch,
        objective=objective,
        ahead_weight=ahead_weight,
        by_microbatch=by_microbatch,
    )


def _loss(
    losses: Tensor, microbatch: Microbatch, objective: Objective, ahead_weight: float, by_microbatch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What megatron-core's schedules take: a loss sum, its count, and a report of ours.

    losses: `[1 + depths, b, s]`. As in DeepSeek-V3's formula (arXiv:2412.19437, 25) what is predicted further ahead
    is divided by the same count as the rest, though the last tokens of a sample have nothing ahead of them.
    by_microbatch: the schedules divide this sum by this count, and average the gradients over data- and
    context-parallel ranks; else all sums are divided by all counts.
    """
    token_nll, *further = losses.float()
    loss = objective(token_nll, microbatch.batch)
    report = [loss.sum, loss.count, *(loss.metrics[name] for name in objective.metrics)]
    total = loss.sum
    for nll, ahead in zip(further, microbatch.targets.ahead, strict=True):
        ahead_loss = (nll * ahead.loss_mask).sum()
        total = total + ahead_weight / len(further) * ahead_loss
        report += [ahead_loss, (ahead.loss_mask > 0).sum()]
    # The schedules add the counts into an int32 tensor.
    scaled, count = total, loss.count.detach().to(torch.int32)
    if by_microbatch:
        scaled, count = of_whole_rows(scaled, count)
    return scaled, count, torch.stack([value.detach().double() for value in report])


def reduce_over_ranks(sums: Tensor, tallies: Tensor | None = None) -> tuple[list[float], Tensor | None]:
    """Sums of this rank's microbatches -> sums of the whole step, on every rank. Collective over all ranks.

    tallies: fp64, any shape; what every rank counts of its own and is to be summed over all of them too.
    """
    # All tensor-parallel ranks of the last stage hold the same sums; one of them speaks.
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        sums = torch.zeros_like(sums)
    if tallies is None:
        dist.all_reduce(sums)
        return sums.tolist(), None
    both = torch.cat([sums, tallies.flatten()])
    dist.all_reduce(both)
    return both[: len(sums)].tolist(), both[len(sums) :].view_as(tallies)
