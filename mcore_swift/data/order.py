"""Seeded orders that depend on (seed, use, epoch) only: not on ranks, batch sizes or the NumPy version."""

import numpy as np

# what a stream of random numbers is for; each use of a seed has its own
SAMPLE, SPLIT, PACK, EPOCH, FILES = range(5)


def permutation(n: int, seed: int, use: int, number: int = 0) -> np.ndarray:
    """A random order of range(n), int64 [n].

    Sorts raw output of the counter-based generator Philox, whose stream is fixed, while
    `Generator.permutation` may change between NumPy versions and would change a resumed run.
    """
    key = np.array([seed % 2**64, (use << 48) + number], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")
