"""Packing: every sample once, nothing above the row, few rows, the same plan each time."""

import numpy as np
import pytest

from mcore_swift.data.order import EPOCH, PACK, permutation
from mcore_swift.data.packing import WINDOW, pack, single


def lengths_of(n, seed=0, top=2048):
    return np.random.default_rng(seed).lognormal(5, 1, n).astype(np.int64).clip(1, top)


@pytest.mark.parametrize("strategy", ["binpack", "sequential"])
@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("n", [1, 100, 3 * WINDOW + 17])
def test_every_sample_once_and_no_row_too_long(n, seed, strategy):
    lengths = lengths_of(n)
    packs = pack(lengths, 2048, strategy, seed)
    np.testing.assert_array_equal(np.sort(packs.members), np.arange(n))
    for unit in range(len(packs)):
        tokens = lengths[packs.samples(unit)].sum()
        assert tokens == packs.tokens[unit] and 0 < tokens <= 2048
    again = pack(lengths, 2048, strategy, seed)
    np.testing.assert_array_equal(packs.members, again.members)
    np.testing.assert_array_equal(packs.starts, again.starts)


def test_sequential_keeps_the_order():
    packs = pack(lengths_of(5000), 2048, "sequential", None)
    np.testing.assert_array_equal(packs.members, np.arange(5000))


def test_binpack_is_within_the_bound_of_best_fit_decreasing():
    lengths = lengths_of(20_000)
    rows = len(pack(lengths, 2048, "binpack", 0))
    least = -(-lengths.sum() // 2048)  # no packing needs fewer rows
    # 11/9 OPT + 6/9 for each window would be allowed; texts, mostly short, pack far better
    assert rows <= 1.01 * least + 1
    assert rows < len(pack(lengths, 2048, "sequential", 0))


def test_seed_changes_the_plan():
    lengths = lengths_of(5000)
    one, other = pack(lengths, 2048, "binpack", 1), pack(lengths, 2048, "binpack", 2)
    assert not np.array_equal(one.members, other.members)


def test_full_samples_get_rows_of_their_own():
    packs = pack(np.array([4, 1, 4, 3]), 4, "binpack", None)
    assert [packs.samples(u).tolist() for u in range(len(packs))] == [[0], [1, 3], [2]]
    with pytest.raises(ValueError, match="5 tokens does not fit"):
        pack(np.array([5]), 4, "binpack", None)


def test_single_units_are_the_samples():
    units = single(np.array([3, 5]))
    assert [units.samples(u).tolist() for u in range(2)] == [[0], [1]] and units.tokens.tolist() == [3, 5]


def test_permutation_is_one_and_differs_by_use_seed_and_number():
    orders = [permutation(1000, *key) for key in [(1, EPOCH, 0), (1, EPOCH, 1), (2, EPOCH, 0), (1, PACK, 0)]]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert len({order.tobytes() for order in orders}) == 4


def test_permutation_is_the_same_on_every_machine():
    # Philox4x64-10 with key (42, 3 << 48): its stream is fixed by Salmon et al., SC 2011, so this order is for ever
    raw = np.random.Philox(key=np.array([42, 3 << 48], np.uint64)).random_raw(6)
    assert permutation(6, 42, EPOCH, 0).tolist() == sorted(range(6), key=lambda i: raw[i])
