"""The token cache: samples on disk, memory-mapped; a store is either complete or absent.

A folder `<key>` holds one data set; the key is a hash of everything its tokens depend on. It is written under
a temporary name and renamed when complete, so a killed run leaves at most a `.tmp-` folder, which the next
builder removes.

    ids.bin      int32 [tokens]             token ids of all samples, end to end
    weights.bin  uint8 or float32 [tokens]  how much each token counts as a target
    offsets.bin  int64 [samples + 1]        where each sample starts
    index.bin    int64 [n]                  the samples of the data set in order; absent if it is 0, 1, 2, ...
    rows.jsonl   the original rows; only for a validation set that was split off
    meta.json    sizes, checksums, report
"""

import errno
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .encode import Encoded
from .report import PartReport

FORMAT = 1  # increase it when the same rows give different tokens, or the file format changes
_CHECKED_WHOLE = 256 << 20  # files up to this many bytes are checked against their checksum when opened


class TokenStore:
    """A complete cache folder, memory-mapped. Sample i has `lengths[i]` tokens: `ids(i)` and `weights(i)`."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta
        sizes = meta["files"]
        self._ids = _map(path / "ids.bin", np.int32)
        self._weights = _map(path / "weights.bin", np.dtype(meta["weights"]))
        self._offsets = _map(path / "offsets.bin", np.int64)
        self._index = _map(path / "index.bin", np.int64) if "index.bin" in sizes else None
        lengths = np.diff(self._offsets)
        self.lengths: np.ndarray = lengths if self._index is None else lengths[self._index]

    @property
    def key(self) -> str:
        return self.meta["key"]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def report(self) -> PartReport:
        """What happened to the rows that it was built from."""
        report = PartReport(**self.meta["report"])
        report.longest = int(self.lengths.max())
        return report

    def ids(self, sample: int) -> np.ndarray:
        """Token ids of a sample, int32 [length], a view of the file."""
        return self._ids[self._span(sample)]

    def weights(self, sample: int) -> np.ndarray:
        """Weight of each token of a sample as a target, uint8 or float32 [length], a view of the file."""
        return self._weights[self._span(sample)]

    def _span(self, sample: int) -> slice:
        at = sample if self._index is None else self._index[sample]
        return slice(self._offsets[at], self._offsets[at + 1])


def _map(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def open_store(path: Path, check: bool = False) -> TokenStore | None:
    """The store at `path`, or None if there is no complete one. check: compare checksums, too."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        if meta["format"] != FORMAT or meta["key"] != path.name:
            return None
        for name, (size, crc) in meta["files"].items():
            file = path / name
            if file.stat().st_size != size:
                return None
            if check and size <= _CHECKED_WHOLE and _crc(file) != crc:
                return None
        return TokenStore(path, meta)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


class _File:
    """A file of the cache being written, with its running checksum."""

    def __init__(self, path: Path) -> None:
        self.path, self.crc, self.size = path, 0, 0
        self._file = path.open("wb", buffering=1 << 20)

    def write(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).view(np.uint8).data
        self._file.write(data)
        self.crc, self.size = zlib.crc32(data, self.crc), self.size + len(data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class TokenWriter:
    """Writes one store into the folder `path`, sample by sample; `finish` completes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)
        self._ids, self._weights = _File(path / "ids.bin"), _File(path / "weights.bin")
        self._offsets = _File(path / "offsets.bin")
        self._offsets.write(np.zeros(1, np.int64))
        self._rows: list[np.ndarray] = []
        self._floats = False
        self.tokens = self.samples = 0

    def append(self, encoded: Encoded) -> None:
        """Add samples, in order."""
        weights = encoded.weights
        if weights.dtype != np.uint8 and not self._floats:
            self._to_floats()
        self._ids.write(encoded.ids)
        self._weights.write(weights.astype(np.float32) if self._floats else weights)
        self._offsets.write(self.tokens + np.cumsum(encoded.lengths, dtype=np.int64))
        self._rows.append(encoded.rows)
        self.tokens += len(encoded.ids)
        self.samples += len(encoded.lengths)

    def rows(self) -> np.ndarray:
        """The row that each sample is from, int64 [samples], ascending with repeats."""
        return np.concatenate(self._rows) if self._rows else np.zeros(0, np.int64)

    def _to_floats(self) -> None:
        """Rewrite all weights as float32, when the first one that is neither 0 nor 1 comes."""
        self._floats = True
        self._weights.close()
        old = self.path / "weights.uint8"
        self._weights.path.rename(old)
        self._weights = _File(self.path / "weights.bin")
        with old.open("rb") as file:
            while block := file.read(1 << 20):
                self._weights.write(np.frombuffer(block, np.uint8).astype(np.float32))
        old.unlink()

    def finish(
        self, key: str, index: np.ndarray | None, report: dict[str, Any], others: Sequence[Path] = ()
    ) -> None:
        """Write the index and `meta.json`, which makes the folder a store. others: files that it already contains."""
        files = [self._ids, self._weights, self._offsets]
        if index is not None:
            files.append(_File(self.path / "index.bin"))
            files[-1].write(index.astype(np.int64))
        for file in files:
            file.close()
        meta = {
            "format": FORMAT,
            "key": key,
            "weights": "float32" if self._floats else "uint8",
            "files": {file.path.name: [file.size, file.crc] for file in files}
            | {path.name: [path.stat().st_size, _crc(path)] for path in others},
            "report": report,
        }
        (self.path / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to `path` on success and removed on failure.

    Raises UserError if the disk is full or cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        for left_over in path.parent.glob(
            f"{path.name}.tmp-*"
        ):  # left by killed builders: no other is active, since this one holds the lock
            shutil.rmtree(left_over, ignore_errors=True)
        yield temporary
        if path.exists():  # broken, or to be rebuilt
            broken = path.with_name(f"{temporary.name}.old")
            path.rename(broken)
            temporary.rename(path)
            shutil.rmtree(broken, ignore_errors=True)
        else:
            temporary.rename(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_error(error, path.parent) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def disk_error(error: OSError, folder: Path) -> UserError:
    """The error for a disk that is full, or cannot be written for another reason."""
    remedy = "free some space, or give another place with --cache_dir DIR or MCORE_SWIFT_CACHE=DIR"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"{folder}: the disk is full, the token cache could not be written", remedy)
    return UserError(f"{folder}: the token cache cannot be written here ({error.strerror or error})", remedy)
