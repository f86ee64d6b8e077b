"""Other stores with the interface of the token cache: indexed datasets, joined stores, rows cut from a stream.

A store has `lengths` (int64 [samples]), `ids(sample)` and `weights(sample)` (1-D, of that length), and a `report`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from .indexed import IndexedTokens
from .order import PACK, permutation
from .report import PartReport

_CHECKED_WHOLE = (
    1 << 30
)  # so many tokens of a corpus are checked before training, the others when they are read
_BLOCK = 1 << 24


class Store(Protocol):
    """Samples by number."""

    lengths: np.ndarray
    report: PartReport

    def ids(self, sample: int) -> np.ndarray: ...

    def weights(self, sample: int) -> np.ndarray: ...


class IndexedStore:
    """The documents of a Megatron dataset, longer ones cut into pieces of `max_length` tokens.

    documents: numbers of the documents to take, in order; None: all. truncation_strategy: `left` and `right` keep only
    the end or the beginning of a long document; any other cuts it into pieces, as is usual for such corpora.
    """

    def __init__(
        self,
        idx: Path,
        documents: np.ndarray | None,
        max_length: int | None,
        truncation_strategy: str,
        vocab_size: int,
    ) -> None:
        self._source, self._vocab_size = IndexedTokens(idx), vocab_size
        starts, lengths = self._source.starts, self._source.lengths
        if documents is not None:
            starts, lengths = starts[documents], lengths[documents]
        rows, cut = len(lengths), 0
        if max_length is not None:
            if truncation_strategy in ("left", "right"):
                cut = int((lengths > max_length).sum())
            starts, lengths = _cut(starts, lengths, max_length, truncation_strategy)
        learnable = lengths > 1  # the first token is never a target
        self._starts, self.lengths = starts[learnable], lengths[learnable]
        tokens = int(self.lengths.sum())
        longest = int(self.lengths.max(initial=0))
        self.report = PartReport(rows, len(self.lengths), tokens, tokens, longest, truncated=cut)
        if dropped := int((~learnable).sum()):
            self.report.dropped["nothing to learn"] = dropped
            self.report.examples["nothing to learn"] = [f"{idx}: documents or ends of one token or none"]

    def check(self) -> None:
        """Raise UserError for a token outside the model's vocabulary, among the first `_CHECKED_WHOLE`."""
        for start in range(0, min(len(self._source.tokens), _CHECKED_WHOLE), _BLOCK):
            self._source.refuse_ids(start, start + _BLOCK, self._vocab_size)

    def ids(self, sample: int) -> np.ndarray:
        start, stop = int(self._starts[sample]), int(self._starts[sample] + self.lengths[sample])
        if stop > _CHECKED_WHOLE:
            self._source.refuse_ids(start, stop, self._vocab_size)
        return self._source.tokens[start:stop]

    def weights(self, sample: int) -> np.ndarray:
        return np.ones(self.lengths[sample], np.uint8)


def _cut(starts: np.ndarray, lengths: np.ndarray, limit: int, strategy: str) -> tuple[np.ndarray, np.ndarray]:
    if strategy in ("left", "right"):
        kept = np.minimum(lengths, limit)
        return (starts + lengths - kept if strategy == "left" else starts), kept
    pieces = np.maximum(1, -(-lengths // limit))
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # within the document
    return np.repeat(starts, pieces) + number * limit, np.minimum(
        np.repeat(lengths, pieces) - number * limit, limit
    )


class JoinedStore:
    """Several stores as one, with their samples numbered store after store."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = list(stores)
        self.lengths = np.concatenate([store.lengths for store in self.stores])
        self.starts = np.cumsum([0, *(len(store.lengths) for store in self.stores)])
        self.report = PartReport.sum(store.report for store in self.stores)

    def ids(self, sample: int) -> np.ndarray:
        store, at = self._place(sample)
        return store.ids(at)

    def weights(self, sample: int) -> np.ndarray:
        store, at = self._place(sample)
        return store.weights(at)

    def _place(self, sample: int) -> tuple[Store, int]:
        number = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self.stores[number], int(sample - self.starts[number])


class StreamStore:
    """Rows of `length` tokens cut from the samples of a store laid end to end, as in Megatron's GPT datasets.

    Adjacent rows share a token, so that every token except the very first is a target once. A document may continue
    in the next row, and attention within a row crosses document boundaries. seed: shuffles the documents; None keeps
    their order. The last row may be shorter.
    """

    def __init__(self, store: Store, length: int, seed: int | None) -> None:
        n = len(store.lengths)
        self._store, self._length = store, length
        self._order = np.arange(n) if seed is None else permutation(n, seed, PACK)
        self._ends = np.cumsum(store.lengths[self._order])
        tokens = int(self._ends[-1])
        rows = max(1, -(-(tokens - 1) // (length - 1)))
        self.lengths = np.minimum(np.full(rows, length), tokens - np.arange(rows) * (length - 1))
        self.report = store.report

    def ids(self, sample: int) -> np.ndarray:
        return self._row(sample, self._store.ids)

    def weights(self, sample: int) -> np.ndarray:
        return self._row(sample, self._store.weights)

    def _row(self, row: int, read) -> np.ndarray:
        start = row * (self._length - 1)
        stop = start + int(self.lengths[row])
        parts = []
        at = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            document, end = int(self._order[at]), int(self._ends[at])
            begin = end - int(self._store.lengths[document])
            parts.append(read(document)[start - begin : min(stop, end) - begin])
            start, at = end, at + 1
        return np.concatenate(parts)
