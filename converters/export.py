"""Exporting a live model under Hugging Face names: as an iterator of tensors, or to a folder that all ranks write.

Each HF tensor has an owner, to which the other ranks of its model replica send their parts point to point, one bucket
at a time. Weights do not leave their pipeline stage, and no rank holds more than a bucket (or one tensor, if whole
tensors are asked for).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from converters.budget import UNBOUNDED, Budget
from converters.export_plan import Holding, Piece, TensorPlan, plan_export
from converters.hf_writer import HFWriter, plan_files, write_index
from converters.pending import check_free_space, pending_directory
from converters.ranks import Ranks
from converters.regions import numel
from converters.safetensors_format import TensorSpec
from converters.side_files import copy_side_files
from mcore_swift.models.rules import RuleTable, region_shape
from mcore_swift.models.shards import LiveShard, MergedShard, live_shards
from mcore_swift.models.stored_form import AS_IS

BUCKET_BYTES = 256 << 20
MAX_SHARD_BYTES = 5_000_000_000

Chunks = nn.Module | Sequence[nn.Module]


@dataclass(frozen=True)
class Bucket:
    """Whole HF tensors that this rank owns, by name. They may share memory with the model: do not change them."""

    tensors: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def hf_weights(
    model_chunks: Chunks,
    table: RuleTable,
    bucket_bytes: int = BUCKET_BYTES,
    dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Bucket]:
    """The model's weights under their HF names, each exactly once over all ranks, on the model's device.

    bucket_bytes: maximum that a rank gathers at a time; a larger tensor forms a bucket of its own.
    dtype: of the returned tensors; None keeps the parameters'.
    Collective over `ranks` (the default process group): every rank must run the iterator to its end.
    """
    yield from hf_tensors(live_shards(model_chunks), table, bucket_bytes, dtype, ranks)


def hf_tensors(
    shards: Sequence[LiveShard],
    table: RuleTable,
    bucket_bytes: int = BUCKET_BYTES,
    dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Bucket]:
    """`hf_weights` for any shards that have a rule in `table`."""
    ranks = ranks or Ranks()
    plans = _plan(shards, table, bucket_bytes, dtype, ranks)
    for members in _gather(plans, shards, ranks):
        yield Bucket({plan.spec.name: tensor for plan, tensor in members})


def export_hf(
    model_chunks: Chunks,
    table: RuleTable,
    source_dir: str | Path,
    out_dir: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    exist_ok: bool = False,
    ranks: Ranks | None = None,
    budget: Budget = UNBOUNDED,
) -> None:
    """Write the model as a Hugging Face checkpoint that appears under `out_dir` only when it is complete.

    source_dir: where config, tokenizer and chat template are copied from. budget: memory for gathered pieces.
    Collective. Raises UserError on every rank if `out_dir` is not empty (unless exist_ok) or the disk is full.
    """
    ranks = ranks or Ranks()
    with pending_directory(out_dir, ranks, exist_ok) as folder:
        write_hf(model_chunks, table, source_dir, folder, max_shard_bytes, dtype, ranks, budget)


def check_budget(model_chunks: Chunks, table: RuleTable, budget: Budget, ranks: Ranks) -> None:
    """Raise UserError, on every rank, if `write_hf` could not keep to the budget. Collective."""
    check_budget_of_shards(live_shards(model_chunks), table, budget, ranks)


def check_budget_of_shards(
    shards: Sequence[LiveShard], table: RuleTable, budget: Budget, ranks: Ranks
) -> None:
    """The same for `write_shards_as_hf`."""

    def check() -> None:
        for shard in shards:
            rule = table.by_mcore[shard.key]
            shapes = rule.hf_shapes(shard.global_shape)
            budget.check(TensorSpec(name, shapes[name], shard.data.dtype) for name in rule.hf)

    ranks.together(check)


def write_hf(
    model_chunks: Chunks,
    table: RuleTable,
    source_dir: str | Path,
    folder: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
    budget: Budget = UNBOUNDED,
) -> None:
    """`export_hf` into an existing folder, for a caller that makes the folder appear atomically."""
    shards = live_shards(model_chunks)
    write_shards_as_hf(shards, table, source_dir, folder, max_shard_bytes, dtype, ranks, budget)


def write_shards_as_hf(
    shards: Sequence[LiveShard],
    table: RuleTable,
    source_dir: str | Path,
    folder: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
    budget: Budget = UNBOUNDED,
) -> None:
    """`write_hf` for the shards of any engine: this rank's parts of the tensors that the table names. Collective."""
    ranks, folder = ranks or Ranks(), Path(folder)
    bucket_bytes = budget.piece(BUCKET_BYTES)
    plans = _plan(shards, table, bucket_bytes, dtype, ranks, part_bytes=bucket_bytes)
    budget.check(plan.spec for plan in plans)
    files = plan_files(_specs_by_rank(plans, ranks.size), max_shard_bytes)
    nbytes = sum(plan.nbytes for plan in plans)
    ranks.together(lambda: check_free_space(folder, nbytes), where=ranks.is_first)
    error: Exception | None = None
    writer = HFWriter(folder, files, ranks.rank)
    try:
        for members in _gather(plans, shards, ranks):
            error = error or _write_members(writer, members)
        if error is None:
            writer.close()
            if ranks.is_first:
                write_index(folder, files)
                copy_side_files(source_dir, folder, _common_dtype(plans), table.config)
    except Exception as raised:
        error = raised
    finally:
        writer.abandon()
    ranks.agree(error)


