"""The order of the units of one corpus, or of several with weights: a function of seed and position alone."""

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..errors import UserError
from .order import EPOCH, permutation

MOST_UNITS = 1 << 31
_CORPUS = 1 << 32  # epochs of a corpus before its random numbers would repeat those of the next one


class Order(Protocol):
    """`len(order)` units make an epoch; `units(places)` are those at int64 [n] positions counted over all epochs."""

    def __len__(self) -> int: ...

    def units(self, places: np.ndarray) -> np.ndarray: ...


class Shuffled:
    """Each of `n` units once per epoch, in a different order in each epoch; in their own order if not `shuffle`.

    number: index of the corpus among several, so that they are shuffled differently.
    """

    def __init__(self, n: int, seed: int, shuffle: bool, number: int = 0) -> None:
        self._n, self._seed, self._shuffle = n, seed, shuffle
        self._number = number * _CORPUS
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._n

    def units(self, places: np.ndarray) -> np.ndarray:
        epochs, within = np.divmod(places, self._n)
        units = np.empty_like(places)
        for epoch in np.unique(epochs):
            units[epochs == epoch] = self._order(int(epoch))[within[epochs == epoch]]
        return units

    def _order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            epoch = 0
        with self._lock:  # both the prefetch thread and the training loop call this
            if epoch not in self._orders:
                number = self._number + epoch
                order = (
                    permutation(self._n, self._seed, EPOCH, number) if self._shuffle else np.arange(self._n)
                )
                recent = {e: o for e, o in self._orders.items() if e >= epoch - 1}
                self._orders = recent | {epoch: order}
            return self._orders[epoch]


class Blended:
    """Units of several corpora, interleaved as close to the proportions of `weights` as possible at every position.

    sizes: number of units of each corpus; units are numbered corpus after corpus. An epoch ends when the first corpus
    is exhausted (`first_exhausted`), or when every corpus has been exhausted once, smaller ones being repeated
    (`all_exhausted`). In each corpus, the next epoch continues where the last one stopped. Raises UserError if an
    epoch would have too many units.

    Unit k of corpus c is due at time (k + 1/2) / weight, and units are sorted by that time. This is the order of the
    Sainte-Laguë method of apportioning seats, which keeps every prefix of the sequence in proportion.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], stopping: str, seed: int, shuffle: bool
    ) -> None:
        self.sizes, self.weights = np.asarray(sizes), np.asarray(weights, float) / sum(weights)
        is_first = stopping == "first_exhausted"
        if is_first:
            asked = self.sizes + 1  # one more than exists: the epoch ends where a corpus would need it
        else:
            asked = ((self.sizes - 0.5) / self.weights).max() * self.weights + 2
        if asked.sum() > MOST_UNITS:
            raise UserError(
                f"--interleave_prob {' '.join(map(str, weights))} with --stopping_strategy {stopping} makes an epoch "
                f"of {int(asked.sum())} samples: a large corpus has a small weight",
                "use --stopping_strategy first_exhausted, or weights nearer to the sizes of the corpora",
            )
        asked = asked.astype(np.int64)
        corpus = np.repeat(np.arange(len(sizes), dtype=np.int16), asked)
        within = np.concatenate([np.arange(count) for count in asked])
        due = np.argsort((within + 0.5) / self.weights[corpus], kind="stable")
        corpus, within = corpus[due], within[due]
        if is_first:
            end = int(np.argmax(within == self.sizes[corpus]))
        else:
            end = int(np.flatnonzero(within == self.sizes[corpus] - 1)[-1]) + 1
        self._corpus, self._within = corpus[:end], within[:end]
        self.counts = np.bincount(self._corpus, minlength=len(sizes))
        self._starts = np.cumsum([0, *sizes])[:-1]
        self._orders = [Shuffled(n, seed, shuffle, number + 1) for number, n in enumerate(sizes)]

    def __len__(self) -> int:
        return len(self._corpus)

    def units(self, places: np.ndarray) -> np.ndarray:
        epochs, within = np.divmod(places, len(self))
        corpora = self._corpus[within]
        taken = self._within[within] + epochs * self.counts[corpora]  # of each corpus, over the whole run
        units = np.empty_like(places)
        for number in np.unique(corpora):
            of_it = corpora == number
            units[of_it] = self._starts[number] + self._orders[number].units(taken[of_it])
        return units
