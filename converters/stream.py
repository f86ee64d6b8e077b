"""Converting checkpoints between Hugging Face and megatron-core, straight from file to file.

No model is built and no process group is needed; a process holds one bounded piece of a tensor at a time. With several
processes, each converts a share of the bytes.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from converters import torch_dist_writer
from converters.budget import UNBOUNDED, Budget
from converters.coverage import check_mcore
from converters.hf_writer import HFWriter, PlannedFile, in_writing_order, plan_files, share_out, write_index
from converters.journal import Journal
from converters.pending import check_free_space
from converters.progress import Progress, Silent
from converters.ranks import Ranks
from converters.read_ahead import read_ahead
from converters.regions import clip, slabs
from converters.safetensors_format import TensorSpec
from converters.side_files import copy_side_files
from converters.stored import Buffers
from converters.torch_dist_writer import Chunk, MCoreWriter, nbytes_of, share_chunks
from converters.views import View
from mcore_swift.models.rules import (
    Block,
    Region,
    Rule,
    RuleTable,
    Shape,
    full_region,
    region_shape,
)

PART_BYTES = 8 << 20
"""Size of the part of an HF tensor that is assembled in memory before it is written; fits into a CPU cache."""


@dataclass(frozen=True)
class MCorePlan:
    """The plan of a torch_dist checkpoint: its tensors, and the chunks that each process writes."""

    table: RuleTable
    specs: list[TensorSpec]
    shares: list[list[Chunk]]

    def nbytes_of(self, rank: int) -> int:
        """Bytes of weights that a process writes."""
        return sum(nbytes_of(*chunk) for chunk in self.shares[rank])


@dataclass(frozen=True)
class HFPlan:
    """The plan of a Hugging Face checkpoint: its tensors and files, and which process writes which."""

    table: RuleTable
    specs: list[TensorSpec]
    files: list[PlannedFile]
    part_bytes: int

    def files_of(self, rank: int) -> list[PlannedFile]:
        return [file for file in self.files if file.rank == rank]

    def nbytes_of(self, rank: int) -> int:
        """Bytes of weights that a process writes."""
        return sum(spec.nbytes for file in self.files_of(rank) for spec in file.specs)


def plan_mcore(
    view: View,
    table: RuleTable,
    dtype: torch.dtype | None = None,
    processes: int = 1,
    budget: Budget = UNBOUNDED,
) -> MCorePlan:
    """Plan `write_mcore`. dtype: of the result; None keeps each tensor's own.

    Raises UserErrors if checkpoint and table do not fit, UserError if the budget is too small.
    """
    check_mcore(table, view.shapes, str(view.folder))
    specs = [
        replace(view.specs[rule.mcore], dtype=rule.converted(dtype) or view.specs[rule.mcore].dtype)
        for rule in table.rules
    ]
    budget.check(specs)
    chunk_bytes = budget.piece(torch_dist_writer.CHUNK_BYTES)
    return MCorePlan(table, specs, share_chunks(specs, processes, chunk_bytes))


def plan_hf(
    view: View,
    table: RuleTable,
    max_shard_bytes: int,
    dtype: torch.dtype | None = None,
    processes: int = 1,
    budget: Budget = UNBOUNDED,
) -> HFPlan:
    """Plan `write_hf`. dtype: of the result; None keeps each tensor's own.

    Raises UserErrors if checkpoint and table do not fit, UserError if the budget is too small.
    """
    check_mcore(table, view.shapes, str(view.folder))
    specs = in_writing_order(spec for rule in table.rules for spec in _hf_specs(view, rule, dtype))
    budget.check(specs)
    files = plan_files(share_out(specs, processes), max_shard_bytes)
    return HFPlan(table, specs, files, budget.piece(PART_BYTES))


def write_mcore(
    view: View,
    plan: MCorePlan,
    folder: Path,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> None:
    """Write the weights in torch_dist format, into an existing folder. Collective.

    journal: this process's; the pieces that it has kept are not written again.
    Raises UserError if the disk is full.
    """
    ranks, progress = ranks or Ranks(), progress or Silent()
    _check_space(folder, plan.specs, ranks, journal)
    chunks = plan.shares[ranks.rank]
    writer = MCoreWriter(folder, chunks, ranks, journal)
    kept = sum(nbytes_of(*chunk) for chunk in chunks[: len(journal.kept) if journal else 0])
    progress.begin(sum(spec.nbytes for spec in plan.specs), plan.nbytes_of(ranks.rank), kept)

    def fill(spec: TensorSpec, region: Region, out: torch.Tensor) -> None:
        view.copy_into(spec.name, region, out)
        progress.advance(out.nbytes)

    ranks.together(lambda: writer.write(fill))
    writer.finish()


def write_hf(
    view: View,
    plan: HFPlan,
    source_dir: str | Path,
    folder: Path,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> None:
    """Write the weights as Hugging Face files, into an existing folder. Collective.

    source_dir: where config, tokenizer and chat template are copied from. journal: as for `write_mcore`.
    Raises UserError if the disk is full.
    """
    ranks, progress = ranks or Ranks(), progress or Silent()
    _check_space(folder, plan.specs, ranks, journal)
    ranks.together(lambda: _write_files(view, plan, folder, ranks.rank, progress, journal))
    dtypes = {spec.dtype for spec in plan.specs}

    def finish() -> None:
        write_index(folder, plan.files)
        copy_side_files(source_dir, folder, dtypes.pop() if len(dtypes) == 1 else None, plan.table.config)

    ranks.together(finish, where=ranks.is_first)


def _check_space(folder: Path, specs: list[TensorSpec], ranks: Ranks, journal: Journal | None) -> None:
    written = sum(ranks.gather(journal.nbytes if journal else 0))
    nbytes = sum(spec.nbytes for spec in specs) - written
    ranks.together(lambda: check_free_space(folder, nbytes), where=ranks.is_first)


def _write_files(
    view: View, plan: HFPlan, folder: Path, rank: int, progress: Progress, journal: Journal | None
) -> None:
    specs = [spec for file in plan.files_of(rank) for spec in file.specs]
    parts = _parts(view, plan, specs)
    with HFWriter(folder, plan.files, rank, journal) as writer:
        done = 0
        for job in itertools.islice(parts, len(journal.kept) if journal else 0):
            writer.skip(job.spec.name, nbytes_of(job.spec, job.region))
            done += nbytes_of(job.spec, job.region)
        progress.begin(sum(spec.nbytes for spec in plan.specs), plan.nbytes_of(rank), done)
        for job, part in read_ahead(parts, partial(_fill_part, view)):
            writer.write(job.spec.name, part)
            progress.advance(part.nbytes)


@dataclass(frozen=True)
class _Part:
    """A part of an HF tensor that is assembled in memory, and the blocks that may overlap it."""

    spec: TensorSpec
    region: Region
    rule: Rule
    blocks: list[Block]


def _parts(view: View, plan: HFPlan, specs: list[TensorSpec]) -> Iterator[_Part]:
    shapes = view.shapes
    for _, group in groupby(specs, key=lambda spec: plan.table.by_hf[spec.name].mcore):
        tensors = list(group)
        rule = plan.table.by_hf[tensors[0].name]
        blocks = _blocks_by_name(rule, shapes)
        for spec in tensors:
            for region in slabs(spec.shape, spec.dtype.itemsize, plan.part_bytes):
                yield _Part(spec, region, rule, blocks[spec.name])


def _fill_part(view: View, job: _Part, buffers: Buffers) -> torch.Tensor:
    part = buffers.tensor(region_shape(job.region), job.spec.dtype)
    covered = 0
    for block in job.blocks:
        for region in block.stored.plain(job.region):
            piece = clip(block, region)
            if piece is None:
                continue
            target = block.stored.view(part, job.region, piece.hf)
            covered += target.numel()
            for _ in range(len(piece.mcore) - len(piece.hf)):
                target = target[None]
            view.copy_into(job.rule.mcore, piece.mcore, target)
    if covered != part.numel():
        raise ValueError(f"{job.rule} covers {covered} of {part.numel()} values of {job.region}")
    return part


def _blocks_by_name(rule: Rule, mcore_shapes: dict[str, Shape]) -> dict[str, list[Block]]:
    shape = mcore_shapes[rule.mcore]
    blocks: dict[str, list[Block]] = {name: [] for name in rule.hf}
    for block in rule.blocks(full_region(shape), rule.hf_shapes(shape)):
        blocks[block.name].append(block)
    return blocks


def _hf_specs(view: View, rule: Rule, dtype: torch.dtype | None) -> list[TensorSpec]:
    stored = view.specs[rule.mcore]
    shapes = rule.hf_shapes(stored.shape)
    return [TensorSpec(name, shapes[name], rule.converted(dtype) or stored.dtype) for name in rule.hf]
