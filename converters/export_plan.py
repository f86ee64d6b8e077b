"""The plan of an export: which rank writes which HF tensor, and who sends what. The same on all ranks.

Given which shards each rank holds, every HF tensor gets an owner among the ranks that hold a part of it. Weights do not
leave their pipeline stage, and the bytes are spread over tensor-parallel ranks and data-parallel replicas.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from converters.hf_writer import MIN_RANK_BYTES
from converters.regions import clip, numel, slabs
from converters.safetensors_format import TensorSpec
from mcore_swift.models.rules import Block, Region, Rule, RuleTable, Shape, full_region


@dataclass(frozen=True)
class Holding:
    """The description of a shard that a rank holds."""

    key: str
    region: Region
    global_shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class Piece:
    """A block of an HF tensor, held in shard number `shard` of rank `source`; `block.mcore` indexes the shard."""

    source: int
    shard: int
    block: Block


@dataclass(frozen=True)
class TensorPlan:
    """An HF tensor or a region of it: its owner, the pieces it is made of, and its round of exchange."""

    spec: TensorSpec
    region: Region
    owner: int
    pieces: tuple[Piece, ...]
    round: int = 0

    @property
    def nbytes(self) -> int:
        return numel(self.region) * self.spec.dtype.itemsize

    @property
    def participants(self) -> set[int]:
        return {self.owner, *(piece.source for piece in self.pieces)}


def plan_export(
    holdings: Sequence[Sequence[Holding]],
    table: RuleTable,
    bucket_bytes: int,
    dtype: torch.dtype | None = None,
    min_rank_bytes: int = MIN_RANK_BYTES,
    part_bytes: int | None = None,
) -> list[TensorPlan]:
    """Plan for all HF tensors, in writing order. holdings: of each rank, in the order of its shards.

    part_bytes: larger tensors are cut into regions that are consecutive in a file; None leaves them whole.
    Raises ValueError if the ranks together do not hold a tensor of the table.
    """
    holders: dict[str, dict[Region, list[tuple[int, int]]]] = {}
    facts: dict[str, Holding] = {}
    for rank, held in enumerate(holdings):
        for number, holding in enumerate(held):
            facts.setdefault(holding.key, holding)
            holders.setdefault(holding.key, {}).setdefault(holding.region, []).append((rank, number))
    load = [0] * len(holdings)
    plans = []
    for rule in table.rules:
        if rule.mcore not in facts:
            raise ValueError(f"no rank holds {rule.mcore}")
        fact = facts[rule.mcore]
        copies = _copies(holders[rule.mcore])
        blocks = _blocks(rule, fact.global_shape, copies[0])
        for spec in _specs(rule, fact, dtype):
            plan = _assign(spec, blocks[spec.name], copies, load, min_rank_bytes)
            load[plan.owner] += spec.nbytes
            plans.append(plan)
    plans.sort(key=lambda plan: -plan.spec.dtype.itemsize)
    if part_bytes is not None:
        plans = [part for plan in plans for part in _parts(plan, part_bytes)]
    return _in_rounds(plans, len(holdings), bucket_bytes)


Copy = dict[Region, tuple[int, int]]
"""One complete copy of a megatron-core tensor: the rank and the shard number of each of its regions."""


def _copies(holders: dict[Region, list[tuple[int, int]]]) -> list[Copy]:
    """Match the holders of the regions into complete copies.

    Ranks are numbered alike in every data-parallel copy, so the n-th holders of all regions belong together.
    """
    count = min(len(places) for places in holders.values())
    return [{region: places[n] for region, places in holders.items()} for n in range(count)]


def _specs(rule: Rule, fact: Holding, dtype: torch.dtype | None) -> list[TensorSpec]:
    shapes = rule.hf_shapes(fact.global_shape)
    return [TensorSpec(name, shapes[name], rule.converted(dtype) or fact.dtype) for name in rule.hf]


def _blocks(
    rule: Rule, global_shape: Shape, regions: Iterable[Region]
) -> dict[str, list[tuple[Region, Block]]]:
    """By HF tensor: each block of it, and the region of the megatron-core tensor in which it lies."""
    shapes = rule.hf_shapes(global_shape)
    found: dict[str, list[tuple[Region, Block]]] = {name: [] for name in rule.hf}
    for region in regions:
        for block in rule.blocks(region, shapes):
            found[block.name].append((region, block))
    return found


def _assign(
    spec: TensorSpec,
    blocks: list[tuple[Region, Block]],
    copies: list[Copy],
    load: list[int],
    min_rank_bytes: int,
) -> TensorPlan:
    """The least loaded of the ranks that hold a part of the tensor owns it."""
    best: tuple[int, int] | None = None
    for number, copy in enumerate(copies):
        for region, _ in blocks:
            rank, _ = copy[region]
            if best is None or _cost(rank, load, min_rank_bytes) < _cost(best[0], load, min_rank_bytes):
                best = rank, number
    covered = sum(numel(block.hf) for _, block in blocks)
    if best is None or covered * spec.dtype.itemsize != spec.nbytes:
        raise ValueError(f"the ranks together hold {covered} values of {spec.name}, not {spec.shape}")
    owner, number = best
    pieces = tuple(Piece(*copies[number][region], block) for region, block in blocks)
    return TensorPlan(spec, full_region(spec.shape), owner, pieces)


def _parts(plan: TensorPlan, part_bytes: int) -> Iterator[TensorPlan]:
    """The regions of a tensor, in the order they are written, with the same owner."""
    if plan.nbytes <= part_bytes:
        yield plan
        return
    for region in slabs(plan.spec.shape, plan.spec.dtype.itemsize, part_bytes):
        clipped = (
            (piece, clip(piece.block, plain))
            for piece in plan.pieces
            for plain in piece.block.stored.plain(region)
        )
        pieces = tuple(replace(piece, block=block) for piece, block in clipped if block is not None)
        yield replace(plan, region=region, pieces=pieces)


def _cost(rank: int, load: list[int], min_rank_bytes: int) -> tuple[int, int]:
    return load[rank] // max(min_rank_bytes, 1), rank


def _in_rounds(plans: list[TensorPlan], ranks: int, bucket_bytes: int) -> list[TensorPlan]:
    """Assign rounds such that each rank takes part with at most `bucket_bytes` in a round (or with one tensor).

    All participants of a tensor are in the same round, and every rank runs its rounds in ascending order. A rank
    waiting in a round thus waits only for ranks that will reach it, so there is no deadlock.
    """
    rounds, filled = [0] * ranks, [0] * ranks
    numbered = []
    for plan in plans:
        members = plan.participants
        number = max(rounds[rank] for rank in members)
        size = plan.nbytes
        if any(
            rounds[rank] == number and filled[rank] and filled[rank] + size > bucket_bytes for rank in members
        ):
            number += 1
        for rank in members:
            if rounds[rank] < number:
                rounds[rank], filled[rank] = number, 0
            filled[rank] += size
        numbered.append(replace(plan, round=number))
    return numbered
