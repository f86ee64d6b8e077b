"""What a conversion has written, so that one that was killed is taken up where it stopped.

Each process keeps a journal: a line for each piece that is in its file, with a checksum of its bytes. When the
conversion starts again the pieces are read back; the first that does not agree, and all after it, are written
anew. So nothing depends on how much of a file reached the disk.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from converters.pending import disk_errors

READ_BYTES = 1 << 20


class Checksum:
    """Sum of the 64-bit words of a stream of bytes, modulo 2^64: shows lost pages and cut ends at the speed of memory.

    It does not depend on how the stream is cut into updates.
    """

    def __init__(self) -> None:
        self._sum, self._length, self._rest = 0, 0, b""

    def update(self, data: bytes | memoryview) -> None:
        self._length += len(data)
        if self._rest:
            missing = 8 - len(self._rest)
            self._rest, data = self._rest + bytes(data[:missing]), data[missing:]
            if len(self._rest) < 8:
                return
            self._add(self._rest)
            self._rest = b""
        whole = len(data) // 8 * 8
        if whole:
            self._add(data[:whole])
        self._rest = bytes(data[whole:])

    @property
    def value(self) -> int:
        rest = int.from_bytes(self._rest, "little")
        return (self._sum + rest + self._length) % 2**64

    def _add(self, words: bytes | memoryview) -> None:
        self._sum += int(np.frombuffer(words, dtype="<u8").sum(dtype=np.uint64))


@dataclass(frozen=True)
class Entry:
    """Bytes `start` to `stop` of a file are written."""

    file: str
    start: int
    stop: int
    checksum: int


class Journal:
    """The journal of one process in a folder. `kept`: the pieces of an earlier attempt that are sound, in order.

    Entries must be added in the order in which pieces are planned, and each file's pieces follow one another.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        """Verifies what an earlier attempt has left: reads it once. Raises UserError if the disk refuses."""
        self._folder, self._path = folder, folder / f".journal-{rank}"
        self.kept: list[Entry] = []
        for entry in _entries(self._path):
            if not self._follows(entry) or _checksum(folder / entry.file, entry) != entry.checksum:
                break
            self.kept.append(entry)
        with disk_errors(self._path):
            partial = self._path.with_name(self._path.name + ".new")
            partial.write_text("".join(map(_line, self.kept)), encoding="utf-8")
            partial.replace(self._path)
            self._stream: BinaryIO = self._path.open("ab", buffering=0)

    @property
    def nbytes(self) -> int:
        """Bytes that need not be written again."""
        return sum(entry.stop - entry.start for entry in self.kept)

    def end_of(self, file: str) -> int:
        """How much of a file is sound."""
        return max((entry.stop for entry in self.kept if entry.file == file), default=0)

    def add(self, entry: Entry) -> None:
        with disk_errors(self._path):
            self._stream.write(_line(entry).encode())

    def close(self) -> None:
        """End the journal of a conversion that is complete: it is not part of the result."""
        self._stream.close()
        self._path.unlink(missing_ok=True)

    def _follows(self, entry: Entry) -> bool:
        last = self.kept[-1] if self.kept else None
        same_file = last is not None and last.file == entry.file
        return entry.start == (last.stop if same_file else 0) and entry.stop > entry.start


def _entries(path: Path) -> Iterator[Entry]:
    """The lines of a journal up to the first that is cut short."""
    if not path.is_file():
        return
    with contextlib.suppress(ValueError, TypeError), path.open(encoding="utf-8") as lines:
        for line in lines:
            file, *numbers = json.loads(line)
            start, stop, checksum = map(int, numbers)
            if os.sep in file:
                return
            yield Entry(file, start, stop, checksum)


def _line(entry: Entry) -> str:
    return json.dumps(astuple(entry)) + "\n"


def _checksum(path: Path, entry: Entry) -> int | None:
    """Of the bytes on disk; None if they are not there."""
    checksum, buffer = Checksum(), bytearray(READ_BYTES)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            left = entry.stop - entry.start
            while left:
                count = file.readinto(memoryview(buffer)[: min(left, READ_BYTES)])
                if not count:
                    return None
                checksum.update(memoryview(buffer)[:count])
                left -= count
    except OSError:
        return None
    return checksum.value
