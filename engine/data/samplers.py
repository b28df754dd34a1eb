"""Samplers: the samples of a global batch as a pure function of (seed, position)."""

from collections import OrderedDict
from typing import NamedTuple, Protocol

import numpy as np

from iomm.config import InputError

# Rounds of the Feistel network. Chi-square of (place, entry) in groups of 5, in standard
# deviations: 246 at 4 rounds, 17 at 8, 9 at 10, 1 at 12.
NUM_ROUNDS = 12
GOLDEN = 0x9E3779B97F4A7C15
# A batch may straddle two epochs. The layout of an epoch is three arrays over the shards.
CACHED_EPOCHS = 4


class Sampler(Protocol):
    """The order of a run's samples: all that a source of batches needs to know about it.

    `total` is the number of samples in an epoch.
    """

    total: int

    def __call__(self, n: np.ndarray, attempt: int = 0) -> np.ndarray:
        """Return the index entries of the run positions n.

        attempt > 0 returns the entries that replace samples that are unreadable.
        """

    def size_px(self, step: int) -> tuple[int, int]:
        """Return (height, width) of the images of a global batch."""

    def is_pair(self, n: np.ndarray) -> np.ndarray:
        """Return which of the positions n hold a caption instead of an image for the ViT."""


class EpochLayout(NamedTuple):
    """The order of shards in one epoch."""

    # Permutation of the shards that have samples.
    shard_order: np.ndarray
    # First position of each shard, in this order.
    shard_start: np.ndarray
    # First position of each group of shards, and the end of the epoch.
    group_start: np.ndarray
    # uint64, (1,).
    key: np.ndarray


class EpochPermutation:
    """Map a run position to an index entry, with every sample exactly once per epoch.

    A run position n (int64, >= 0) counts samples over all epochs and ranks. It is in epoch
    n // total. An index entry is an int64, and entries are numbered shard by shard in the order of
    `shard_sizes`.

    An epoch permutes the shards, takes them in groups of `group_shards`, and permutes the samples
    within each group. A reader therefore has at most that many shards open. No array has the size
    of the dataset: memory is O(shards) and one position costs O(log shards).
    """

    def __init__(
        self,
        seed: int,
        shard_sizes: list[int] | np.ndarray,
        group_shards: int = 16,
        held_out: int | np.ndarray = 0,
    ) -> None:
        """Set up the order.

        Args:
            seed: seed of the run.
            shard_sizes: number of samples of each shard.
            group_shards: shards from which samples are drawn at a time.
            held_out: number of samples at the end of each shard that are never visited (see the
                function held_out). `total` counts the others.

        Raises:
            InputError: there is no sample, or group_shards is not positive.
        """
        self.seed = int(seed)
        all_sizes = np.asarray(shard_sizes, dtype=np.int64).reshape(-1)
        self.shard_sizes = all_sizes - held_out
        self.first_entry = np.cumsum(all_sizes) - all_sizes
        self.group_shards = int(group_shards)
        if self.group_shards < 1:
            raise InputError(f"group_shards must be >= 1, got {group_shards}")
        if (self.shard_sizes < 0).any() or not self.shard_sizes.sum():
            raise InputError("the shards hold no samples to train on; add data")
        self.total = int(self.shard_sizes.sum())
        self._layouts: OrderedDict[int, EpochLayout] = OrderedDict()

    def __call__(self, n: int | np.ndarray) -> np.ndarray:
        """Return the index entries (int64, the shape of n) of the run positions n."""
        n = np.asarray(n, dtype=np.int64)
        if (n < 0).any():
            raise InputError(f"a run position must be >= 0, got {n.min()}")
        flat = n.reshape(-1)
        entries = np.empty_like(flat)
        epochs = flat // self.total
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            entries[chosen] = self._entries(int(epoch), flat[chosen] % self.total)
        return entries.reshape(n.shape)

    def _entries(self, epoch: int, position: np.ndarray) -> np.ndarray:
        shard_order, shard_start, group_start, key = self._layout(epoch)
        group = np.searchsorted(group_start, position, side="right") - 1
        start = group_start[group]
        place = start + permute(position - start, group_start[group + 1] - start, mix(key, group))
        slot = np.searchsorted(shard_start, place, side="right") - 1
        return self.first_entry[shard_order[slot]] + place - shard_start[slot]

    def _layout(self, epoch: int) -> EpochLayout:
        if epoch in self._layouts:
            self._layouts.move_to_end(epoch)
            return self._layouts[epoch]
        key = mix(mix(np.zeros(1, np.uint64), self.seed), epoch)
        shard_order = np.argsort(mix(mix(key, -1), np.arange(len(self.shard_sizes))), kind="stable")
        shard_order = shard_order[self.shard_sizes[shard_order] > 0]
        sizes = self.shard_sizes[shard_order]
        shard_start = np.cumsum(sizes) - sizes
        group_start = np.append(shard_start[:: self.group_shards], self.total)
        self._layouts[epoch] = EpochLayout(shard_order, shard_start, group_start, key)
        while len(self._layouts) > CACHED_EPOCHS:
            self._layouts.popitem(last=False)
        return self._layouts[epoch]


