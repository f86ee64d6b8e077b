"""Refuse a layout that cannot run, with the reason and the nearest one that can."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Batching:
    """What a layout is checked against beside the model."""

    micro_batch_size: int
    global_batch_size: int
    group_size: int | None = None  # microbatches a chunk of an interleaved stage runs in a row; None: pp
    first_layers: int | None = None
    last_layers: int | None = None
    embedding_counts: bool = False
    loss_counts: bool = False
    custom_stages: bool = False

    @classmethod
    def from_args(cls, args: Any) -> "Batching":
        return cls(
            micro_batch_size=getattr(args, "micro_batch_size", 1),
            global_batch_size=getattr(args, "global_batch_size", 0),
            group_size=getattr(args, "microbatch_group_size_per_vp_stage", None),
            first_layers=getattr(args, "decoder_first_pipeline_num_layers", None),
            last_layers=getattr(args, "decoder_last_pipeline_num_layers", None),
            embedding_counts=bool(getattr(args, "account_for_embedding_in_pipeline_split", False)),
            loss_counts=bool(getattr(args, "account_for_loss_in_pipeline_split", False)),
            custom_stages=getattr(args, "pipeline_model_parallel_layout", None) is not None,
        )


def check_layout(
    layout: Layout, shape: ModelShape, args: Any, world_size: int | None = None
) -> list[UserError]:
    """Everything that keeps this layout from running; empty if it can.

    Each error names the flag, the reason and the nearest value that is possible. world_size: the processes
    there are, if the layout was made for another number of them.
    """
    batching = Batching.from_args(args)
    world_size = world_size or layout.world_size
    problems = [
        *_tensor_problems(layout, shape),
        *_stage_problems(layout, shape, batching),
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
    return list(_batch_problems(layout, batching))


def nearest_layout(layout: Layout, shape: ModelShape, args: Any, world_size: int) -> Layout | None:
    """The possible layout on `world_size` processes that changes the sizes least, or None.

    The distance of two sizes is how often one must be doubled to reach the other.
    """
    batching = Batching.from_args(args)

    def distance(other: Layout) -> float:
        pairs = [(layout.tp, other.tp), (layout.pp, other.pp), (layout.cp, other.cp)]
        pairs.append((layout.vpp or 1, other.vpp or 1))
        return sum(abs(log2(old / new)) for old, new in pairs)

    candidates = []
    divisors = _divisors(world_size)
    for tp, pp, cp in product(divisors, divisors, sorted({1, layout.cp})):
        if world_size % (tp * pp * cp):
            continue
        for vpp in {None, layout.vpp, 2} if layout.vpp and pp > 1 else {None}:
            candidate = Layout(
                tp=tp,
                pp=pp,
                vpp=vpp,
                cp=cp,
                ep=1,
                etp=1,
                dp=world_size // (tp * pp * cp),
                sequence_parallel=layout.sequence_parallel and tp > 1,
            )
            candidates.append(candidate)
    possible = [
        candidate
        for candidate in candidates
        if not any(True for _ in _tensor_problems(candidate, shape))
        and not any(True for _ in _stage_problems(candidate, shape, batching))
    ]
    return min(possible, key=lambda other: (distance(other), str(other)), default=None)


def notices(layout: Layout, shape: ModelShape, args: Any) -> list[str]:
    """What a user should know of a layout that runs, one line each."""
    lines = []
    if getattr(args, "sequence_parallel", False) and layout.tp == 1:
        lines.append("--sequence_parallel is off: without tensor parallelism there is nothing to split")
    if getattr(args, "virtual_pipeline_model_parallel_size", None) == 1:
        lines.append("--virtual_pipeline_model_parallel_size 1 means no interleaving")
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


def _stage_problems(layout: Layout, shape: ModelShape, batching: Batching) -> Iterator[UserError]:
    if layout.pp == 1:
        if layout.vpp:
            yield UserError(
                f"--{_FLAGS['vpp']} {layout.vpp} needs a pipeline, and --{_FLAGS['pp']} is 1",
                f"leave --{_FLAGS['vpp']} out, or set --{_FLAGS['pp']} 2 or more",
            )
        return
    if batching.custom_stages:  # the string says which layers each stage has
        return
    if batching.first_layers is not None or batching.last_layers is not None:
        yield from _uneven_stage_problems(layout, shape, batching)
        return
    slots = shape.num_layers + batching.embedding_counts + batching.loss_counts
    counted = f"{shape.num_layers} layers"
    if slots != shape.num_layers:
        counted += f" (with embedding and loss as asked: {slots})"
    if slots % layout.pp:
        nearest = _nearest(layout.pp, lambda pp: slots % pp == 0, slots)
        yield UserError(
            f"--{_FLAGS['pp']} {layout.pp} does not divide the model's {counted}",
            f"the nearest possible is --{_FLAGS['pp']} {nearest}; or give the first or the last stage another "
            "number with --decoder_first_pipeline_num_layers or --decoder_last_pipeline_num_layers",
        )
    elif slots // layout.pp % (layout.vpp or 1):
        each = slots // layout.pp
        yield _chunk_problem(layout.vpp, f"the {each} layers of each stage ({counted} in {layout.pp})", each)


def _uneven_stage_problems(layout: Layout, shape: ModelShape, batching: Batching) -> Iterator[UserError]:
    """Layers of the first and last stage are given; the stages between share the rest evenly."""
    given = [
        (flag, layers)
        for flag, layers in (
            ("decoder_first_pipeline_num_layers", batching.first_layers),
            ("decoder_last_pipeline_num_layers", batching.last_layers),
        )
        if layers is not None
    ]
    text = " and ".join(f"--{flag} {layers}" for flag, layers in given)
    rest, stages = shape.num_layers - sum(layers for _, layers in given), layout.pp - len(given)
    if rest < stages or (stages == 0 and rest) or (stages and rest % stages):
        yield UserError(
            f"{text} leave {rest} of {shape.num_layers} layers, which {stages} other stages cannot share evenly",
            f"choose the number so that the rest is a multiple of {stages}"
            if stages
            else f"make them add up to {shape.num_layers}",
        )
        return
    chunks = layout.vpp or 1
    for flag, layers in given:
        if layers % chunks:
            yield _chunk_problem(layout.vpp, f"--{flag} {layers}", layers)
    if stages and rest // stages % chunks:
        yield _chunk_problem(layout.vpp, f"the {rest // stages} layers of each stage between", rest // stages)


def _chunk_problem(vpp: int | None, what: str, layers: int) -> UserError:
    nearest = _nearest(vpp or 1, lambda chunks: layers % chunks == 0, layers)
    remedy = f"the nearest possible is --{_FLAGS['vpp']} {nearest}"
    if nearest == 1:
        remedy = f"leave --{_FLAGS['vpp']} out"
    return UserError(f"--{_FLAGS['vpp']} {vpp} does not divide {what}", remedy)


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


def _batch_problems(layout: Layout, batching: Batching) -> Iterator[UserError]:
    micro, total = batching.micro_batch_size, batching.global_batch_size
    if not total:  # not a training command
        return
    share = micro * layout.dp
    # an interleaved pipeline hands microbatches on in groups of pp or more, and the last group may not be smaller
    group = (batching.group_size or layout.pp) if layout.vpp else 1
    if layout.vpp and group < layout.pp:
        yield UserError(
            f"--microbatch_group_size_per_vp_stage {group} is less than --{_FLAGS['pp']} {layout.pp}",
            f"the nearest possible is {layout.pp}",
        )
        return

    def runs(size: int) -> bool:
        count, remainder = divmod(size, share)
        if size < 1 or remainder:
            return False
        return not layout.vpp or (count >= group and (count % group == 0 or count % group >= layout.pp))

    if runs(total):
        return
    above = next(size for size in range(total, total + 2 * share * (group + layout.pp) + 1) if runs(size))
    below = next((size for size in range(total, 0, -1) if runs(size)), None)
    values = " or ".join(str(size) for size in (below, above) if size)
    if total % share:
        reason = f"is no multiple of {share} (micro_batch_size {micro} x {layout.dp} data-parallel ranks)"
    else:
        reason = (
            f"gives {total // share} microbatches a step, and an interleaved pipeline of {layout.pp} stages "
            f"takes them in groups of {group}"
        )
    yield UserError(f"--global_batch_size {total} {reason}", f"the nearest possible is {values}")


def _nearest(value: int, is_possible: Callable[[int], bool], limit: int) -> int:
    """The possible number closest to `value`, the smaller one of two; 1 is always possible."""
    possible: Iterable[int] = (number for number in range(1, limit + 1) if is_possible(number))
    return min(possible, key=lambda number: (abs(number - value), number))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
