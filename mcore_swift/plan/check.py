"""Refuse a layout that cannot run, with the reason and the nearest one that can."""

from collections.abc import Iterator
from itertools import product
from math import log2
from typing import Any

from ..errors import UserError
from .axes import FLAGS, axis_problems, length_multiple
from .layout import Layout
from .shape import ModelShape
from .stages import is_uneven
from .stages_check import stage_problems


def check_layout(
    layout: Layout, shape: ModelShape, args: Any, world_size: int | None = None
) -> list[UserError]:
    """Everything that keeps this layout from running; empty if nothing does.

    Each error names the flag, the reason and the nearest value that is possible. world_size: the actual number of
    processes, if the layout was made for another one.
    """
    world_size = world_size or layout.world_size
    stages = stage_problems(layout, shape, args)
    problems = [
        *_prediction_problems(shape, args),
        *axis_problems(layout, shape, args),
        *_pipeline_problems(layout),
        *stages,
        *_world_problems(layout, world_size),
    ]
    if problems:
        nearest = nearest_layout(layout, shape, args, world_size)
        # flags of an uneven pipeline are for a given number of stages: another layout is no remedy
        if nearest is not None and not (is_uneven(args) and problems == stages):
            last = problems[-1]
            hint = f"the nearest layout for this model on {_processes(world_size)} is {nearest}"
            problems[-1] = UserError(last.message, "; ".join(filter(None, [last.remedy, hint])))
        return problems
    return list(_batch_problems(layout, args))


def nearest_layout(layout: Layout, shape: ModelShape, args: Any, world_size: int) -> Layout | None:
    """The possible layout on `world_size` processes that changes the sizes least, or None.

    The distance between two sizes is the number of doublings from one to the other.
    """

    def distance(other: Layout) -> float:
        pairs = [(getattr(layout, axis) or 1, getattr(other, axis) or 1) for axis in FLAGS]
        return sum(abs(log2(old / new)) for old, new in pairs)

    def is_possible(other: Layout) -> bool:
        if is_uneven(args):
            has_stages = (other.pp, other.vpp) == (layout.pp, layout.vpp)
        else:
            has_stages = not [*_pipeline_problems(other), *stage_problems(other, shape, args)]
        return has_stages and not list(axis_problems(other, shape, args))

    possible = [candidate for candidate in _candidates(layout, shape, world_size) if is_possible(candidate)]
    # layouts that keep the batch size come first, whatever their distance
    fitting = [candidate for candidate in possible if not list(_batch_problems(candidate, args))]
    return min(fitting or possible, key=lambda other: (distance(other), str(other)), default=None)


def _candidates(layout: Layout, shape: ModelShape, world_size: int) -> Iterator[Layout]:
    """All ways to divide `world_size` processes along the axes that `layout` uses.

    They are interleaved, context-parallel or expert-parallel only if `layout` is. With experts, tensor parallelism
    implies sequence parallelism, without which megatron-core does not train experts.
    """
    divisors = _divisors(world_size)
    experts = [divisors if shape.is_moe and size > 1 else [1] for size in (layout.ep, layout.etp)]
    for tp, pp, cp in product(divisors, divisors, divisors if layout.cp > 1 else [1]):
        if world_size % (tp * pp * cp):
            continue
        dp = world_size // (tp * pp * cp)
        is_split = tp > 1 and (layout.sequence_parallel or shape.is_moe)
        for vpp in {None, 2, layout.vpp} if layout.vpp and pp > 1 else {None}:
            for ep, etp in product(*experts):
                if tp * cp * dp % (ep * etp) == 0:
                    yield Layout(
                        tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp, dp=dp, sequence_parallel=is_split
                    )


def notices(shape: ModelShape, args: Any) -> list[str]:
    """What a user should know about a layout that can run, one line each."""
    lines = []
    max_length = getattr(args, "max_length", None)
    if max_length and max_length > shape.max_position_embeddings:
        lines.append(
            f"--max_length {max_length} is more than the {shape.max_position_embeddings} positions the model "
            "was trained for (max_position_embeddings): quality falls off without rope scaling"
        )
    layout = Layout.from_args(args, 1)
    multiple = length_multiple(layout)
    if max_length and max_length % multiple:
        padded = -(-max_length // multiple) * multiple
        why = [f"--context_parallel_size {layout.cp} cuts it into {2 * layout.cp}"] if layout.cp > 1 else []
        if layout.sequence_parallel:
            why.append(f"--sequence_parallel cuts it among {layout.tp} processes")
        lines.append(
            f"--max_length {max_length} is no multiple of {multiple}, and {' and '.join(why)}: rows of that "
            f"length are padded to {padded}"
        )
    return lines


def _prediction_problems(shape: ModelShape, args: Any) -> Iterator[UserError]:
    asked, there = getattr(args, "mtp_num_layers", None), shape.num_mtp_layers
    if asked and asked != there:
        holds = (
            f"the model has {there} multi-token layers" if there else "the model has no multi-token layers"
        )
        yield UserError(
            f"--mtp_num_layers {asked}: {holds}",
            f"use --mtp_num_layers {there}, or 0 to leave them out"
            if there
            else "leave --mtp_num_layers out",
        )


def _pipeline_problems(layout: Layout) -> Iterator[UserError]:
    if layout.vpp and layout.pp == 1:
        yield UserError(
            f"--{FLAGS['vpp']} {layout.vpp} needs a pipeline, and --{FLAGS['pp']} is 1",
            f"leave --{FLAGS['vpp']} out, or set --{FLAGS['pp']} 2 or more",
        )


def _world_problems(layout: Layout, world_size: int) -> Iterator[UserError]:
    copy = layout.tp * layout.pp * layout.cp
    if world_size % copy == 0:
        return
    more = -(-world_size // copy) * copy
    counts = f"{world_size - world_size % copy} or {more}" if world_size > copy else str(more)
    what = "·".join(f"{name.upper()}{getattr(layout, name)}" for name in ("tp", "pp", "cp"))
    yield UserError(
        f"{_processes(world_size)} cannot be divided into copies of {copy} ({what})",
        f"start {counts} processes (NPROC_PER_NODE, NNODES)",
    )


def _batch_problems(layout: Layout, args: Any) -> Iterator[UserError]:
    total = getattr(args, "global_batch_size", None)
    if not total:  # not a training command
        return
    micro = args.micro_batch_size
    # an interleaved pipeline processes microbatches in groups of pp, and every group must be full
    group = layout.pp if layout.vpp else 1
    share = micro * layout.dp * group
    if total % share == 0:
        return
    below, above = total - total % share, total - total % share + share
    if total % (micro * layout.dp):
        reason = (
            f"is no multiple of {micro * layout.dp} (--micro_batch_size {micro} x {layout.dp} copies of the "
            "model)"
        )
    else:
        reason = (
            f"makes {total // (micro * layout.dp)} microbatches, and an interleaved pipeline of {group} "
            f"stages takes them {group} at a time"
        )
    values = f"{below} or {above}" if below else f"{above}"
    yield UserError(
        f"--global_batch_size {total} {reason}", f"the nearest possible is --global_batch_size {values}"
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