def held_out(shard_sizes: list[int] | np.ndarray, num: int) -> np.ndarray:
    """Return the number of samples at the end of each shard (int64) that training never visits.

    They are `num` in all, in proportion to the sizes of the shards, and so come from all sources of
    the data.

    Raises:
        InputError: no sample would be left to train on.
    """
    total = int(np.sum(shard_sizes))
    if num >= total:
        raise InputError(
            f"data.heldout must leave samples to train on: got {num} of {total}. Set it to a "
            "smaller number, or to 0 for no held-out loss"
        )
    return np.diff(np.cumsum(shard_sizes, dtype=np.int64) * num // total, prepend=0)


def held_out_entries(shard_sizes: list[int] | np.ndarray, num: int) -> np.ndarray:
    """Return the index entries (int64) of the held-out samples, in order."""
    ends = np.cumsum(shard_sizes, dtype=np.int64)
    counts = held_out(shard_sizes, num)
    return np.concatenate(
        [np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)]
    )


def mix(key: np.ndarray, value: int | np.ndarray) -> np.ndarray:
    """Hash a uint64 array with an integer, or an int64 array, to uint64.

    This is the finaliser of SplitMix64, applied twice.
    """
    with np.errstate(over="ignore"):
        value = np.asarray(value)
        value = (
            value.astype(np.uint64) if value.ndim else np.uint64(int(value) & 0xFFFFFFFFFFFFFFFF)
        )
        return _finalise(_finalise(key ^ np.uint64(GOLDEN)) + value * np.uint64(GOLDEN))


def _finalise(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(x: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return x (int64, in [0, size)) under a bijection of [0, size) chosen by key (uint64).

    All three broadcast elementwise.

    The bijection is a Feistel network over a grid of rows x columns, the tightest near-square one
    with at least `size` cells. It adds modulo the side instead of using xor, so the sides need not
    be powers of two. A value outside [0, size) is mapped again until it is inside (cycle walking).
    Fewer than `rows` cells are outside, so very few values take a second round.
    """
    x, size, key = (np.array(a) for a in np.broadcast_arrays(x, size, key))
    rows = np.ceil(np.sqrt(size)).astype(np.int64)
    columns = -(-size // rows)
    walking = np.arange(len(x))
    while len(walking):
        moved = _feistel(x[walking], rows[walking], columns[walking], key[walking])
        x[walking] = moved
        walking = walking[moved >= size[walking]]
    return x


def _feistel(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, key: np.ndarray) -> np.ndarray:
    row = x // columns
    column = x % columns
    for turn in range(0, NUM_ROUNDS, 2):
        row = (row + _below(mix(mix(key, turn), column), rows)) % rows
        column = (column + _below(mix(mix(key, turn + 1), row), columns)) % columns
    return row * columns + column


def _below(bits: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Map hash bits (uint64) to int64 in [0, bound). The modulus has a bias of bound / 2^64."""
    return (bits % bound.astype(np.uint64)).astype(np.int64)


class FixedSizeSampler:
    """Sampler of a run on square crops: position n is the n-th entry of `order`.

    An unreadable sample is replaced by the next ones in the order.
    """

    def __init__(self, order: EpochPermutation, size_px: int) -> None:
        self.order = order
        self.total = order.total
        self._size_px = size_px, size_px

    def __call__(self, n: np.ndarray, attempt: int = 0) -> np.ndarray:
        return self.order(np.asarray(n, dtype=np.int64) + attempt)

    def size_px(self, step: int) -> tuple[int, int]:
        return self._size_px

    def is_pair(self, n: np.ndarray) -> np.ndarray:
        return np.zeros(len(n), dtype=bool)


class SequentialSampler:
    """Sampler of given entries in sequence, all images or all pairs.

    The last entry is repeated to fill the last batch.
    """

    def __init__(self, entries: range | np.ndarray, size_px: int, pairs: bool = False) -> None:
        self.entries = np.asarray(entries, dtype=np.int64)
        self.total = len(self.entries)
        self.pairs = pairs
        self._size_px = size_px, size_px

    def __call__(self, n: np.ndarray, attempt: int = 0) -> np.ndarray:
        return self.entries[np.minimum(np.asarray(n) + attempt, len(self.entries) - 1)]

    def size_px(self, step: int) -> tuple[int, int]:
        return self._size_px

    def is_pair(self, n: np.ndarray) -> np.ndarray:
        return np.full(len(n), self.pairs)
