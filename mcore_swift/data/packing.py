"""Which samples share a packed row: computed from the lengths alone."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .order import PACK, permutation

WINDOW = 4096  # samples packed together; limits the work and how far a sample moves from its position
_CARRIED = 256  # bins that may stay open from one window to the next
_FULL = 0.99  # a bin that is full to this share is closed


@dataclass(frozen=True)
class Units:
    """The units that a global batch is counted in: single samples, or packs of them.

    Unit u holds the samples `members[starts[u]:starts[u + 1]]`, with `tokens[u]` tokens in total.
    """

    starts: np.ndarray  # int64 [units + 1]
    members: np.ndarray  # int64 [samples]
    tokens: np.ndarray  # int64 [units]

    def __len__(self) -> int:
        return len(self.tokens)

    def samples(self, unit: int) -> np.ndarray:
        return self.members[self.starts[unit] : self.starts[unit + 1]]


def single(lengths: np.ndarray) -> Units:
    """Every sample a unit of its own."""
    return Units(np.arange(len(lengths) + 1), np.arange(len(lengths)), np.asarray(lengths))


def joined_units(parts: Sequence[Units]) -> Units:
    """The units of several stores, as units of the store that concatenates them."""
    if len(parts) == 1:
        return parts[0]
    offsets = np.cumsum([0, *(len(units.members) for units in parts)])
    starts = [units.starts[:-1] + offset for units, offset in zip(parts, offsets[:-1], strict=True)]
    members = [units.members + offset for units, offset in zip(parts, offsets[:-1], strict=True)]
    tokens = np.concatenate([units.tokens for units in parts])
    return Units(np.append(np.concatenate(starts), offsets[-1]), np.concatenate(members), tokens)


def pack(lengths: np.ndarray, capacity: int, strategy: str, seed: int | None) -> Units:
    """Packs of at most `capacity` tokens that hold every sample once. Deterministic.

    lengths: tokens of each sample, none above `capacity`. strategy: "binpack" fills rows best, "sequential"
    keeps adjacent samples together. seed: shuffles the samples first; None keeps their order, and packs are in the
    order of their first samples.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a sample of {lengths.max()} tokens does not fit a row of {capacity}")
    order = np.arange(len(lengths)) if seed is None else permutation(len(lengths), seed, PACK)
    bins = (
        _sequential(lengths, order, capacity)
        if strategy == "sequential"
        else _best_fit(lengths, order, capacity)
    )
    starts = np.concatenate([[0], np.cumsum([len(b) for b in bins], dtype=np.int64)]).astype(np.int64)
    members = np.concatenate(bins).astype(np.int64) if bins else np.zeros(0, np.int64)
    tokens = np.add.reduceat(lengths[members], starts[:-1]) if bins else np.zeros(0, np.int64)
    return Units(starts, members, tokens)


def _sequential(lengths: np.ndarray, order: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Next-fit: a row takes samples in order until one does not fit."""
    ends = np.cumsum(lengths[order])
    bins, at, used = [], 0, 0
    while at < len(order):
        upto = int(np.searchsorted(ends, used + capacity, side="right"))
        bins.append(order[at:upto])
        at, used = upto, ends[upto - 1]
    return bins


def _best_fit(lengths: np.ndarray, order: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Best-fit-decreasing within windows of the order; the emptiest rows stay open for the next window.

    Best-fit-decreasing needs at most 11/9 OPT + 6/9 bins (Dósa, 2007, for first-fit-decreasing; the bound of
    best-fit-decreasing is the same, Johnson 1973).
    """
    done: list[list[int]] = []
    carried: list[tuple[int, list[int]]] = []  # (free tokens, samples)
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        bins = [samples for _, samples in carried]
        free = sorted((space, i) for i, (space, _) in enumerate(carried))
        for sample, length in zip(window.tolist(), lengths[window].tolist(), strict=True):
            at = bisect.bisect_left(free, (length, -1))
            if at < len(free):
                space, i = free.pop(at)
                bins[i].append(sample)
            else:
                space, i = capacity, len(bins)
                bins.append([sample])
            if space > length:
                bisect.insort(free, (space - length, i))
        open_still = [(space, i) for space, i in free if space > (1 - _FULL) * capacity][-_CARRIED:]
        carried = [(space, bins[i]) for space, i in open_still]
        kept = {i for _, i in open_still}
        done += [samples for i, samples in enumerate(bins) if i not in kept]
    bins = done + [samples for _, samples in carried]
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    packs = [np.array(sorted(samples, key=place.__getitem__)) for samples in bins]
    return sorted(packs, key=lambda pack: place[pack[0]])
