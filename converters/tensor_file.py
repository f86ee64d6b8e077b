"""The files of a torch_dist folder: tensors in torch.save's format, one after the other."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from converters.journal import Checksum, Entry, Journal
from converters.output import open_at, write_all
from converters.pending import disk_errors


@contextmanager
def _no_checksums() -> Iterator[None]:
    """Turn off torch.save's checksums, which take half of the time and which torch.load does not verify."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class TensorFile(io.RawIOBase):
    """A file opened for writing. A full disk raises UserError, which torch.save would hide behind its own error.

    with TensorFile(folder / "__0_0.distcp") as file:
        start, length = file.save(tensor)

    journal: records each tensor, and knows how much of the file an earlier attempt has written.
    """

    def __init__(self, path: Path, journal: Journal | None = None) -> None:
        self._path, self._journal = path, journal
        self._at = journal.end_of(path.name) if journal else 0
        self._checksum: Checksum | None = None
        self._error: OSError | None = None
        with disk_errors(path):
            # Unbuffered: tensors are large, and an error shows at the write that caused it.
            self._raw = open_at(path, self._at)

    def save(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Append a tensor with its whole storage; returns its first byte and its number of bytes."""
        start = self._at
        self._checksum = Checksum() if self._journal else None
        with disk_errors(self._path), _no_checksums():
            try:
                torch.save(tensor, self)
            except RuntimeError:
                if self._error is None:
                    raise
                raise self._error from None
        if self._journal and self._checksum:
            self._journal.add(Entry(self._path.name, start, self._at, self._checksum.value))
        return start, self._at - start

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            write_all(self._raw, rest, self._checksum)
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
