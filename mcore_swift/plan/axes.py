"""What tensor, context and expert parallelism require of a model; for pipelines see `stages_check`."""

from collections.abc import Callable, Iterable, Iterator
from math import gcd
from typing import Any

from ..errors import UserError
from .layout import Layout
from .shape import ModelShape

FLAGS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


def axis_problems(layout: Layout, shape: ModelShape, args: Any) -> Iterator[UserError]:
    """An error for each reason why this layout cannot divide the model, with the nearest size that is possible."""
    yield from _tensor_problems(layout, shape)
    yield from _context_problems(layout, shape, args)
    if shape.is_moe:
        yield from _expert_problems(layout, shape, args)
    else:
        yield from _no_expert_problems(layout)


def length_multiple(layout: Layout) -> int:
    """Number of tokens that every row's length is padded to a multiple of.

    Zigzag context parallelism cuts a sequence into 2 * cp chunks; sequence parallelism divides each rank's part among
    the tensor-parallel ranks.
    """
    return layout.segment_multiple * (layout.tp if layout.sequence_parallel else 1)


def _tensor_problems(layout: Layout, shape: ModelShape) -> Iterator[UserError]:
    if layout.tp == 1:
        return
    sizes = {"num_attention_heads": shape.num_heads}
    if not shape.is_mla:
        sizes["num_key_value_heads"] = shape.num_query_groups
    if shape.has_dense_layers:
        sizes["intermediate_size"] = shape.ffn_hidden_size
    if shape.shared_ffn_hidden_size:
        sizes["width of the shared experts"] = shape.shared_ffn_hidden_size
    bad = {name: size for name, size in sizes.items() if size % layout.tp}
    if bad:
        common = gcd(*sizes.values())
        listed = ", ".join(f"{name} {size}" for name, size in bad.items())
        yield UserError(
            f"--{FLAGS['tp']} {layout.tp} does not divide the model's {listed}",
            _nearest_flag("tp", layout.tp, lambda tp: common % tp == 0, common),
        )


def _context_problems(layout: Layout, shape: ModelShape, args: Any) -> Iterator[UserError]:
    """All-to-all (Ulysses, arXiv:2309.14509) gives each context-parallel rank a share of the heads.

    Key/value heads are repeated where there are too few.
    """
    kinds = getattr(args, "cp_comm_type", None) or []
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if layout.cp == 1 or "a2a" not in kinds or shape.num_heads % layout.tp:
        return
    per_rank = shape.num_heads // layout.tp
    if per_rank % layout.cp:
        nearest = nearest_size(layout.cp, lambda cp: per_rank % cp == 0, per_rank)
        yield UserError(
            f"--cp_comm_type a2a shares the heads of a rank among --{FLAGS['cp']} {layout.cp} processes, and that "
            f"does not divide num_attention_heads {shape.num_heads} / TP {layout.tp} = {per_rank}",
            f"the nearest possible is --{FLAGS['cp']} {nearest}; the other ways of --cp_comm_type share tokens only",
        )


def _no_expert_problems(layout: Layout) -> Iterator[UserError]:
    for axis in ("ep", "etp"):
        if getattr(layout, axis) > 1:
            flag = FLAGS[axis]
            yield UserError(
                f"--{flag} {getattr(layout, axis)}: this model has no experts", f"leave --{flag} out"
            )


def _expert_problems(layout: Layout, shape: ModelShape, args: Any) -> Iterator[UserError]:
    ep, etp, experts, width = layout.ep, layout.etp, shape.num_experts, shape.moe_ffn_hidden_size
    stage = layout.tp * layout.cp * layout.dp
    if experts % ep:
        yield UserError(
            f"--{FLAGS['ep']} {ep} does not divide the model's {experts} experts",
            _nearest_flag("ep", ep, lambda size: experts % size == stage % size == 0, stage),
        )
    if width % etp:
        yield UserError(
            f"--{FLAGS['etp']} {etp} does not divide the {width} wide experts",
            _nearest_flag("etp", etp, lambda size: width % size == stage % size == 0, stage),
        )
    if experts % ep == 0 and width % etp == 0 and stage % (ep * etp):
        yield UserError(
            f"--{FLAGS['ep']} {ep} x --{FLAGS['etp']} {etp} = {ep * etp} does not divide the {stage} processes of "
            f"a pipeline stage (TP{layout.tp} x CP{layout.cp} x DP{layout.dp})",
            _nearest_flag(
                "ep", ep, lambda size: experts % size == 0 and stage % (size * etp) == 0, min(experts, stage)
            ),
        )
    yield from _capacity_problems(shape, args)
    if layout.tp > 1 and not layout.sequence_parallel and is_training(args):
        yield UserError(
            f"--{FLAGS['tp']} {layout.tp} with experts needs sequence parallelism: megatron-core refuses to train "
            "without",
            "add --sequence_parallel true",
        )


def _capacity_problems(shape: ModelShape, args: Any) -> Iterator[UserError]:
    """Refuse padding to a capacity above the number of tokens: megatron-core's dispatcher fails on it in step 1."""
    factor, seen = getattr(args, "moe_expert_capacity_factor", None), shape.num_experts_per_token
    padded = getattr(args, "moe_pad_expert_input_to_capacity", False)
    if factor and padded and factor * seen > shape.num_experts:
        most = shape.num_experts * 100 // seen / 100  # rounded down
        yield UserError(
            f"--moe_expert_capacity_factor {factor:g}: pads what each of {shape.num_experts} experts takes beyond all "
            f"tokens there are, of which each goes to {seen}",
            f"the nearest possible is --moe_expert_capacity_factor {most:g}",
        )


def is_training(args: Any) -> bool:
    """Whether these are the arguments of a training command, which is one with a batch size."""
    return bool(getattr(args, "global_batch_size", None))


def nearest_size(value: int, is_possible: Callable[[int], bool], limit: int) -> int:
    """The possible number up to `limit` that is closest to `value`, the smaller one on a tie; 1 if there is none."""
    possible: Iterable[int] = (number for number in range(1, limit + 1) if is_possible(number))
    return min(possible, key=lambda number: (abs(number - value), number), default=1)


def _nearest_flag(axis: str, value: int, is_possible: Callable[[int], bool], limit: int) -> str:
    return f"the nearest possible is --{FLAGS[axis]} {nearest_size(value, is_possible, limit)}"
