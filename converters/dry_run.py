"""`megatron export --dry_run true`: which process would read and write what, said by one that writes nothing."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters import stream
from converters.attempt import identity
from converters.main import MCORE, Source, open_source, plan_of
from converters.pending import can_continue, pending_folder
from converters.progress import size
from converters.torch_dist_writer import file_of, nbytes_of
from mcore_swift.errors import UserError
from mcore_swift.models.rules import full_region

LISTED = 40
"""Lines of a list before it only counts the rest."""


def dry_run(args: Any, processes: int) -> int:
    """Print the plan of a conversion by `processes` processes. Returns the exit code.

    Raises UserError as the conversion would: for a checkpoint that is broken or does not fit its config, a memory
    budget that is too small, a disk without room.
    """
    with open_source(args) as source:
        print(f"reads {source.folder} ({size(source.view.nbytes)} of weights)", flush=True)
        plan = plan_of(args, source, processes)
        reads = [_reads(source, plan, rank) for rank in range(processes)]
        _print_reads(sum(reads, Counter()))
        needed = sum(spec.nbytes for spec in plan.specs)
        print(f"writes {args.output_dir} ({size(needed)}, {len(plan.specs)} tensors)")
        for rank in range(processes):
            _print_writes(plan, rank, reads[rank])
        print("every tensor of the checkpoint is used, and every weight of the model is found")
        pending = pending_folder(args.output_dir)
        if can_continue(pending, identity(plan, source.view.files)):
            print(f"{pending} holds a part of it, which would be verified and kept")
    return _disk(Path(args.output_dir), needed)


def _reads(source: Source, plan: stream.MCorePlan | stream.HFPlan, rank: int) -> Counter[Path]:
    """Bytes that a process reads of each file."""
    found: Counter[Path] = Counter()
    if isinstance(plan, stream.MCorePlan):
        for spec, region in plan.shares[rank]:
            for path, nbytes in source.view.files_of(spec.name, region):
                found[path] += nbytes
        return found
    specs = {spec.name for file in plan.files_of(rank) for spec in file.specs}
    shapes = source.view.shapes
    for rule in plan.table.rules:
        if specs.isdisjoint(rule.hf):
            continue
        shape = shapes[rule.mcore]
        for block in rule.blocks(full_region(shape), rule.hf_shapes(shape)):
            if block.name in specs:
                for path, nbytes in source.view.files_of(rule.mcore, block.mcore):
                    found[path] += nbytes
    return found


def _print_reads(reads: Counter[Path]) -> None:
    for line in _short([f"  {path.name}  {size(nbytes)}" for path, nbytes in sorted(reads.items())]):
        print(line)


def _print_writes(plan: stream.MCorePlan | stream.HFPlan, rank: int, reads: Counter[Path]) -> None:
    total = f"reads {size(sum(reads.values()))} of {len(reads)} files, writes {size(plan.nbytes_of(rank))}"
    print(f"  process {rank}: {total}")
    if isinstance(plan, stream.MCorePlan):
        chunks = plan.shares[rank]
        tensors = {spec.name for spec, _ in chunks}
        largest = max((nbytes_of(*chunk) for chunk in chunks), default=0)
        lines = [
            f"    {MCORE}/{file_of(rank)}  {size(plan.nbytes_of(rank))}  {len(tensors)} tensors in"
            f" {len(chunks)} pieces of up to {size(largest)}"
        ]
    else:
        lines = [
            f"    {file.name}  {size(sum(spec.nbytes for spec in file.specs))}  {len(file.specs)} tensors in"
            f" pieces of up to {size(min(plan.part_bytes, max(spec.nbytes for spec in file.specs)))}"
            for file in plan.files_of(rank)
        ]
    for line in _short(lines):
        print(line)


def _disk(output: Path, needed: int) -> int:
    place = next(folder for folder in (Path(os.path.abspath(output)).parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    print(f"{place} has {size(free)} free, {size(needed)} are needed")
    if free < needed:
        raise UserError(
            f"{place} has {size(free)} free, the output needs {size(needed)}",
            remedy="free space, or choose an --output_dir on another disk",
        )
    print("dry run: nothing was written")
    return 0


def _short(lines: list[str]) -> Iterator[str]:
    yield from lines[:LISTED]
    if len(lines) > LISTED:
        yield f"    and {len(lines) - LISTED} more"
