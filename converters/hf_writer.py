"""Writing a Hugging Face checkpoint: who writes which file is planned first, then each file is written once,
front to back, by one rank, without a rank ever holding more than the tensor it writes.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from converters.hf_reader import INDEX_FILE, SINGLE_FILE
from converters.journal import Checksum, Entry, Journal
from converters.output import open_at, write_all
from converters.pending import disk_errors
from converters.safetensors_format import TensorSpec, serialize_header

MIN_RANK_BYTES = 64 << 20
"""A rank writes a file of its own only for more than this: a small model should not come in many files."""


@dataclass(frozen=True)
class PlannedFile:
    """One safetensors file, the tensors in it in their order, and the rank that writes it."""

    name: str
    specs: tuple[TensorSpec, ...]
    rank: int


def in_writing_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Wider dtypes first, otherwise as given: so each tensor starts at a multiple of its item size."""
    return sorted(specs, key=lambda spec: -spec.dtype.itemsize)


def plan_files(specs_by_rank: Sequence[Sequence[TensorSpec]], max_shard_bytes: int) -> list[PlannedFile]:
    """Cut each rank's tensors (in writing order) into files of at most `max_shard_bytes`, numbered through.

    A tensor that is larger has a file to itself.
    """
    groups: list[tuple[int, list[TensorSpec]]] = []
    for rank, specs in enumerate(specs_by_rank):
        filled = max_shard_bytes
        for spec in specs:
            if filled + spec.nbytes > max_shard_bytes:
                groups.append((rank, []))
                filled = 0
            groups[-1][1].append(spec)
            filled += spec.nbytes
    if len(groups) == 1:
        return [PlannedFile(SINGLE_FILE, tuple(groups[0][1]), groups[0][0])]
    return [
        PlannedFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(specs), rank)
        for number, (rank, specs) in enumerate(groups, start=1)
    ]


def share_out(specs: Sequence[TensorSpec], ranks: int) -> list[list[TensorSpec]]:
    """Cut tensors into consecutive runs of about equal bytes, one a rank; fewer ranks share a small model."""
    total = sum(spec.nbytes for spec in specs)
    used = max(1, min(ranks, -(-total // MIN_RANK_BYTES)))
    shares: list[list[TensorSpec]] = [[] for _ in range(ranks)]
    done = 0
    for spec in specs:
        middle = done + spec.nbytes / 2
        shares[min(int(middle * used / total), used - 1) if total else 0].append(spec)
        done += spec.nbytes
    return shares


def write_index(folder: Path, files: Sequence[PlannedFile]) -> None:
    """The index that says which file holds which tensor; a single file needs none."""
    if len(files) == 1:
        return
    weight_map = {spec.name: file.name for file in files for spec in file.specs}
    total = sum(spec.nbytes for file in files for spec in file.specs)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with disk_errors(folder / INDEX_FILE):
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class HFWriter:
    """Writes one rank's files. Tensors must come in the planned order, each whole or in consecutive parts.

    journal: is told of each part, and of how much an earlier attempt has left; the parts that it has kept must be
    told with `skip`, and are not written again.
    Raises UserError if the disk is full or refuses.
    """

    def __init__(
        self, folder: Path, files: Sequence[PlannedFile], rank: int = 0, journal: Journal | None = None
    ) -> None:
        self._folder = folder
        self._journal = journal
        self._files = [file for file in files if file.rank == rank]
        self._pending = [(file, spec) for file in self._files for spec in file.specs]
        self._position = 0
        self._filled = 0
        self._open: tuple[PlannedFile, BinaryIO] | None = None

    def write(self, name: str, part: torch.Tensor) -> None:
        """Append `part` (row-major, of the planned dtype) to tensor `name`."""
        file = self._due(name, part.nbytes, part.dtype)
        with disk_errors(self._folder / file.name):
            stream, start, checksum = self._stream(file)
            data = memoryview(part.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
            write_all(stream, data, checksum)
            if self._journal and checksum:
                self._journal.add(Entry(file.name, start, stream.tell(), checksum.value))
        self._advance(part.nbytes)

    def skip(self, name: str, nbytes: int) -> None:
        """The next part of `name` is on disk already."""
        self._due(name, nbytes, None)
        self._advance(nbytes)

    def _due(self, name: str, nbytes: int, dtype: torch.dtype | None) -> PlannedFile:
        file, spec = self._pending[self._position]
        if name != spec.name or dtype not in (None, spec.dtype) or self._filled + nbytes > spec.nbytes:
            raise ValueError(f"{spec} is due at byte {self._filled}, not {nbytes} bytes of {name}")
        return file

    def _advance(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled == self._pending[self._position][1].nbytes:
            self._position, self._filled = self._position + 1, 0

    def close(self) -> None:
        """Finish the last file. Raises ValueError if planned tensors were not written."""
        self._close_file()
        if self._position < len(self._pending):
            raise ValueError(f"{self._pending[self._position][1]} and what follows was never written")

    def __enter__(self) -> "HFWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def abandon(self) -> None:
        """Close what is open after a failure; the files are incomplete."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _stream(self, file: PlannedFile) -> tuple[BinaryIO, int, Checksum | None]:
        """The file to write to, where the next piece starts, and the checksum of what of it is written (a header)."""
        checksum = Checksum() if self._journal else None
        if self._open is not None and self._open[0] is file:
            return self._open[1], self._open[1].tell(), checksum
        self._close_file()
        kept = self._journal.end_of(file.name) if self._journal else 0
        # Unbuffered: parts are large, and an error shows at the write that caused it.
        stream = open_at(self._folder / file.name, kept)
        self._open = file, stream
        if not kept:
            write_all(stream, memoryview(serialize_header(file.specs)), checksum)
        return stream, kept, checksum

    def _close_file(self) -> None:
        if self._open is not None:
            file, stream = self._open
            self._open = None
            with disk_errors(self._folder / file.name):
                stream.close()
