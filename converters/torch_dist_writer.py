"""Writing the weights of a megatron-core checkpoint (torch_dist format) chunk by chunk.

The folder is one that `megatron.core.dist_checkpointing.load` reads under every layout: a PyTorch distributed
checkpoint (`.metadata` and `*.distcp`), with megatron-core's `metadata.json` and `common.pt`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from converters.journal import Journal
from converters.ranks import Ranks
from converters.read_ahead import read_ahead
from converters.regions import slabs
from converters.safetensors_format import TensorSpec
from converters.shard_files import Contents, StoredShard, write_contents
from converters.stored import Buffers
from converters.tensor_file import TensorFile
from mcore_swift.models.rules import Region, region_shape
from mcore_swift.models.shards import METADATA

CHUNK_BYTES = 32 << 20
"""Largest chunk that is written: what a reader of any layout fetches to get a part of it."""


Chunk = tuple[TensorSpec, Region]


def share_chunks(
    specs: Sequence[TensorSpec], ranks: int, chunk_bytes: int | None = None
) -> list[list[Chunk]]:
    """Cut tensors into chunks and those into consecutive runs of about equal bytes, one a rank."""
    total = max(1, sum(spec.nbytes for spec in specs))
    shares: list[list[Chunk]] = [[] for _ in range(ranks)]
    done = 0
    for spec in specs:
        for region in slabs(spec.shape, spec.dtype.itemsize, chunk_bytes or CHUNK_BYTES):
            shares[min(done * ranks // total, ranks - 1)].append((spec, region))
            done += nbytes_of(spec, region)
    return shares


class MCoreWriter:
    """Writes a torch_dist folder together with the other ranks: each some chunks, in one file of its own.

    chunks: of this rank, in the order they are written. journal: see converters/journal.py; chunks that it has kept
    are not written again.
    """

    def __init__(
        self, folder: Path, chunks: Sequence[Chunk], ranks: Ranks, journal: Journal | None = None
    ) -> None:
        self._folder, self._chunks, self._ranks, self._journal = folder, chunks, ranks, journal
        self._contents = Contents()

    @property
    def file(self) -> str:
        """Name of this rank's file."""
        return file_of(self._ranks.rank)

    def write(self, fill: Callable[[TensorSpec, Region, torch.Tensor], None]) -> None:
        """Write this rank's chunks; `fill` gives the values of a region, in a thread that reads ahead.

        Raises UserError if the disk is full or refuses.
        """
        if not self._chunks:
            return
        kept = self._journal.kept if self._journal else []
        for (spec, region), entry in zip(self._chunks, kept, strict=False):
            self._note(spec, region, entry.start, entry.stop - entry.start)

        def filled(chunk: Chunk, buffers: Buffers) -> torch.Tensor:
            spec, region = chunk
            values = buffers.tensor(region_shape(region), spec.dtype)
            fill(spec, region, values)
            return values

        with TensorFile(self._folder / self.file, self._journal) as file:
            for (spec, region), values in read_ahead(self._chunks[len(kept) :], filled):
                self._note(spec, region, *file.save(values))

    def finish(self) -> None:
        """Write what makes the folder a checkpoint. Collective, after every rank's `write`."""
        contents = self._ranks.collect(self._contents)
        if self._ranks.is_first:
            write_contents(self._folder, contents, {"content_metadata": dict(METADATA)})

    def _note(self, spec: TensorSpec, region: Region, start: int, length: int) -> None:
        self._contents.shards.append(
            StoredShard(spec.name, spec.shape, spec.dtype, region, self.file, start, length)
        )


def file_of(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"__{rank}_0.distcp"


def nbytes_of(spec: TensorSpec, region: Region) -> int:
    """Bytes of a region of a tensor."""
    return TensorSpec(spec.name, region_shape(region), spec.dtype).nbytes
