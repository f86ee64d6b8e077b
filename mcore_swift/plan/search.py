"""The layouts of a model that fit into memory on a number of GPUs, ranked by estimated tokens per second."""

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import product
from types import SimpleNamespace
from typing import Any

from ..errors import UserError, raise_together
from .axes import FLAGS, axis_problems, length_multiple
from .check import check_layout
from .layout import Layout
from .memory import Cache, Memory, Recompute, Run, Stage, peak_memory, remembered, stages_of
from .shape import ModelShape
from .timing import Cluster, StepTime, step_time

_WIDEST_TP = 8  # beyond, matrices get narrow and every layer communicates over more links
_INTERLEAVINGS = (2, 3, 4, 5, 6, 8, 10)
_MICRO_BATCHES = (1, 2, 4, 8)
_SHORTEST_SHARE = 4096  # tokens that context parallelism leaves to a rank, unless it is asked for
_DEEPEST = 64


@dataclasses.dataclass(frozen=True)
class Wish:
    """What to plan for.

    run: everything but micro batch and recomputation. fixed: the sizes that the user gave, by axis (tp, pp, vpp, cp,
    ep, etp); vpp 1 means not interleaved. micro_batch_size, recompute: None leaves them to the search.
    """

    num_gpus: int
    global_batch_size: int
    run: Run
    fixed: Mapping[str, int] = dataclasses.field(default_factory=dict)
    micro_batch_size: int | None = None
    recompute: Recompute | None = None
    sequence_parallel: bool = True
    cp_comm_type: str | None = None

    def args(self) -> Any:
        """The wish in the form that the checks of a command line take."""
        return SimpleNamespace(
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size or 1,
            max_length=self.run.sequence_length,
            cp_comm_type=self.cp_comm_type,
        )


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to run. counts: decoder layers in each of the pp * vpp chunks of the pipeline."""

    layout: Layout
    run: Run
    counts: list[int]
    memory: Memory
    time: StepTime

    @property
    def is_even(self) -> bool:
        return len(set(self.counts)) == 1


@dataclasses.dataclass(frozen=True)
class Found:
    """The options that fit, fastest first, at most one per layout; and the one that needs least memory."""

    options: list[Option]
    smallest: Option


def search(
    shape: ModelShape, wish: Wish, cluster: Cluster, capacity_bytes: float, *, first_only: bool = False
) -> Found:
    """Try all layouts, or with first_only stop at the first that fits. capacity_bytes: memory that a GPU may use.

    Raises UserError if the fixed sizes leave no layout that could run.
    """
    best: dict[tuple[int, ...], Option] = {}
    smallest: tuple[float, Layout, Run] | None = None
    cache: Cache = {}
    recomputations = _recomputations(shape, wish)

    def option(layout: Layout, run: Run, memory: Memory) -> Option:
        time = step_time(shape, layout, run, stages(layout), cluster, cache)
        return Option(layout, run, spread_layers(shape.num_layers, layout), memory, time)

    def stages(layout: Layout) -> list[Stage]:
        def compute() -> list[Stage]:
            return stages_of(shape, layout, spread_layers(shape.num_layers, layout))

        return remembered(cache, ("stages", layout.pp, layout.vpp), compute)

    for layout in layouts(shape, wish, cluster):
        for plain in _runs(wish, layout):
            run = dataclasses.replace(plain, recompute=recomputations[-1])
            memory = peak_memory(shape, layout, run, stages(layout), cache)
            if smallest is None or memory.total < smallest[0]:
                smallest = memory.total, layout, run
            if memory.total > capacity_bytes:
                break  # larger micro batches do not fit either
            for recompute in recomputations:
                run = dataclasses.replace(plain, recompute=recompute)
                memory = peak_memory(shape, layout, run, stages(layout), cache)
                if memory.total <= capacity_bytes:
                    break  # recomputing more would only be slower
            key = (layout.tp, layout.pp, layout.cp, layout.ep, layout.etp)
            found = option(layout, run, memory)
            if key not in best or _speed(found) > _speed(best[key]):
                best[key] = found
        if best and first_only:
            break
    if smallest is None:
        raise_together(_impossible(shape, wish))
    _, layout, run = smallest
    least = option(layout, run, peak_memory(shape, layout, run, stages(layout), cache))
    return Found(sorted(best.values(), key=_speed, reverse=True), least)


def spread_layers(layers: int, layout: Layout) -> list[int]:
    """Decoder layers of each chunk in the model's order, as even as possible.

    Chunks with fewer layers are the last one, which has the loss, then the first one, which has the embedding.
    """
    chunks = layout.pp * (layout.vpp or 1)
    base, more = divmod(layers, chunks)
    middle_first = [*range(1, chunks - 1), 0, chunks - 1]
    return [base + (chunk in middle_first[:more]) for chunk in range(chunks)]


def _speed(option: Option) -> float:
    return option.time.tokens_per_s_per_gpu


def _runs(wish: Wish, layout: Layout) -> Iterator[Run]:
    """One run of a layout for every micro batch size that the global batch allows, smallest first."""
    for micro in [wish.micro_batch_size] if wish.micro_batch_size else _MICRO_BATCHES:
        count, rest = divmod(wish.global_batch_size, micro * layout.dp)
        if count and not rest and not (layout.vpp and count % layout.pp):
            yield dataclasses.replace(wish.run, micro_batch_size=micro, num_microbatches=count)


def layouts(shape: ModelShape, wish: Wish, cluster: Cluster) -> Iterator[Layout]:
    """All layouts on the wished-for GPUs that suit the model and the fixed sizes."""
    world, fixed, args = wish.num_gpus, wish.fixed, wish.args()
    divisors = [number for number in range(1, world + 1) if world % number == 0]
    widest = min(_WIDEST_TP, cluster.gpus_per_node)
    tps = [fixed["tp"]] if "tp" in fixed else [size for size in divisors if size <= widest]
    pps = [fixed["pp"]] if "pp" in fixed else [size for size in divisors if size <= _DEEPEST]
    cps = [fixed["cp"]] if "cp" in fixed else _context_sizes(wish)
    for tp, pp, cp in product(tps, pps, cps):
        if world % (tp * pp * cp) or pp > shape.num_layers:
            continue
        dp = world // (tp * pp * cp)
        is_split = tp > 1 and wish.sequence_parallel
        for ep, etp in _expert_sizes(shape, wish, tp, tp * cp * dp):
            plain = Layout(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, dp=dp, sequence_parallel=is_split)
            if next(axis_problems(plain, shape, args), None) is None:
                for vpp in _interleavings(shape, wish, pp):
                    yield dataclasses.replace(plain, vpp=vpp)


def _context_sizes(wish: Wish) -> list[int]:
    length = wish.run.sequence_length
    sizes = [1]
    while length % (4 * sizes[-1]) == 0 and length // (2 * sizes[-1]) >= _SHORTEST_SHARE:
        sizes.append(2 * sizes[-1])
    return sizes


def _expert_sizes(shape: ModelShape, wish: Wish, tp: int, stage: int) -> Iterator[tuple[int, int]]:
    fixed, experts = wish.fixed, shape.num_experts if shape.is_moe else 1
    etps = [fixed["etp"]] if "etp" in fixed else sorted({1, tp if shape.is_moe else 1})
    eps = [fixed["ep"]] if "ep" in fixed else [size for size in range(1, experts + 1) if experts % size == 0]
    for ep, etp in product(eps, etps):
        if stage % (ep * etp) == 0:
            yield ep, etp


def _interleavings(shape: ModelShape, wish: Wish, pp: int) -> Iterator[int | None]:
    if "vpp" in wish.fixed:
        vpp = wish.fixed["vpp"]
        if vpp == 1:
            yield None
        elif pp > 1 and pp * vpp <= shape.num_layers + 2:  # embedding and loss can have a stage each
            yield vpp
        return
    yield None
    is_even = shape.num_layers % pp == 0
    for vpp in _INTERLEAVINGS if pp > 1 else ():
        if pp * vpp <= shape.num_layers and (not is_even or shape.num_layers % (pp * vpp) == 0):
            yield vpp


def _recomputations(shape: ModelShape, wish: Wish) -> list[Recompute]:
    """The recomputations to try, from the fastest to the one that saves most memory."""
    if wish.recompute is not None:
        return [wish.recompute]
    modules = {"moe"} if shape.is_moe else {"mlp"}
    if shape.is_moe and shape.has_dense_layers:
        modules |= {"mlp"}
    return [
        Recompute("none", frozenset()),
        Recompute("selective", frozenset(modules)),
        Recompute("full", frozenset()),
    ]


def _impossible(shape: ModelShape, wish: Wish) -> list[UserError]:
    """Why there is no layout at all."""
    sizes = {axis: wish.fixed.get(axis, 1) for axis in FLAGS}
    sizes["vpp"] = sizes["vpp"] if sizes["vpp"] > 1 else None
    copy = sizes["tp"] * sizes["pp"] * sizes["cp"]
    layout = Layout(
        **sizes,
        dp=max(1, wish.num_gpus // copy),
        sequence_parallel=wish.sequence_parallel and sizes["tp"] > 1,
    )
    problems = check_layout(layout, shape, wish.args(), wish.num_gpus)
    if problems:
        return problems
    return [
        UserError(
            f"--global_batch_size {wish.global_batch_size} on {wish.num_gpus} GPUs leaves no layout that could run",
            f"give a multiple of {wish.num_gpus}, or fix fewer sizes (rows are padded to multiples of "
            f"{length_multiple(layout)} tokens)",
        )
    ]
