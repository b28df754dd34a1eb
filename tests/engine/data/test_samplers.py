"""Order of samples: once per epoch, random access, no visible structure, local reads."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iomm.config import InputError
from iomm.engine.data.samplers import EpochPermutation, mix, permute

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)
seeds = st.integers(-(2**63), 2**64 - 1)


@settings(deadline=None, max_examples=150)
@given(seeds, sizes, st.integers(1, 8), st.integers(0, 10**6))
def test_every_epoch_visits_every_sample_once(seed, shard_sizes, group_shards, epoch):
    order = EpochPermutation(seed, shard_sizes, group_shards)
    entries = order(np.arange(order.total) + epoch * order.total)
    assert entries.dtype == np.int64
    assert np.array_equal(np.sort(entries), np.arange(order.total))


@settings(deadline=None, max_examples=100)
@given(seeds, sizes, st.integers(1, 8), st.data())
def test_random_access_equals_sequential(seed, shard_sizes, group_shards, data):
    sequential = EpochPermutation(seed, shard_sizes, group_shards)
    span = 3 * sequential.total
    expected = sequential(np.arange(span))
    picks = data.draw(st.lists(st.integers(0, span - 1), min_size=1, max_size=20))
    fresh = EpochPermutation(seed, shard_sizes, group_shards)
    assert [int(fresh(n)) for n in picks] == expected[picks].tolist()
    assert fresh(np.array(picks).reshape(1, -1)).tolist() == [expected[picks].tolist()]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 10**12), seeds.map(lambda s: s % 2**64), st.integers(1, 50))
def test_permute_is_a_bijection(size, key, count):
    x = np.unique(np.linspace(0, size - 1, count).astype(np.int64))
    y = permute(x, np.int64(size), np.uint64(key))
    assert ((y >= 0) & (y < size)).all() and len(np.unique(y)) == len(y)


def test_epochs_and_seeds_give_different_orders():
    order = EpochPermutation(7, [50] * 20)
    n = np.arange(order.total)
    rows = [order(n + epoch * order.total) for epoch in range(3)] + [
        EpochPermutation(seed, [50] * 20)(n) for seed in (8, -7)
    ]
    for i, a in enumerate(rows):
        for b in rows[:i]:
            # Two random orders of 1,000 samples agree in one place on average.
            assert (a == b).mean() < 0.01


def test_order_is_pinned():
    """A different order would silently change the samples of a resumed run."""
    assert EpochPermutation(0, [5, 0, 7, 3], group_shards=2)(np.arange(30)).tolist() == PINNED


PINNED = [
    6,
    7,
    11,
    5,
    9,
    0,
    8,
    1,
    2,
    10,
    4,
    3,
    13,
    14,
    12,
    3,
    2,
    8,
    5,
    11,
    9,
    0,
    6,
    7,
    4,
    10,
    1,
    14,
    12,
    13,
]


@pytest.mark.parametrize("total", [2, 3, 4, 5, 7, 16])
def test_every_place_is_equally_likely(total):
    """The chi-square of (position, entry) is within six standard deviations of chance.

    Each cell expects 1,000 counts over many keys.
    """
    keys = mix(np.arange(1000 * total, dtype=np.uint64), 1)
    x = np.arange(total)
    y = permute(np.tile(x, len(keys)), np.int64(total), np.repeat(keys, total)).reshape(-1, total)
    counts = np.array([np.bincount(y[:, i], minlength=total) for i in x])
    freedom = (total - 1) ** 2
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert abs(chi2 - freedom) < 6 * np.sqrt(2 * freedom), (chi2, freedom)


def test_permutations_of_four_are_equally_likely():
    """All 24 orders of four samples occur, 1,000 times each on average."""
    keys = mix(np.arange(24000, dtype=np.uint64), 2)
    y = permute(np.tile(np.arange(4), len(keys)), np.int64(4), np.repeat(keys, 4)).reshape(-1, 4)
    counts = np.unique(y @ [64, 16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert chi2 < 23 + 6 * np.sqrt(2 * 23), chi2


@pytest.mark.parametrize("total", [1000, 1024, 4096, 9999, 100_000])
def test_order_has_no_visible_structure(total):
    """Rank correlations are within five standard deviations of chance.

    Lags are 0 to 32 and the neighbours of a stride.
    """
    x = np.arange(total)
    y = permute(x, np.int64(total), mix(np.zeros(1, np.uint64), 3))
    bound = 5 / np.sqrt(total)
    assert abs(np.corrcoef(x, y)[0, 1]) < bound
    for lag in [1, 2, 3, 4, 8, 16, 31, 32, int(np.sqrt(total)), int(np.sqrt(total)) + 1]:
        assert abs(np.corrcoef(y[lag:], y[:-lag])[0, 1]) < bound, lag
    # The differences of a random order are Poisson distributed with mean 1.
    steps = np.bincount(np.diff(y) % total, minlength=total)
    assert steps.max() < 12
    assert abs((steps == 0).mean() - np.exp(-1)) < 0.03


def test_reads_stay_within_a_group_of_shards():
    order = EpochPermutation(1, [100] * 64, group_shards=4)
    shard = order(np.arange(order.total)) // 100
    for start in range(0, order.total, 400):
        assert len(np.unique(shard[start : start + 400])) == 4
    # A group consists of shards that are not neighbours.
    assert len(np.unique(shard[::400] // 4)) > 4


def test_ten_million_samples_need_no_memory_per_sample():
    order = EpochPermutation(0, [10_000] * 1000)
    started = time.perf_counter()
    entries = order(np.arange(1024) + 10**11)
    assert len(np.unique(entries)) == 1024
    assert time.perf_counter() - started < 1.0
    assert sum(a.nbytes for a in order._layout(10**11 // order.total)) < 100_000


def test_wrong_input_raises_input_error():
    for sizes in ([], [0, 0]):
        with pytest.raises(InputError, match="no samples"):
            EpochPermutation(0, sizes)
    with pytest.raises(InputError, match="position must be >= 0, got -1"):
        EpochPermutation(0, [3])(-1)
    with pytest.raises(InputError, match="group_shards"):
        EpochPermutation(0, [3], group_shards=0)
