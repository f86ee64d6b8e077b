"""How the processes of a run are divided among the kinds of parallelism."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

_DENSE_ORDER = ("tp", "cp", "dp", "pp")
_EXPERT_ORDER = ("etp", "ep", "edp", "pp")
_ALIASES = {
    "mp": ("tp", "pp"),  # the processes that hold one copy of the model
    "dp_cp": ("cp", "dp"),  # the processes that share gradients of dense parameters
    "tp_cp": ("tp", "cp"),
}


@dataclass(frozen=True)
class Layout:
    """Sizes of every kind of parallelism, as megatron-core defines them.

    tp: tensor parallel; pp: pipeline stages; vpp: model chunks of each stage (None: not interleaved);
    cp: context parallel; ep: expert parallel; etp: tensor parallel of experts; dp: copies of the model, not
    counting cp; sequence_parallel: the activations between tensor-parallel regions are split too.

    Ranks are numbered in megatron-core's order tp-cp-ep-dp-pp, the first varying fastest:
    `rank = t + tp * (c + cp * (d + dp * p))`. For expert layers, the same processes are divided as
    `rank = t' + etp * (e + ep * (d' + edp * p))`: the pipeline stages are the same, only the processes within a
    stage are divided differently.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    sequence_parallel: bool = False

    @classmethod
    def from_args(cls, args: Any, world_size: int) -> Self:
        """The layout that the flags ask for on `world_size` processes.

        dp is the remaining factor, rounded down and at least 1. If the sizes do not divide `world_size`, that of the
        result differs from the one given, and `check_layout` says why. Sequence parallelism is turned off without
        tensor parallelism, since there is nothing to split, as in ms-swift.
        """
        tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
        cp = getattr(args, "context_parallel_size", 1)
        vpp = getattr(args, "virtual_pipeline_model_parallel_size", None)
        return cls(
            tp=tp,
            pp=pp,
            vpp=vpp if vpp and vpp > 1 else None,
            cp=cp,
            ep=getattr(args, "expert_model_parallel_size", 1),
            etp=getattr(args, "expert_tensor_parallel_size", 1),
            dp=max(1, world_size // (tp * pp * cp)),
            sequence_parallel=bool(getattr(args, "sequence_parallel", False)) and tp > 1,
        )

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the dense weights: tp * pp."""
        return self.tp * self.pp

    @property
    def segment_multiple(self) -> int:
        """Each sample of a row is padded to a multiple of this: two chunks per context-parallel rank."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def edp(self) -> int:
        """Copies of each expert. Raises ValueError where tp * cp * dp is no multiple of etp * ep."""
        stage = self.tp * self.cp * self.dp
        if stage % (self.etp * self.ep):
            raise ValueError(f"a stage of {stage} processes is no multiple of ETP {self.etp} x EP {self.ep}")
        return stage // (self.etp * self.ep)

    def groups(self, kind: str) -> list[list[int]]:
        """Ranks of every group of one kind; each rank is in exactly one of them.

        kind: tp, cp, dp, pp; etp, ep, edp for expert layers; mp (tp and pp), dp_cp, tp_cp.
        Raises KeyError for another name, ValueError where expert sizes do not divide a stage.
        """
        members = _ALIASES.get(kind, (kind,))
        order = _EXPERT_ORDER if set(members) & {"etp", "ep", "edp"} else _DENSE_ORDER
        if not set(members) <= set(order):
            raise KeyError(kind)
        sizes = [getattr(self, name) for name in order]
        axes = dict(zip(order, zip(sizes, _strides(sizes), strict=True), strict=True))
        inside = [axis for name, axis in axes.items() if name in members]
        outside = [axis for name, axis in axes.items() if name not in members]
        return [[base + offset for offset in _offsets(inside)] for base in _offsets(outside)]

    def group_of(self, kind: str, rank: int) -> list[int]:
        """Ranks of the group of this kind that contains `rank`. Raises as `groups` does."""
        return next(group for group in self.groups(kind) if rank in group)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Index of a rank along tp, cp, dp and pp. Raises IndexError for a rank outside the layout."""
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} of {self.world_size} processes")
        sizes = [getattr(self, name) for name in _DENSE_ORDER]
        return {
            name: rank // stride % size
            for name, size, stride in zip(_DENSE_ORDER, sizes, _strides(sizes), strict=True)
        }

    def __str__(self) -> str:
        """All sizes above 1, such as 'TP2·PP2·VPP2·SP·DP2'; 'DP1' for a single process."""
        parts = [
            f"{name.upper()}{size}"
            for name in ("tp", "pp", "vpp", "cp", "ep", "etp")
            if (size := getattr(self, name) or 1) > 1
        ]
        if self.sequence_parallel:
            parts.append("SP")
        if self.dp > 1 or not parts:
            parts.append(f"DP{self.dp}")
        return "·".join(parts)


def _strides(sizes: Sequence[int]) -> list[int]:
    strides = [1]
    for size in sizes[:-1]:
        strides.append(strides[-1] * size)
    return strides


def _offsets(axes: Sequence[tuple[int, int]]) -> list[int]:
    """Sums of index * stride over all indices, the first axis varying fastest."""
    slowest_first = [range(0, size * stride, stride) for size, stride in reversed(axes)]
    return [sum(steps) for steps in product(*slowest_first)]
