"""Hugging Face <-> megatron-core checkpoint, straight from file to file.

No model is built and no process group is needed; a process holds one bounded piece of one tensor at a time.
With several processes, each converts a share of the bytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

from converters.coverage import check_hf, check_mcore
from converters.hf_reader import HFReader
from converters.hf_writer import HFWriter, PlannedFile, in_writing_order, plan_files, share_out, write_index
from converters.pending import check_free_space
from converters.ranks import Ranks
from converters.read_ahead import read_ahead
from converters.regions import clip, relative, slabs
from converters.safetensors_format import TensorSpec
from converters.side_files import copy_side_files
from converters.stored import Buffers
from converters.torch_dist_reader import MCoreReader
from converters.torch_dist_writer import MCoreWriter
from mcore_swift.models.rules import (
    Block,
    Region,
    Rule,
    RuleTable,
    Shape,
    as_slices,
    full_region,
    region_shape,
)

PART_BYTES = 8 << 20
"""How much of an HF tensor is put together in memory before it is written: fits a processor's cache."""

Progress = Callable[[int], None]
"""Called with the bytes of weights written since the last call."""


def silent(nbytes: int) -> None:
    """The progress of a caller who does not care."""


def hf_to_mcore(
    reader: HFReader,
    table: RuleTable,
    folder: Path,
    dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
    progress: Progress = silent,
) -> None:
    """Write the checkpoint's weights in torch_dist format, into an existing empty folder. Collective.

    dtype: of the result; None keeps each tensor's own.
    Raises UserErrors if checkpoint and table do not fit, UserError if the disk is full.
    """
    ranks = ranks or Ranks()
    shapes = reader.shapes
    mcore_shapes = check_hf(table, shapes, str(reader.model_dir))
    specs = [
        TensorSpec(rule.mcore, mcore_shapes[rule.mcore], dtype or _widest(reader, rule))
        for rule in table.rules
    ]
    _check_space(folder, specs, ranks)
    writer = MCoreWriter(folder, specs, ranks)

    def fill(spec: TensorSpec, region: Region, out: torch.Tensor) -> None:
        for block in table.by_mcore[spec.name].blocks(region, shapes):
            reader.copy_into(block.name, block.hf, block.of(out))
        progress(out.nbytes)

    _agreeing(ranks, lambda: writer.write(fill))
    writer.finish()


def mcore_to_hf(
    reader: MCoreReader,
    table: RuleTable,
    source_dir: str | Path,
    folder: Path,
    max_shard_bytes: int,
    dtype: torch.dtype | None = None,
    ranks: Ranks | None = None,
    progress: Progress = silent,
) -> None:
    """Write a torch_dist checkpoint's weights as Hugging Face's, into an existing folder. Collective.

    source_dir: where config, tokenizer and chat template are copied from.
    dtype: of the result; None keeps each tensor's own.
    Raises UserErrors if checkpoint and table do not fit, UserError if the disk is full.
    """
    ranks = ranks or Ranks()
    check_mcore(table, reader.shapes, str(reader.folder))
    specs = in_writing_order(spec for rule in table.rules for spec in _hf_specs(reader, rule, dtype))
    _check_space(folder, specs, ranks)
    files = plan_files(share_out(specs, ranks.size), max_shard_bytes)
    _agreeing(ranks, lambda: _write_files(reader, table, folder, files, ranks.rank, progress))
    dtypes = {spec.dtype for spec in specs}

    def finish() -> None:
        if ranks.is_first:
            write_index(folder, files)
            copy_side_files(source_dir, folder, dtypes.pop() if len(dtypes) == 1 else None)

    _agreeing(ranks, finish)


def _check_space(folder: Path, specs: list[TensorSpec], ranks: Ranks) -> None:
    nbytes = sum(spec.nbytes for spec in specs)
    _agreeing(ranks, lambda: check_free_space(folder, nbytes) if ranks.is_first else None)


def _agreeing(ranks: Ranks, action: Callable[[], None]) -> None:
    """Run a rank's share; if it fails on any rank, all of them raise."""
    error: Exception | None = None
    try:
        action()
    except Exception as raised:
        error = raised
    ranks.agree(error)


def _write_files(
    reader: MCoreReader,
    table: RuleTable,
    folder: Path,
    files: list[PlannedFile],
    rank: int,
    progress: Progress,
) -> None:
    specs = [spec for file in files if file.rank == rank for spec in file.specs]
    with HFWriter(folder, files, rank) as writer:
        for job, part in read_ahead(_parts(reader, table, specs), partial(_fill_part, reader)):
            writer.write(job.spec.name, part)
            progress(part.nbytes)


@dataclass(frozen=True)
class _Part:
    """A part of an HF tensor that is put together in memory, and the blocks it may meet."""

    spec: TensorSpec
    region: Region
    rule: Rule
    blocks: list[Block]


def _parts(reader: MCoreReader, table: RuleTable, specs: list[TensorSpec]) -> Iterator[_Part]:
    shapes = reader.shapes
    for _, group in groupby(specs, key=lambda spec: table.by_hf[spec.name].mcore):
        tensors = list(group)
        rule = table.by_hf[tensors[0].name]
        blocks = _blocks_by_name(rule, shapes)
        for spec in tensors:
            for region in slabs(spec.shape, spec.dtype.itemsize, PART_BYTES):
                yield _Part(spec, region, rule, blocks[spec.name])


def _fill_part(reader: MCoreReader, job: _Part, buffers: Buffers) -> torch.Tensor:
    part = buffers.tensor(region_shape(job.region), job.spec.dtype)
    covered = 0
    for block in job.blocks:
        piece = clip(block, job.region)
        if piece is not None:
            target = part[as_slices(relative(piece.hf, job.region))]
            reader.copy_into(job.rule.mcore, piece.mcore, target.view(region_shape(piece.mcore)))
            covered += target.numel()
    if covered != part.numel():
        raise ValueError(f"{job.rule} covers {covered} of {part.numel()} values of {job.region}")
    return part


def _blocks_by_name(rule: Rule, mcore_shapes: dict[str, Shape]) -> dict[str, list[Block]]:
    shape = mcore_shapes[rule.mcore]
    blocks: dict[str, list[Block]] = {name: [] for name in rule.hf}
    for block in rule.blocks(full_region(shape), rule.hf_shapes(shape)):
        blocks[block.name].append(block)
    return blocks


def _hf_specs(reader: MCoreReader, rule: Rule, dtype: torch.dtype | None) -> list[TensorSpec]:
    stored = reader.specs[rule.mcore]
    shapes = rule.hf_shapes(stored.shape)
    return [TensorSpec(name, shapes[name], dtype or stored.dtype) for name in rule.hf]


def _widest(reader: HFReader, rule: Rule) -> torch.dtype:
    """The dtype that holds all parts of a megatron-core tensor without loss."""
    widest, *others = (reader.dtype(name) for name in rule.hf)
    for other in others:
        widest = torch.promote_types(widest, other)
    return widest
