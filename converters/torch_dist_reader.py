"""Reading the weights of a megatron-core checkpoint (torch_dist format) by regions.

A torch_dist folder is a PyTorch distributed checkpoint: `.metadata` (a pickle) says where each chunk of each tensor is
in the `*.distcp` files, and each chunk is a zip container written by `torch.save`. The raw values are located inside
that container, so that a region can be read without the rest.
"""

import io
import itertools
import pickle
import struct
import zipfile
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converters.regions import intersection, numel, relative
from converters.safetensors_format import TensorSpec
from converters.stored import RegionReader, StoredTensor
from mcore_swift.errors import UserError
from mcore_swift.models.rules import Region, Shape, as_slices, region_shape

MODEL_ROOTS = frozenset({"embedding", "encoder", "decoder", "output_layer", "mtp"})
"""First names of a GPT model's weights; other tensors of a checkpoint are the optimizer's."""


@dataclass(frozen=True)
class Chunk:
    """A stored part of a tensor: its region, and the bytes of its zip container in the file."""

    region: Region
    path: Path
    offset: int
    length: int


class _Order:
    """The chunks of a tensor, sorted along its first dimension; a large tensor has thousands."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = sorted(chunks, key=lambda chunk: chunk.region[:1])
        spans = [chunk.region[0] if chunk.region else (0, 1) for chunk in self._chunks]
        self._starts = [start for start, _ in spans]
        self._furthest = list(itertools.accumulate((stop for _, stop in spans), max))

    def near(self, region: Region) -> Sequence[Chunk]:
        """All chunks that may overlap a region, and few others."""
        start, stop = region[0] if region else (0, 1)
        return self._chunks[bisect_right(self._furthest, start) : bisect_left(self._starts, stop)]


class MCoreReader:
    """The weights of a torch_dist folder, by megatron-core key. Opening reads only the metadata.

    Raises UserError if the folder is not a complete torch_dist checkpoint.
    """

    def __init__(
        self,
        folder: str | Path,
        roots: frozenset[str] = MODEL_ROOTS,
        staging_bytes: int | None = None,
    ) -> None:
        """roots: the first names of keys to include; a training checkpoint also holds optimizer state.

        staging_bytes: size of the buffer for data that cannot be read straight into its target.
        """
        self.folder = find_torch_dist(folder)
        metadata = _read_metadata(self.folder)
        self.specs: dict[str, TensorSpec] = {}
        self._chunks: dict[str, list[Chunk]] = {}
        self._stored: dict[Chunk, StoredTensor | torch.Tensor] = {}
        self._reader = RegionReader(staging_bytes)
        for key, stored in metadata.state_dict_metadata.items():
            if hasattr(stored, "chunks") and key.split(".")[0] in roots:
                self.specs[key] = TensorSpec(key, tuple(stored.size), stored.properties.dtype)
                self._chunks[key] = []
        for index, place in metadata.storage_data.items():
            if index.fqn in self._chunks:
                chunk = _find_chunk(metadata.state_dict_metadata[index.fqn].chunks, tuple(index.offset))
                path = self.folder / place.relative_path
                self._chunks[index.fqn].append(Chunk(chunk, path, place.offset, place.length))
        self._order = {key: _Order(chunks) for key, chunks in self._chunks.items()}
        self._check_files()

    @property
    def shapes(self) -> dict[str, Shape]:
        return {key: spec.shape for key, spec in self.specs.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def files(self) -> set[Path]:
        """All files that are read."""
        chunks = {chunk.path for chunks in self._chunks.values() for chunk in chunks}
        return chunks | {self.folder / ".metadata"}

    def files_of(self, key: str, region: Region) -> Iterator[tuple[Path, int]]:
        """Which files are read for a region, and how many bytes of each."""
        for chunk in self._order[key].near(region):
            common = intersection(chunk.region, region)
            if common is not None:
                yield chunk.path, numel(common) * self.specs[key].dtype.itemsize

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read

    def copy_into(self, key: str, region: Region, out: torch.Tensor) -> None:
        """Fill `out`, of the region's shape, converting to its dtype and device.

        Raises UserError if the checkpoint's chunks do not cover the region.
        """
        covered = 0
        for chunk in self._order[key].near(region):
            common = intersection(chunk.region, region)
            if common is not None:
                target = out[as_slices(relative(common, region))]
                self._copy_chunk(self.specs[key], chunk, relative(common, chunk.region), target)
                covered += target.numel()
        if covered < out.numel():
            raise UserError(
                f"{self.folder} holds only a part of {key}",
                remedy="the checkpoint is incomplete: use another",
            )

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> "MCoreReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _copy_chunk(self, spec: TensorSpec, chunk: Chunk, region: Region, out: torch.Tensor) -> None:
        if chunk not in self._stored:
            self._stored[chunk] = locate_values(chunk, spec.dtype)
        stored = self._stored[chunk]
        if isinstance(stored, torch.Tensor):
            out.copy_(stored[as_slices(region)])
        else:
            self._reader.copy(stored, region, out)

    def _check_files(self) -> None:
        ends: dict[Path, int] = {}
        for chunks in self._chunks.values():
            for chunk in chunks:
                ends[chunk.path] = max(ends.get(chunk.path, 0), chunk.offset + chunk.length)
        for path, end in sorted(ends.items()):
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < end:
                what = (
                    "is missing" if size is None else f"is truncated: {end} bytes are expected, it has {size}"
                )
                raise UserError(
                    f"{path} {what}", remedy="the checkpoint is incomplete: use another, or copy it again"
                )


def find_torch_dist(folder: str | Path) -> Path:
    """`folder/mcore`, as in checkpoints of a training run, or `folder` itself, whichever is in torch_dist format.

    Raises UserError if neither is.
    """
    folder = Path(folder)
    for place in (folder / "mcore", folder):
        if (place / ".metadata").is_file():
            return place
    raise UserError(
        f"{folder} holds no megatron-core checkpoint in torch_dist format",
        remedy="give the folder of a checkpoint, such as <run>/checkpoint-100",
    )


def _read_metadata(folder: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    try:
        return FileSystemReader(folder).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        raise UserError(
            f"{folder / '.metadata'} cannot be read: {error}", remedy="use another checkpoint"
        ) from None


def _find_chunk(chunks: Sequence[Any], offset: tuple[int, ...]) -> Region:
    for chunk in chunks:
        if tuple(chunk.offsets) == offset:
            return tuple(
                (start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
            )
    raise ValueError(f"no chunk starts at {offset}")


def locate_values(chunk: Chunk, dtype: torch.dtype) -> StoredTensor | torch.Tensor:
    """Where the raw values of a saved tensor are in its file.

    A tensor that was not saved row-major is loaded and returned instead.
    """
    with chunk.path.open("rb") as file:
        file.seek(chunk.offset)
        view = _FileView(file, chunk.offset, chunk.length)
        with zipfile.ZipFile(view) as archive:
            values = [entry for entry in archive.infolist() if "/data/" in entry.filename]
            pickled = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
            view.seek(_values_start(view, pickled))
            layout = _LayoutUnpickler(io.BytesIO(view.read(pickled.file_size))).load()
        shape = region_shape(chunk.region)
        plain = StoredTensor(chunk.path, 0, shape, dtype)
        if (
            len(values) == 1
            and values[0].compress_type == zipfile.ZIP_STORED
            and values[0].file_size == plain.nbytes
            and layout == (0, shape, torch.empty(shape, device="meta").stride())
        ):
            start = _values_start(view, values[0])
            return StoredTensor(chunk.path, chunk.offset + start, shape, dtype)
        view.seek(0)
        return torch.load(view, map_location="cpu", weights_only=True)


def _values_start(archive: io.RawIOBase, entry: zipfile.ZipInfo) -> int:
    """Position of the bytes of an uncompressed entry. (zipfile could read them, but verifies checksums.)"""
    archive.seek(entry.header_offset)
    name_length, extra_length = struct.unpack("<26x2H", archive.read(30))
    return entry.header_offset + 30 + name_length + extra_length


class _FileView(io.RawIOBase):
    """A section of a file as a file object."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(target)[: max(0, self._length - self._at)])
        self._at += count
        return count


class _LayoutUnpickler(pickle.Unpickler):
    """Reads offset, size and strides from the pickle of a saved tensor, without calling anything in it."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")):
            return lambda storage, offset, size, stride, *rest: (offset, tuple(size), tuple(stride))
        return lambda *args: None

    def persistent_load(self, pid: Any) -> None:
        return None