def _write_members(writer: HFWriter, members: Sequence[tuple[TensorPlan, torch.Tensor]]) -> Exception | None:
    """Return the error instead of raising it: after a full disk, a rank keeps sending so that others do not hang."""
    try:
        for plan, tensor in members:
            writer.write(plan.spec.name, tensor)
    except Exception as raised:
        return raised
    return None


def _plan(
    shards: Sequence[LiveShard],
    table: RuleTable,
    bucket_bytes: int,
    dtype: torch.dtype | None,
    ranks: Ranks,
    part_bytes: int | None = None,
) -> list[TensorPlan]:
    held = [Holding(shard.key, shard.region, shard.global_shape, shard.data.dtype) for shard in shards]
    return plan_export(ranks.gather(held), table, bucket_bytes, dtype, part_bytes=part_bytes)


def _specs_by_rank(plans: Sequence[TensorPlan], size: int) -> list[list]:
    specs: list[list] = [[] for _ in range(size)]
    for plan in plans:
        if (
            not specs[plan.owner] or specs[plan.owner][-1] != plan.spec
        ):  # else another part of the same tensor
            specs[plan.owner].append(plan.spec)
    return specs


def _common_dtype(plans: Sequence[TensorPlan]) -> torch.dtype | None:
    dtypes = {plan.spec.dtype for plan in plans}
    return dtypes.pop() if len(dtypes) == 1 else None


def _gather(
    plans: Sequence[TensorPlan], shards: Sequence[LiveShard], ranks: Ranks
) -> Iterator[list[tuple[TensorPlan, torch.Tensor]]]:
    """Run the rounds that this rank takes part in; yield the tensors, or parts, that it owns after each."""
    mine = [plan for plan in plans if ranks.rank in plan.participants]
    values = _Values(shards)
    for _, members in groupby(sorted(mine, key=lambda plan: plan.round), key=lambda plan: plan.round):
        plans_of_round = list(members)
        values.begin(plans_of_round, ranks.rank)
        yield _exchange(plans_of_round, values, ranks)


class _Values:
    """The values of this rank's shards. Merged weights are computed for a round and freed after it."""

    def __init__(self, shards: Sequence[LiveShard]) -> None:
        self._shards = shards
        self._merged: dict[Any, torch.Tensor] = {}

    @property
    def device(self) -> torch.device:
        # a quantized weight is on the meta device; `merged` dequantizes it to the device of the others
        return next(shard.data.device for shard in self._shards if not shard.data.is_meta)

    def begin(self, plans: Sequence[TensorPlan], rank: int) -> None:
        """Compute the merged weights that a round reads on this rank, in the same order on all ranks."""
        read = [self._shards[piece.shard] for plan in plans for piece in plan.pieces if piece.source == rank]
        layers = dict.fromkeys(shard.layer for shard in read if isinstance(shard, MergedShard))
        self._merged = {layer: self._merged[layer] for layer in layers if layer in self._merged}
        for layer in layers:
            if layer not in self._merged:
                self._merged[layer] = layer.merged()

    def of(self, number: int) -> torch.Tensor:
        """The values of shard `number`."""
        shard = self._shards[number]
        return shard.of(self._merged[shard.layer]) if isinstance(shard, MergedShard) else shard.data


