"""Opening and writing large files."""

from pathlib import Path
from typing import BinaryIO

from converters.journal import Checksum

WRITE_BYTES = 1 << 20
"""Bytes handed to the system at a time. It finds room in memory for a write of 32 MB three times as slowly as for as
many bytes in writes of 1 MB (ext4, Linux 6.18)."""


def open_at(path: Path, size: int) -> BinaryIO:
    """A file to append to, unbuffered, of which the first `size` bytes are kept."""
    if not size:
        return path.open("wb", buffering=0)
    stream = path.open("r+b", buffering=0)
    stream.truncate(size)
    stream.seek(size)
    return stream


def write_all(stream: BinaryIO, data: memoryview, checksum: Checksum | None = None) -> None:
    """Write all of `data` (bytes) to an unbuffered file, and add it to a checksum while it is in the cache."""
    for start in range(0, len(data), WRITE_BYTES):
        part = data[start : start + WRITE_BYTES]
        if checksum is not None:
            checksum.update(part)
        while part:
            part = part[stream.write(part) :]
