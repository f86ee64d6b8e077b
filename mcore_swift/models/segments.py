"""The segments of a row, and which of its tokens a context-parallel rank holds.

With N ranks, every segment is cut into 2N equal chunks, and rank r holds the r-th from the start and the r-th from the
end ("zigzag"). In causal attention the cost of a token grows with the number of tokens before it, so this gives every
rank the same work. Transformer Engine's attention expects this layout.
"""

from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor


class Piece(NamedTuple):
    """A run of a rank's tokens: the last `queries` of the row's [first, last); their segment starts at `first`."""

    queries: int
    first: int
    last: int


class Segments:
    """lengths: tokens of each segment of the whole row, padding included. size, rank: of context parallelism.
    tokens: the same without padding, if known.

    Raises ValueError if a length cannot be cut into 2 * size chunks.
    """

    def __init__(
        self,
        lengths: list[int],
        device: torch.device,
        size: int = 1,
        rank: int = 0,
        tokens: list[int] | None = None,
    ) -> None:
        if size > 1 and any(length % (2 * size) for length in lengths):
            raise ValueError(f"segments of {lengths} tokens cannot be cut into {2 * size} chunks each")
        self.lengths, self.device, self.size, self.rank = lengths, device, size, rank
        self.tokens = tokens or lengths
        self.masks: dict[int | None, Any] = {}  # by window, see attention/flex.py

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def pieces(self) -> list[Piece]:
        """This rank's tokens, in order, as runs of consecutive tokens of the row."""
        starts = list(accumulate(self.lengths, initial=0))[:-1]
        if self.size == 1:
            return [
                Piece(length, start, start + length)
                for start, length in zip(starts, self.lengths, strict=True)
            ]
        return list(self._chunks(starts, self.rank))

    def _chunks(self, starts: list[int], rank: int) -> Iterator[Piece]:
        for start, length in zip(starts, self.lengths, strict=True):
            chunk = length // (2 * self.size)
            for number in (rank, 2 * self.size - 1 - rank):
                yield Piece(chunk, start, start + (number + 1) * chunk)

    def held_by(self, rank: int) -> Tensor:
        """Indices in the row of a rank's tokens, in the rank's order: int64 `[total / size]`, on the host."""
        if self.size == 1:
            return torch.arange(self.total)
        starts = list(accumulate(self.lengths, initial=0))[:-1]
        runs = [torch.arange(last - n, last) for n, _, last in self._chunks(starts, rank)]
        return torch.cat(runs)

    @cached_property
    def by_rank(self) -> Tensor:
        """Indices in the row of rank 0's tokens, then rank 1's, and so on: int64 `[total]`."""
        return torch.cat([self.held_by(rank) for rank in range(self.size)]).to(self.device, non_blocking=True)

    @cached_property
    def natural(self) -> Tensor:
        """The inverse of `by_rank`: index of each of the row's tokens among all ranks' tokens: int64 `[total]`."""
        return self.by_rank.argsort()

    @cached_property
    def held(self) -> Tensor:
        """Indices in the row of this rank's tokens: int64 `[total / size]`."""
        return self.held_by(self.rank).to(self.device, non_blocking=True)

    @cached_property
    def numbers(self) -> Tensor:
        """Number of the segment of each token of the row: int64 `[total]`."""
        lengths = torch.tensor(self.lengths)
        return torch.arange(len(lengths)).repeat_interleave(lengths).to(self.device, non_blocking=True)

    @cached_property
    def positions(self) -> Tensor:
        """Position of each of this rank's tokens in its own segment: int64 `[total / size]`."""
        inside = torch.cat([torch.arange(length) for length in self.lengths])
        return inside[self.held_by(self.rank)].to(self.device, non_blocking=True)

    @cached_property
    def whole(self) -> "Segments":
        """The same row held by one rank."""
        return Segments(self.lengths, self.device)

    @cached_property
    def for_varlen(self) -> "Varlen":
        """The pieces in the form that a variable-length attention kernel takes."""
        queries = [piece.queries for piece in self.pieces]
        keys = [piece.last - piece.first for piece in self.pieces]
        index = None
        if self.size > 1:
            index = torch.cat([torch.arange(piece.first, piece.last) for piece in self.pieces])
            index = index.to(self.device, non_blocking=True)
        return Varlen(*(self._edges(lengths) for lengths in (queries, keys)), max(queries), max(keys), index)

    def _edges(self, lengths: list[int]) -> Tensor:
        edges = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
        return edges.to(self.device, non_blocking=True)


class Varlen(NamedTuple):
    """Cumulative lengths of the runs, int32 `[runs + 1]`, of queries and of keys; the longest run of each.

    index: indices in the row of the keys, run after run; None: all keys of the row in order.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    index: Tensor | None


def part_of_one_segment(tokens: int, device: torch.device) -> Segments:
    """Rows of one right-padded sample each, of which this rank holds `tokens` tokens."""
    size = parallel_state.get_context_parallel_world_size() or 1  # 0 without torch.distributed
    rank = parallel_state.get_context_parallel_rank() if size > 1 else 0
    return one_segment(tokens * size, device, size, rank)


@lru_cache(maxsize=8)
def one_segment(length: int, device: torch.device, size: int = 1, rank: int = 0) -> Segments:
    """A row of one right-padded sample."""
    return Segments([length], device, size, rank)
