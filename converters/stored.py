"""Reading regions of tensors that are stored row-major in files, without reading the rest.

Files are read with pread, into the target itself or a reused buffer. Nothing is memory-mapped, so that file pages do
not count as memory of the process, however large the checkpoint is.
"""

import math
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

from mcore_swift.errors import UserError
from mcore_swift.models.rules import Region, Shape, region_shape

STAGING_BYTES = 8 << 20
"""Size of the buffer for data that cannot be read straight into its target."""

DIRECT_RUN_BYTES = 4 << 10
"""Columns narrower than this (a disk page) are cut out of whole rows in memory."""

MAX_OPEN_FILES = 64


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: row-major from byte `offset` of the file `path`."""

    path: Path
    offset: int
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def parts(self) -> "tuple[StoredTensor, ...]":
        """The stored tensors that are read for it."""
        return (self,)

    def copy(self, reader: "RegionReader", region: Region, out: torch.Tensor) -> None:
        """Fill `out` from a region, see `RegionReader.copy`."""
        reader.copy(self, region, out)


class RegionReader:
    """Copies regions of stored tensors into tensors. Not safe for use by several threads at once.

    staging_bytes: size of the buffer for data that cannot be read straight into its target.
    """

    def __init__(self, staging_bytes: int | None = None) -> None:
        self.staging_bytes = staging_bytes or STAGING_BYTES
        self.bytes_read = 0
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._buffer: torch.Tensor | None = None

    def copy(self, stored: StoredTensor, region: Region, out: torch.Tensor) -> None:
        """Fill `out`, of the region's shape and any dtype, device or strides, from `region` of `stored`.

        Raises UserError if the file ends before the region does.
        """
        if tuple(out.shape) != region_shape(region) or len(region) != len(stored.shape):
            raise ValueError(f"cannot copy region {region} of {stored} into a tensor {tuple(out.shape)}")
        if out.numel() == 0:
            return
        out = out.detach()
        if not region:
            region, out = ((0, 1),), out.reshape(1)
        self._copy(stored, stored.offset, stored.shape or (1,), region, out)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
        self._buffer = None

    def __enter__(self) -> "RegionReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _copy(
        self, stored: StoredTensor, offset: int, shape: Shape, region: Region, out: torch.Tensor
    ) -> None:
        row_bytes = stored.dtype.itemsize * math.prod(shape[1:])
        (start, stop), *rest = region
        offset += start * row_bytes
        if tuple(rest) == tuple((0, size) for size in shape[1:]):
            self._copy_run(stored, offset, out)
        elif stop - start > 1 and tuple(rest[1:]) == tuple((0, size) for size in shape[2:]):
            column_bytes = row_bytes // shape[1]
            self._copy_columns(stored, offset + rest[0][0] * column_bytes, row_bytes, out)
        else:
            for row in range(stop - start):
                self._copy(stored, offset + row * row_bytes, shape[1:], tuple(rest), out[row])

    def _copy_run(self, stored: StoredTensor, offset: int, out: torch.Tensor) -> None:
        """`out.numel()` consecutive values."""
        if _is_plain(out, stored.dtype):
            self._pread(stored.path, _bytes_of(out), offset)
            return
        row_bytes = out[0].numel() * stored.dtype.itemsize
        if row_bytes > self.staging_bytes and out.dim() > 1:
            for row in range(out.shape[0]):
                self._copy_run(stored, offset + row * row_bytes, out[row])
            return
        rows = max(1, self.staging_bytes // row_bytes)
        for first in range(0, out.shape[0], rows):
            part = out[first : first + rows]
            staged = self._staging(part.shape[0] * row_bytes)
            self._pread(stored.path, _bytes_of(staged), offset + first * row_bytes)
            part.copy_(staged.view(stored.dtype).view(part.shape))

    def _copy_columns(self, stored: StoredTensor, offset: int, row_bytes: int, out: torch.Tensor) -> None:
        """The same columns of consecutive rows: `out.shape[0]` runs whose starts are `row_bytes` apart."""
        run_bytes = out[0].numel() * stored.dtype.itemsize
        if run_bytes >= DIRECT_RUN_BYTES or row_bytes > self.staging_bytes:
            if _is_plain(out, stored.dtype):
                target = _bytes_of(out)
                for row in range(out.shape[0]):
                    run = target[row * run_bytes : (row + 1) * run_bytes]
                    self._pread(stored.path, run, offset + row * row_bytes)
            else:
                for row in range(out.shape[0]):
                    self._copy_run(stored, offset + row * row_bytes, out[row])
            return
        rows = self.staging_bytes // row_bytes
        for first in range(0, out.shape[0], rows):
            part = out[first : first + rows]
            span = (part.shape[0] - 1) * row_bytes + run_bytes
            staged = self._staging(part.shape[0] * row_bytes)
            self._pread(stored.path, _bytes_of(staged[:span]), offset + first * row_bytes)
            columns = staged.view(part.shape[0], row_bytes)[:, :run_bytes].view(stored.dtype)
            part.copy_(columns.reshape(part.shape) if part.dim() != 2 else columns)

    def _staging(self, size: int) -> torch.Tensor:
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = torch.empty(max(size, self.staging_bytes), dtype=torch.uint8)
        return self._buffer[:size]

    def _pread(self, path: Path, target: memoryview, offset: int) -> None:
        done = 0
        while done < len(target):
            count = os.preadv(self._descriptor(path), [target[done:]], offset + done)
            if count == 0:
                raise UserError(
                    f"{path} ends at byte {offset + done}, before the tensor that is read from it",
                    remedy="the file was cut short or changed while it was read: get it again",
                )
            done += count
        self.bytes_read += done

    def _descriptor(self, path: Path) -> int:
        descriptor = self._open.get(path)
        if descriptor is None:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            descriptor = self._open[path] = os.open(path, os.O_RDONLY)
        self._open.move_to_end(path)
        return descriptor


class Buffers:
    """One piece of memory lent out as tensors of any shape: fresh memory costs more than reading into it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8).numpy()

    def tensor(self, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """Contiguous and uninitialised; valid until the next call. Its storage is just its own bytes."""
        size = StoredTensor(Path(), 0, shape, dtype).nbytes
        if self._memory.size < size:
            self._memory = torch.empty(size, dtype=torch.uint8).numpy()
        return torch.from_numpy(self._memory[:size]).view(dtype).view(shape)


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the bytes of a file can go straight into a tensor's memory."""
    return tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    # Not reshape(-1): a tensor of one element counts as contiguous whatever its stride.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy())
