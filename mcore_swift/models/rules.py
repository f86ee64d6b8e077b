"""Weight rules: which values of a megatron-core tensor are in which Hugging Face tensors.

A rule describes *whole* tensors, as if nothing were sharded, and answers one question: for a region of the
megatron-core tensor, which region of which HF tensor holds the same values? The answer is a list of `Block`s.
Copying blocks one way loads a checkpoint, the other way exports it, so export inverts load by construction.
megatron-core knows where a rank's shard lies in the whole tensor (`ShardedTensor.global_offset`), so rules need not
know about TP, PP, EP or ETP, and one table serves every layout.

Tensors are named by their key in a megatron-core distributed checkpoint, which is the same for the local and
the Transformer Engine layer specs.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mcore_swift.models.stored_form import AS_IS, AsIs, Turned

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shape = tuple[int, ...]
Region = tuple[tuple[int, int], ...]
"""Half-open interval `(start, stop)` along each dimension of a tensor."""


@dataclass(frozen=True)
class Block:
    """A region of one HF tensor and the equal-shaped region of the megatron-core tensor with the same values.

    `mcore` is relative to the start of the requested region, so it indexes a rank's shard directly.
    It may have leading dimensions of size one that the HF side lacks: one expert of a tensor that holds them all.
    `stored`: layout of the HF tensor in its file, which may differ from the plain form that `hf` indexes.
    """

    name: str
    hf: Region
    mcore: Region
    stored: AsIs | Turned = AS_IS

    def of(self, shard: "Tensor") -> "Tensor":
        """The block's values in a rank's shard: a view of the HF side's shape."""
        view = shard[as_slices(self.mcore)]
        for _ in range(len(self.mcore) - len(self.hf)):
            view = view.squeeze(0)
        return view


def full_region(shape: Shape) -> Region:
    """The region that covers a whole tensor."""
    return tuple((0, size) for size in shape)


def region_shape(region: Region) -> Shape:
    """Shape of the values in a region."""
    return tuple(stop - start for start, stop in region)


def as_slices(region: Region) -> tuple[slice, ...]:
    """The region as an index into a tensor."""
    return tuple(slice(start, stop) for start, stop in region)


@dataclass(frozen=True)
class Rule(ABC):
    """One megatron-core tensor `mcore` and the HF tensors `hf` it is made of."""

    mcore: str
    hf: tuple[str, ...]

    @abstractmethod
    def shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        """Shape of the whole megatron-core tensor, without vocabulary padding.

        Raises ValueError if the HF shapes do not fit together.
        """

    @abstractmethod
    def hf_shapes(self, mcore_shape: Shape) -> dict[str, Shape]:
        """Shapes of the HF tensors, from the shape of the whole megatron-core tensor (the inverse of `shape`)."""

    @abstractmethod
    def blocks(self, region: Region, hf_shapes: Mapping[str, Shape]) -> Iterator[Block]:
        """The blocks that cover `region` of the whole megatron-core tensor, in the order of its first dimension.

        A part of the region that no HF tensor holds (vocabulary padding) is covered by no block.
        """

    def converted(self, dtype: "torch.dtype | None") -> "torch.dtype | None":
        """The tensor's dtype after the model is converted to `dtype`; None: it keeps its own."""
        return dtype

    def as_held(self, names: Collection[str]) -> "Rule":
        """The rule for a checkpoint that holds HF tensors of these names, if checkpoints come in several forms."""
        return self


@dataclass(frozen=True)
class Same(Rule):
    """One HF tensor with the same layout as the megatron-core tensor; any shape."""

    def shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        return hf_shapes[self.hf[0]]

    def hf_shapes(self, mcore_shape: Shape) -> dict[str, Shape]:
        return {self.hf[0]: mcore_shape}

    def blocks(self, region: Region, hf_shapes: Mapping[str, Shape]) -> Iterator[Block]:
        yield Block(self.hf[0], region, full_region(region_shape(region)))


