"""Token ids written by Megatron, `corpus.bin` and `corpus.idx`, read in place.

The format is that of megatron-core's `core/datasets/indexed_dataset.py` (version 1), little-endian. `.bin` holds the
token ids of all sequences end to end; `.idx` says where they are:

    9 bytes   MMIDIDX 0 0        uint64   version, 1        uint8   type of a token, see DTYPES
    uint64    sequences          uint64   entries of the document index
    int32 [sequences]            tokens of each sequence
    int64 [sequences]            byte at which each starts in .bin
    int64 [documents + 1]        the sequence each document begins with; the last entry is the number of sequences
"""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
DTYPES: dict[int, Any] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
_HEADER = struct.Struct("<9sQBQQ")
_WRITE_AGAIN = "write both files again with Megatron's preprocessing, or copy them again"


class IndexedTokens:
    """One pair of files, memory-mapped: documents of token ids.

    tokens: all ids `[tokens]`, in the type they are stored in. starts, lengths: first token and number of tokens of
    each document, int64 `[documents]`. Raises UserError if a file is missing, truncated or of another format.
    """

    def __init__(self, idx: Path) -> None:
        self.idx, self.bin = idx, idx.with_suffix(".bin")
        for path in (self.idx, self.bin):
            if not path.is_file():
                raise UserError(
                    f"{path}: no such file; an indexed dataset is a pair of .bin and .idx", _WRITE_AGAIN
                )
        size = idx.stat().st_size
        with idx.open("rb") as file:
            header = file.read(_HEADER.size)
        if not header.startswith(MAGIC):
            raise UserError(
                f"{idx}: is no index of Megatron's (it does not begin with MMIDIDX)", _WRITE_AGAIN
            )
        if len(header) < _HEADER.size:
            raise UserError(f"{idx}: is cut short: {size} bytes, less than its header", _WRITE_AGAIN)
        _, version, code, sequences, entries = _HEADER.unpack(header)
        if version != VERSION:
            raise UserError(f"{idx}: has version {version}; known is {VERSION}", _WRITE_AGAIN)
        if not np.issubdtype(DTYPES.get(code, np.float32), np.integer):
            raise UserError(
                f"{idx}: stores type {code}, which is no integer type for token ids", _WRITE_AGAIN
            )
        needed = _HEADER.size + 12 * sequences + 8 * entries
        if size < needed:
            raise UserError(f"{idx}: is cut short: {size} bytes, its header says {needed}", _WRITE_AGAIN)
        self.dtype = np.dtype(DTYPES[code])
        self._read(sequences, entries)

    def _read(self, sequences: int, entries: int) -> None:
        at = _HEADER.size
        lengths = self._map("<i4", at, sequences)
        pointers = self._map("<i8", at + 4 * sequences, sequences)
        first = np.asarray(self._map("<i8", at + 12 * sequences, entries), np.int64)
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if entries < 2 or first[0] != 0 or first[-1] != sequences or (np.diff(first) < 0).any():
            raise UserError(f"{self.idx}: its document index does not go from 0 to {sequences}", _WRITE_AGAIN)
        if not np.array_equal(pointers, ends[:-1] * self.dtype.itemsize):
            raise UserError(
                f"{self.idx}: its sequences do not lie end to end in {self.bin.name}", _WRITE_AGAIN
            )
        stored, needed = self.bin.stat().st_size, int(ends[-1]) * self.dtype.itemsize
        if stored != needed:
            raise UserError(
                f"{self.bin}: has {stored} bytes, and {self.idx.name} describes {needed}", _WRITE_AGAIN
            )
        self.tokens = np.memmap(self.bin, self.dtype, "r") if needed else np.zeros(0, self.dtype)
        self.starts, self.lengths = ends[first[:-1]], np.diff(ends[first])

    def _map(self, dtype: str, at: int, count: int) -> np.ndarray:
        return np.memmap(self.idx, dtype, "r", at, (count,)) if count else np.zeros(0, dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def refuse_ids(self, start: int, stop: int, vocab_size: int) -> None:
        """Raise UserError if one of the tokens `[start, stop)` is outside a vocabulary of `vocab_size`."""
        part = self.tokens[start:stop]
        if not part.size or (int(part.max()) < vocab_size and int(part.min()) >= 0):
            return
        at = start + int(np.flatnonzero((part >= vocab_size) | (part < 0))[0])
        document = int(np.searchsorted(self.starts, at, side="right")) - 1
        raise UserError(
            f"{self.bin}: token {int(self.tokens[at])} (document {document}) is no id of the model, whose "
            f"vocabulary has {vocab_size}",
            "the corpus was tokenized for another model: tokenize it with the tokenizer in --model",
        )


def write_indexed(prefix: Path, documents: Iterable[Iterable[int]], dtype: Any = np.int32) -> None:
    """Write `<prefix>.bin` and `<prefix>.idx`, each document as one sequence.

    Megatron uses uint16 for vocabularies below 65500, int32 above. Raises ValueError for an id that does not fit.
    """
    code = next(number for number, known in DTYPES.items() if np.dtype(known) == np.dtype(dtype))
    lengths = []
    with prefix.with_name(prefix.name + ".bin").open("wb") as file:
        for document in documents:
            ids = np.asarray(document if isinstance(document, np.ndarray) else list(document), np.int64)
            stored = ids.astype(dtype)
            if not np.array_equal(stored, ids):
                raise ValueError(f"document {len(lengths)} has an id that {np.dtype(dtype)} cannot hold")
            file.write(stored.tobytes())
            lengths.append(len(ids))
    counts = np.array(lengths, "<i8")
    pointers = (np.cumsum(counts) - counts) * np.dtype(dtype).itemsize
    with prefix.with_name(prefix.name + ".idx").open("wb") as file:
        file.write(_HEADER.pack(MAGIC, VERSION, code, len(counts), len(counts) + 1))
        for array in (counts.astype("<i4"), pointers.astype("<i8"), np.arange(len(counts) + 1, dtype="<i8")):
            file.write(array.tobytes())
