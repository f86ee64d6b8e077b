"""Writing the weights of a megatron-core checkpoint (torch_dist format) chunk by chunk.

The folder is one that `megatron.core.dist_checkpointing.load` reads under every layout: a PyTorch distributed
checkpoint (`.metadata` and `*.distcp`), with megatron-core's `metadata.json` and `common.pt`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

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


class MCoreWriter:
    """Writes a torch_dist folder together with the other ranks: each some chunks, in one file of its own.

    specs: of all tensors, by key, in the order they are written. The chunks of this rank are `self.chunks`.
    """

    def __init__(self, folder: Path, specs: Sequence[TensorSpec], ranks: Ranks) -> None:
        self._folder, self._specs, self._ranks = folder, list(specs), ranks
        chunks = [
            (spec, region)
            for spec in self._specs
            for region in slabs(spec.shape, spec.dtype.itemsize, CHUNK_BYTES)
        ]
        total = sum(spec.nbytes for spec in self._specs)
        self.chunks: list[tuple[TensorSpec, Region]] = []
        self._contents = Contents()
        done = 0
        for spec, region in chunks:
            if min(done * ranks.size // max(total, 1), ranks.size - 1) == ranks.rank:
                self.chunks.append((spec, region))
            done += nbytes_of(spec, region)

    def write(self, fill: Callable[[TensorSpec, Region, torch.Tensor], None]) -> None:
        """Write this rank's chunks; `fill` gives the values of a region, in a thread that reads ahead.

        Raises UserError if the disk is full or refuses.
        """
        if not self.chunks:
            return
        path = self._folder / f"__{self._ranks.rank}_0.distcp"

        def filled(chunk: tuple[TensorSpec, Region], buffers: Buffers) -> torch.Tensor:
            spec, region = chunk
            values = buffers.tensor(region_shape(region), spec.dtype)
            fill(spec, region, values)
            return values

        with TensorFile(path) as file:
            for (spec, region), values in read_ahead(self.chunks, filled):
                place = (path.name, *file.save(values))
                self._contents.shards.append(StoredShard(spec.name, spec.shape, spec.dtype, region, *place))

    def finish(self) -> None:
        """Write what makes the folder a checkpoint. Collective, after every rank's `write`."""
        contents = self._ranks.collect(self._contents)
        if self._ranks.is_first:
            write_contents(self._folder, contents, {"content_metadata": dict(METADATA)})


def nbytes_of(spec: TensorSpec, region: Region) -> int:
    """Bytes of a region of a tensor."""
    return TensorSpec(spec.name, region_shape(region), spec.dtype).nbytes
