"""Refuse a layout that cannot run, with the reason and the nearest one that can."""

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from math import gcd, log2
from typing import Any

from ..errors import UserError
from .layout import Layout
from .shape import ModelShape

_FLAGS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
}


def check_layout(
    layout: Layout, shape: ModelShape, args: Any, world_size: int | None = None
) -> list[UserError]:
    """Everything that keeps this layout from running; empty if it can.

    Each error names the flag, the reason and the nearest value that is possible. world_size: the processes
    there are, if the layout was made for another number of them.
    """
    world_size = world_size or layout.world_size
    problems = [
        *_tensor_problems(layout, shape),
        *_stage_problems(layout, shape),
        *_expert_problems(layout),
        *_world_problems(layout, world_size),
    ]
    if problems:
        nearest = nearest_layout(layout, shape, args, world_size)
        if nearest is not None:
            last = problems[-1]
            hint = f"the nearest layout for this model on {_processes(world_size)} is {nearest}"
            problems[-1] = UserError(last.message, "; ".join(filter(None, [last.remedy, hint])))
        return problems
    return list(_batch_problems(layout, args))


def nearest_layout(layout: Layout, shape: ModelShape, args: Any, world_size: int) -> Layout | None:
    """The possible layout on `world_size` processes that changes the sizes least, or None.

    The distance of two sizes is how often one must be doubled to reach the other.
    """

    def distance(other: Layout) -> float:
        pairs = [(layout.tp, other.tp), (layout.pp, other.pp), (layout.cp, other.cp)]
        pairs.append((layout.vpp or 1, other.vpp or 1))
        return sum(abs(log2(old / new)) for old, new in pairs)

    possible = [
        candidate
        for candidate in _candidates(layout, world_size)
        if not [*_tensor_problems(candidate, shape), *_stage_problems(candidate, shape)]
    ]
    # one that needs no other batch size comes first, however far
    fitting = [candidate for candidate in possible if not list(_batch_problems(candidate, args))]
    return min(fitting or possible, key=lambda other: (distance(other), str(other)), default=None)


def _candidates(layout: Layout, world_size: int) -> Iterator[Layout]:
    """All ways to divide `world_size` processes, interleaved only if `layout` is."""
    divisors = _divisors(world_size)
    for tp, pp, cp in product(divisors, divisors, {1, layout.cp}):
        if world_size % (tp * pp * cp):
            continue
        for vpp in {None, 2, layout.vpp} if layout.vpp and pp > 1 else {None}:
            is_split = layout.sequence_parallel and tp > 1
            yield Layout(
                tp=tp, pp=pp, vpp=vpp, cp=cp, dp=world_size // (tp * pp * cp), sequence_parallel=is_split
            )


def notices(shape: ModelShape, args: Any) -> list[str]:
    """What a user should know of a layout that runs, one line each."""
    lines = []
    max_length = getattr(args, "max_length", None)
    if max_length and max_length > shape.max_position_embeddings:
        lines.append(
            f"--max_length {max_length} is more than the {shape.max_position_embeddings} positions the model "
            "was trained for (max_position_embeddings): quality falls off without rope scaling"
        )
    return lines


def _tensor_problems(layout: Layout, shape: ModelShape) -> Iterator[UserError]:
    if layout.tp == 1:
        return
    sizes = {
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_query_groups,
        "intermediate_size": shape.ffn_hidden_size,
    }
    bad = {name: size for name, size in sizes.items() if size % layout.tp}
    if not bad:
        return
    common = gcd(*sizes.values())
    listed = ", ".join(f"{name} {size}" for name, size in bad.items())
    nearest = _nearest(layout.tp, lambda tp: common % tp == 0, common)
    yield UserError(
        f"--{_FLAGS['tp']} {layout.tp} does not divide the model's {listed}",
        f"the nearest possible is --{_FLAGS['tp']} {nearest}",
    )


def _stage_problems(layout: Layout, shape: ModelShape) -> Iterator[UserError]:
    if layout.pp == 1:
        if layout.vpp:
            yield UserError(
                f"--{_FLAGS['vpp']} {layout.vpp} needs a pipeline, and --{_FLAGS['pp']} is 1",
                f"leave --{_FLAGS['vpp']} out, or set --{_FLAGS['pp']} 2 or more",
            )
        return
    layers = shape.num_layers
    if layers % layout.pp:
        nearest = _nearest(layout.pp, lambda pp: layers % pp == 0, layers)
        yield UserError(
            f"--{_FLAGS['pp']} {layout.pp} does not divide the model's {layers} layers",
            f"the nearest possible is --{_FLAGS['pp']} {nearest}",
        )
    elif layout.vpp and layers // layout.pp % layout.vpp:
        each = layers // layout.pp
        nearest = _nearest(layout.vpp, lambda chunks: each % chunks == 0, each)
        yield UserError(
            f"--{_FLAGS['vpp']} {layout.vpp} does not divide the {each} layers of each pipeline stage",
            f"the nearest possible is --{_FLAGS['vpp']} {nearest}"
            if nearest > 1
            else f"leave --{_FLAGS['vpp']} out",
        )


def _expert_problems(layout: Layout) -> Iterator[UserError]:
    for size, flag in (
        (layout.ep, "expert_model_parallel_size"),
        (layout.etp, "expert_tensor_parallel_size"),
    ):
        if size > 1:
            yield UserError(f"--{flag} {size}: this model has no experts", f"leave --{flag} out")


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
    # an interleaved pipeline hands microbatches on in groups of pp, and every group must be full
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


def _nearest(value: int, is_possible: Callable[[int], bool], limit: int) -> int:
    """The possible number closest to `value`, the smaller one of two; 1 is always possible."""
    possible: Iterable[int] = (number for number in range(1, limit + 1) if is_possible(number))
    return min(possible, key=lambda number: (abs(number - value), number))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