@dataclass(frozen=True)
class Norm(Same):
    """The weight of a norm. initial: its value in a fresh model, as in transformers."""

    initial: float = 1.0


@dataclass(frozen=True)
class FusedQKV(Rule):
    """Query, key and value projections that Hugging Face keeps in one tensor, one after the other.

    mcore: as in `QKV`. HF: `[groups * (heads_per_group + 2) * head_dim, ...]`, all queries, all keys, all values.
    """

    num_query_groups: int
    heads_per_group: int
    head_dim: int

    def shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        rows, *rest = hf_shapes[self.hf[0]]
        meant = self.num_query_groups * (self.heads_per_group + 2) * self.head_dim
        if rows != meant:
            raise ValueError(f"{self.hf[0]} has {rows} rows, but the config means {meant}")
        return (rows, *rest)

    def hf_shapes(self, mcore_shape: Shape) -> dict[str, Shape]:
        return {self.hf[0]: mcore_shape}

    def blocks(self, region: Region, hf_shapes: Mapping[str, Shape]) -> Iterator[Block]:
        (start, stop), *rest = region
        heads = (self.heads_per_group, 1, 1)
        group_rows = sum(heads) * self.head_dim
        for group in range(start // group_rows, -(-stop // group_rows)):
            first, part = group * group_rows, 0
            for count in heads:
                rows = count * self.head_dim
                held_from = part + group * rows
                yield from _row_block(self.hf[0], first, first + rows, start, stop, tuple(rest), held_from)
                first += rows
                part += self.num_query_groups * rows


@dataclass(frozen=True)
class InFloat32(Same):
    """A tensor that stays in fp32 whatever the model's dtype: small updates would be lost in a lower precision."""

    def converted(self, dtype: "torch.dtype | None") -> "torch.dtype | None":
        return None


@dataclass(frozen=True)
class Vocab(Rule):
    """Embedding or output layer: `[vocabulary (padded in megatron-core), hidden]`.

    Rows past the HF vocabulary exist only in a running model, where the padded size depends on TP; they are
    zero after loading and never exported. HF tensors after the first are copies of it.
    """

    vocab_size: int

    def as_held(self, names: Collection[str]) -> Rule:
        original, *copies = self.hf
        return replace(self, hf=(original, *[name for name in copies if name in names or not names]))

    def shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        return hf_shapes[self.hf[0]]

    def hf_shapes(self, mcore_shape: Shape) -> dict[str, Shape]:
        return dict.fromkeys(self.hf, (min(self.vocab_size, mcore_shape[0]), *mcore_shape[1:]))

    def blocks(self, region: Region, hf_shapes: Mapping[str, Shape]) -> Iterator[Block]:
        (start, stop), *rest = region
        stop = min(stop, hf_shapes[self.hf[0]][0])
        for name in reversed(self.hf) if start < stop else ():  # loading keeps the last one, the original
            yield Block(
                name,
                ((start, stop), *rest),
                ((0, stop - start), *full_region(region_shape(tuple(rest)))),
            )


@dataclass(frozen=True)
class Stacked(Rule):
    """HF tensors of one shape stacked along the first dimension: gate above up in a gated MLP.

    mcore: `[parts * rows, ...]`, HF: `[rows, ...]` each. (A running model interleaves the halves per TP rank;
    megatron-core's checkpoint metadata already tells them apart, so the whole tensor is simply stacked.)
    """

    def shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        shapes = {hf_shapes[name] for name in self.hf}
        if len(shapes) != 1:
            raise ValueError(f"{', '.join(self.hf)} should have one shape, not {sorted(shapes)}")
        rows, *rest = shapes.pop()
        return (rows * len(self.hf), *rest)

    def hf_shapes(self, mcore_shape: Shape) -> dict[str, Shape]:
        return dict.fromkeys(self.hf, (mcore_shape[0] // len(self.hf), *mcore_shape[1:]))

    def blocks(self, region: Region, hf_shapes: Mapping[str, Shape]) -> Iterator[Block]:
        (start, stop), *rest = region
        first = 0
        for name in self.hf:
            last = first + hf_shapes[name][0]
            yield from _row_block(name, first, last, start, stop, tuple(rest))
            first = last


@dataclass(frozen=True)
class QKV(Rule):
    """Query, key and value projections interleaved by query group; weight or bias.

    mcore: `[groups * (heads_per_group + 2) * head_dim, ...]`, per group its query heads, its key, its value.
    HF:    q `[groups * heads_per_group * head_dim, ...]`, k and v `[groups * head_dim, ...]`.
    """

    num_query_groups: int
    heads_per_group: int
    head_dim: int

    def shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        (q_rows, *rest), (k_rows, *_), (v_rows, *_) = (hf_shapes[name] for name in self.hf)
        kv_rows = self.num_query_groups * self.head_dim
        if (q_rows, k_rows, v_rows) != (kv_rows * self.heads_per_group, kv_rows, kv_rows):
            raise ValueError(
                f"{', '.join(self.hf)} have {q_rows}, {k_rows} and {v_rows} rows, but the config means"
                f" {kv_rows * self.heads_per_group}, {kv_rows} and {kv_rows}"
            )
        return (q_rows + k_rows + v_rows, *rest)

    def hf_shapes(self, mcore_shape: Shape) -> dict[str, Shape]:
        kv_rows = self.num_query_groups * self.head_dim
        rows = (kv_rows * self.heads_per_group, kv_rows, kv_rows)
        return {name: (size, *mcore_shape[1:]) for name, size in zip(self.hf, rows, strict=True)}

    def blocks(self, region: Region, hf_shapes: Mapping[str, Shape]) -> Iterator[Block]:
        (start, stop), *rest = region
        heads = (self.heads_per_group, 1, 1)
        group_rows = sum(heads) * self.head_dim
        for group in range(start // group_rows, -(-stop // group_rows)):
            first = group * group_rows
            for name, count in zip(self.hf, heads, strict=True):
                rows = count * self.head_dim
                yield from _row_block(name, first, first + rows, start, stop, tuple(rest), group * rows)
                first += rows


@dataclass(frozen=True)
class Experts(Rule):
    """One matrix of all experts of a layer, from HF tensors of a single expert each.

    mcore: `[experts, parts * rows, ...]`, HF: `[rows, ...]` each; `hf` lists the parts (gate and up: two) of the
    first expert, then those of the second, and so on.

    fused: name of the HF tensor `[experts, parts * rows, ...]` that holds all of them in another form of the
    checkpoint.
    """

    parts: int = 1
    fused: str | None = None

    def as_held(self, names: Collection[str]) -> Rule:
        return Same(self.mcore, (self.fused,)) if self.fused in names else self

    def shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        shapes = {hf_shapes[name] for name in self.hf}
        if len(shapes) != 1:
            raise ValueError(f"{self.hf[0]} and its like should have one shape, not {sorted(shapes)}")
        rows, *rest = shapes.pop()
        return (len(self.hf) // self.parts, rows * self.parts, *rest)

    def hf_shapes(self, mcore_shape: Shape) -> dict[str, Shape]:
        _, rows, *rest = mcore_shape
        return dict.fromkeys(self.hf, (rows // self.parts, *rest))

    def blocks(self, region: Region, hf_shapes: Mapping[str, Shape]) -> Iterator[Block]:
        (first_expert, last_expert), (start, stop), *rest = region
        rows = hf_shapes[self.hf[0]][0]
        for expert in range(first_expert, last_expert):
            place = (expert - first_expert, expert - first_expert + 1)
            for part in range(self.parts):
                name, first = self.hf[expert * self.parts + part], part * rows
                for block in _row_block(name, first, first + rows, start, stop, tuple(rest)):
                    yield Block(name, block.hf, (place, *block.mcore))


@dataclass(frozen=True)
class TurnedExperts(Rule):
    """One matrix, or bias, of all experts of a layer, in a single transposed HF tensor (`stored_form.Turned`).

    mcore: `[experts, parts * rows, ...]`, HF: `[experts, ..., rows * parts]`.
    """

    parts: int = 1

    def shape(self, hf_shapes: Mapping[str, Shape]) -> Shape:
        experts, *rest, rows = hf_shapes[self.hf[0]]
        return (experts, rows, *rest)

    def hf_shapes(self, mcore_shape: Shape) -> dict[str, Shape]:
        experts, rows, *rest = mcore_shape
        return {self.hf[0]: (experts, *rest, rows)}

    def blocks(self, region: Region, hf_shapes: Mapping[str, Shape]) -> Iterator[Block]:
        experts, (start, stop), *rest = region
        rows = hf_shapes[self.hf[0]][-1] // self.parts
        stored = Turned(self.parts, rows)
        for first in range(0, rows * self.parts, rows):
            low, high = max(first, start), min(first + rows, stop)
            if low < high:
                mcore = (*full_region(region_shape((experts,))), (low - start, high - start))
                yield Block(
                    self.hf[0],
                    (experts, (low, high), *rest),
                    (*mcore, *full_region(region_shape(tuple(rest)))),
                    stored,
                )


def _row_block(
    name: str, first: int, last: int, start: int, stop: int, rest: Region, hf_first: int = 0
) -> Iterator[Block]:
    """The part of mcore rows [first, last), held by HF rows from `hf_first` on, that lies in [start, stop)."""
    low, high = max(first, start), min(last, stop)
    if low < high:
        yield Block(
            name,
            ((hf_first + low - first, hf_first + high - first), *rest),
            ((low - start, high - start), *full_region(region_shape(rest))),
        )


class RuleTable:
    """All rules of one model, by megatron-core key and by HF name.

    `optional_hf` names HF tensors that a checkpoint may hold but that carry no information of their own: buffers of
    old exports, or the output layer of a model with tied embeddings. `config`: fields that an exported config.json has
    to change from the one that was read. `matrices`: the table that lists each expert's matrices separately, whatever
    the form of the checkpoint; adapters are named after it. Raises ValueError if two rules claim the same tensor.
    """

    def __init__(
        self, rules: Iterable[Rule], optional_hf: Iterable[str] = (), config: Mapping[str, Any] | None = None
    ) -> None:
        self.config = dict(config or {})
        self.matrices = self
        self.rules: list[Rule] = list(rules)
        self.by_mcore = {rule.mcore: rule for rule in self.rules}
        self.by_hf = {name: rule for rule in self.rules for name in rule.hf}
        self.optional_hf = frozenset(optional_hf)
        if len(self.by_mcore) != len(self.rules):
            raise ValueError("two rules claim the same megatron-core tensor")
        if len(self.by_hf) != sum(len(rule.hf) for rule in self.rules):
            raise ValueError("two rules claim the same Hugging Face tensor")

    def as_held(self, names: Collection[str]) -> "RuleTable":
        """The table for a checkpoint that holds HF tensors of these names; see `Rule.as_held`."""
        held = set(names)
        table = RuleTable([rule.as_held(held) for rule in self.rules], self.optional_hf, self.config)
        table.matrices = self.matrices
        return table

    def missing_hf(self, names: Iterable[str]) -> list[str]:
        """HF tensors the model needs that are not among `names`."""
        names = set(names)
        return [name for name in self.by_hf if name not in names]

    def unclaimed_hf(self, names: Iterable[str]) -> list[str]:
        """HF tensors among `names` that no rule uses and that are not in `optional_hf`."""
        return [name for name in names if name not in self.by_hf and name not in self.optional_hf]