def _exchange(
    plans: Sequence[TensorPlan], values: _Values, ranks: Ranks
) -> list[tuple[TensorPlan, torch.Tensor]]:
    """One round: each rank sends one message to each owner, with all pieces of the round in the order of the plans."""
    outgoing: dict[int, list[tuple[TensorPlan, Piece]]] = {}
    incoming: dict[int, list[tuple[TensorPlan, Piece]]] = {}
    for plan in plans:
        for piece in plan.pieces:
            if piece.source == ranks.rank != plan.owner:
                outgoing.setdefault(plan.owner, []).append((plan, piece))
            elif piece.source != ranks.rank == plan.owner:
                incoming.setdefault(piece.source, []).append((plan, piece))
    device = values.device
    sent = {peer: _message(pieces, device) for peer, pieces in outgoing.items()}
    for peer, pieces in outgoing.items():
        for (_, piece), part in zip(pieces, _parts(sent[peer], pieces), strict=True):
            part.copy_(_local(piece, values))
    received = {peer: _message(pieces, device) for peer, pieces in incoming.items()}
    _communicate(sent, received, ranks)
    mine = [plan for plan in plans if plan.owner == ranks.rank]
    owned = {(plan.spec.name, plan.region): _own_part(plan, values, ranks.rank) for plan in mine}
    for peer, pieces in incoming.items():
        for (plan, piece), part in zip(pieces, _parts(received[peer], pieces), strict=True):
            _place(piece, plan, owned[plan.spec.name, plan.region]).copy_(part)
    return [(plan, owned[plan.spec.name, plan.region]) for plan in mine]


def _communicate(sent: dict[int, torch.Tensor], received: dict[int, torch.Tensor], ranks: Ranks) -> None:
    operations = [
        dist.P2POp(operation, message, group=ranks.group, group_peer=peer)
        for operation, messages in ((dist.isend, sent), (dist.irecv, received))
        for peer, message in sorted(messages.items())
    ]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def _own_part(plan: TensorPlan, values: _Values, rank: int) -> torch.Tensor:
    """The HF tensor, filled with this rank's pieces; the parameter itself if it is the whole tensor."""
    local = [piece for piece in plan.pieces if piece.source == rank]
    if len(plan.pieces) == len(local) == 1 and local[0].block.stored is AS_IS:
        return _local(local[0], values).to(plan.spec.dtype)
    whole = torch.empty(region_shape(plan.region), dtype=plan.spec.dtype, device=values.device)
    for piece in local:
        _place(piece, plan, whole).copy_(_local(piece, values))
    return whole


def _place(piece: Piece, plan: TensorPlan, whole: torch.Tensor) -> torch.Tensor:
    """A view of the piece's place in its plan's region of the HF tensor."""
    return piece.block.stored.view(whole, plan.region, piece.block.hf)


def _local(piece: Piece, values: _Values) -> torch.Tensor:
    return piece.block.of(values.of(piece.shard))


def _message(pieces: Sequence[tuple[TensorPlan, Piece]], device: torch.device) -> torch.Tensor:
    return torch.empty(sum(_nbytes(plan, piece) for plan, piece in pieces), dtype=torch.uint8, device=device)


def _parts(message: torch.Tensor, pieces: Sequence[tuple[TensorPlan, Piece]]) -> Iterator[torch.Tensor]:
    """Views of a message, one per piece. Plans are sorted by dtype, widest first, so that every view is aligned."""
    start = 0
    for plan, piece in pieces:
        stop = start + _nbytes(plan, piece)
        yield message[start:stop].view(plan.spec.dtype).view(region_shape(piece.block.hf))
        start = stop


def _nbytes(plan: TensorPlan, piece: Piece) -> int:
    return plan.spec.dtype.itemsize * numel(piece.block.hf)
