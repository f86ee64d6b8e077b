"""Writing and reading the shards of a running job (weights and optimizer state) in torch_dist format.

Each rank writes its own shards and can read any. Writing needs no communication until one rank writes the metadata at
the end, so it can run in the background, and a full disk on one rank does not block the others. The folder is a PyTorch
distributed checkpoint with megatron-core's metadata, which `megatron.core.dist_checkpointing.load` reads in any layout.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from converters.pending import disk_errors
from converters.regions import intersection, numel, relative
from converters.tensor_file import TensorFile
from converters.torch_dist_reader import MCoreReader
from mcore_swift.errors import UserError
from mcore_swift.models.rules import Region, Shape, as_slices
from mcore_swift.models.shards import ADAPTER, LiveShard

MEGATRON_METADATA = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Content of megatron-core's `CheckpointingConfig` (importing it takes seconds)."""


@dataclass(frozen=True)
class StoredShard:
    """Metadata of one chunk: which part of which tensor, and where its bytes are."""

    key: str
    global_shape: Shape
    dtype: torch.dtype
    region: Region
    file: str
    offset: int
    length: int


@dataclass
class Contents:
    """The chunks that one rank wrote."""

    shards: list[StoredShard] = field(default_factory=list)


def write_shards(folder: Path, rank: int, shards: Iterable[LiveShard]) -> Contents:
    """Write this rank's shards to its own file; returns where each is. Not collective.

    Raises UserError if the disk is full or not writable.
    """
    name = f"__{rank}_0.distcp"
    contents = Contents()
    with TensorFile(folder / name) as file:
        for shard in shards:
            # cloned, because torch.save writes whole storages, of which a view may be a small part
            place = file.save(shard.data.cpu().clone(memory_format=torch.contiguous_format))
            contents.shards.append(
                StoredShard(shard.key, shard.global_shape, shard.data.dtype, shard.region, name, *place)
            )
    return contents


def write_contents(folder: Path, contents: Sequence[Contents], common: Mapping[str, Any]) -> None:
    """Write the metadata that makes the files of all ranks a checkpoint. On one rank.

    common: small values for `common.pt`.
    """
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.storage import WriteResult

    results = []
    stored = [shard for part in contents for shard in part.shards]
    for shard in stored:
        index = MetadataIndex(shard.key, torch.Size(start for start, _ in shard.region))
        results.append(WriteResult(index, shard.length, _StorageInfo(shard.file, shard.offset, shard.length)))
    with disk_errors(folder):
        FileSystemWriter(folder, sync_files=False).finish(_metadata(stored), [results])
        torch.save(dict(common), folder / "common.pt")
        (folder / "metadata.json").write_text(json.dumps(MEGATRON_METADATA), encoding="utf-8")


def _metadata(stored: Iterable[StoredShard]) -> Any:
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors: dict[str, TensorStorageMetadata] = {}
    for shard in stored:
        tensor = tensors.setdefault(
            shard.key,
            TensorStorageMetadata(TensorProperties(dtype=shard.dtype), torch.Size(shard.global_shape), []),
        )
        tensor.chunks.append(
            ChunkStorageMetadata(
                torch.Size(start for start, _ in shard.region),
                torch.Size(stop - start for start, stop in shard.region),
            )
        )
    return Metadata(tensors)


def read_shards(
    folder: Path, shards: Iterable[LiveShard], names: Callable[[str], Sequence[str]] = lambda key: (key,)
) -> list[str]:
    """Fill shards from a checkpoint written in any layout. Not collective.

    names: for a key, the names to look for, of which the first that exists is used. Vocabulary padding beyond the
    saved size is filled with zeros. Returns the keys that the checkpoint does not have. Raises UserError if it has
    only a part of a tensor, or one of another shape.
    """
    missing: dict[str, None] = {}
    shards = list(shards)
    roots = frozenset(shard.key.split(".")[0] for shard in shards)
    with MCoreReader(folder, roots) as reader, torch.no_grad():
        for shard in shards:
            name = next((name for name in names(shard.key) if name in reader.specs), None)
            if name is None:
                missing[shard.key] = None
                continue
            _check_shape(folder, name, reader.specs[name].shape, shard)
            whole = tuple((0, size) for size in reader.specs[name].shape)
            common = intersection(shard.region, whole)
            if common is None or numel(common) < shard.data.numel():
                shard.data.zero_()
            if common is not None:
                reader.copy_into(name, common, shard.data[as_slices(relative(common, shard.region))])
    return list(missing)


def _check_shape(folder: Path, name: str, stored: Shape, shard: LiveShard) -> None:
    """Only the first dimension, the padded vocabulary, may differ from the saved size."""
    free = 0 if ADAPTER in name else 1
    if tuple(stored)[free:] != shard.global_shape[free:] or len(stored) != len(shard.global_shape):
        raise UserError(
            f"{folder}: {name} is {list(stored)}, and the model takes {list(shard.global_shape)}",
            "it is a checkpoint of another model, or of an adapter of another rank",
        )
