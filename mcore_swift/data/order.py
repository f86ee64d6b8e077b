"""Seeded orders that depend only on (seed, use, epoch), not on ranks, batch sizes or the NumPy version."""

import numpy as np

# uses of random numbers; each has its own stream for a given seed
SAMPLE, SPLIT, PACK, EPOCH, FILES = range(5)


def permutation(n: int, seed: int, use: int, number: int = 0) -> np.ndarray:
    """A random order of range(n), int64 [n].

    Sorts the raw output of the counter-based generator Philox, whose stream is fixed. `Generator.permutation` may
    change between NumPy versions, which would change a resumed run.
    """
    key = np.array([seed % 2**64, (use << 48) + number], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")
