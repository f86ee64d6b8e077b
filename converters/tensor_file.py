"""A file of tensors, each in torch.save's format, one after the other: what a torch_dist folder is made of."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from converters.pending import disk_errors


@contextmanager
def _no_checksums() -> Iterator[None]:
    """Checksums take as long as all the rest, and torch.load looks at none."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class TensorFile(io.RawIOBase):
    """Open for writing; a full disk raises UserError, where torch.save alone hides it behind an error of its own.

    with TensorFile(folder / "__0_0.distcp") as file:
        start, length = file.save(tensor)
    """

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self._error: OSError | None = None
        with disk_errors(path):
            # Unbuffered: tensors are large, and an error shows at the write that caused it.
            self._raw = path.open("wb", buffering=0)

    def save(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Append a tensor, with its whole storage; returns at which byte it starts and how many bytes it took."""
        start = self._at
        with disk_errors(self._path), _no_checksums():
            try:
                torch.save(tensor, self)
            except RuntimeError:
                if self._error is None:
                    raise
                raise self._error from None
        return start, self._at - start

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        size = len(rest)
        try:
            while rest:
                rest = rest[self._raw.write(rest) :]
        except OSError as error:
            self._error = error
            raise
        self._at += size
        return size

    def close(self) -> None:
        if not self.closed:
            with disk_errors(self._path):
                self._raw.close()
        super().close()
