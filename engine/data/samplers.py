"""Which samples make global batch n: a pure function of (seed, n)."""

from collections import OrderedDict

import numpy as np

from iomm.config import InputError

# chi-square of (place, entry) in groups of 5, in deviations: 246 at 4, 17 at 8, 9 at 10, 1 at 12
NUM_ROUNDS = 12
GOLDEN = 0x9E3779B97F4A7C15
# A batch may straddle two epochs; the plan of an epoch is three arrays over the shards.
CACHED_EPOCHS = 4


class EpochPermutation:
    """Run position n (int64, >= 0, counted over all epochs and ranks) -> index entry (int64, in [0, total)).

    Position n lies in epoch n // total, and every epoch visits every sample exactly once. An epoch permutes the shards,
    takes them in groups of `group_shards`, and permutes the samples within each group, so that a reader has at most
    that many shards open. Nothing has the size of the dataset: memory is O(shards) and one position costs O(log
    shards). Entries are numbered shard by shard, in the order of `shard_sizes`; the last `held_out` of each shard (see
    held_out below) are never visited, and `total` counts the others. Raises InputError if there is no sample.
    """

    def __init__(self, seed, shard_sizes, group_shards=16, held_out=0):
        self.seed = int(seed)
        whole = np.asarray(shard_sizes, dtype=np.int64).reshape(-1)
        self.shard_sizes, self.first_entry = whole - held_out, np.cumsum(whole) - whole
        self.group_shards = int(group_shards)
        if self.group_shards < 1:
            raise InputError(f"group_shards must be >= 1, got {group_shards}")
        if (self.shard_sizes < 0).any() or not self.shard_sizes.sum():
            raise InputError("the shards hold no samples, so there is nothing to put in order")
        self.total = int(self.shard_sizes.sum())
        self._plans = OrderedDict()

    def __call__(self, n):
        """Index entries (int64, the shape of n) of the run positions n (int or int64 array, >= 0)."""
        n = np.asarray(n, dtype=np.int64)
        if (n < 0).any():
            raise InputError(f"a run position must be >= 0, got {n.min()}")
        flat = n.reshape(-1)
        entries = np.empty_like(flat)
        epochs = flat // self.total
        for epoch in np.unique(epochs):
            here = epochs == epoch
            entries[here] = self._entries(int(epoch), flat[here] % self.total)
        return entries.reshape(n.shape)

    def _entries(self, epoch, position):
        shard_order, shard_start, group_start, key = self._plan(epoch)
        group = np.searchsorted(group_start, position, side="right") - 1
        start = group_start[group]
        place = start + permute(position - start, group_start[group + 1] - start, mix(key, group))
        slot = np.searchsorted(shard_start, place, side="right") - 1
        return self.first_entry[shard_order[slot]] + place - shard_start[slot]

    def _plan(self, epoch):
        if epoch in self._plans:
            self._plans.move_to_end(epoch)
            return self._plans[epoch]
        key = mix(mix(np.zeros(1, np.uint64), self.seed), epoch)
        shard_order = np.argsort(mix(mix(key, -1), np.arange(len(self.shard_sizes))), kind="stable")
        shard_order = shard_order[self.shard_sizes[shard_order] > 0]
        sizes = self.shard_sizes[shard_order]
        shard_start = np.cumsum(sizes) - sizes
        group_start = np.append(shard_start[:: self.group_shards], self.total)
        self._plans[epoch] = shard_order, shard_start, group_start, key
        while len(self._plans) > CACHED_EPOCHS:
            self._plans.popitem(last=False)
        return self._plans[epoch]


def held_out(shard_sizes, num):
    """How many samples of each shard (int64 array) are kept from training, its last ones: `num` in all, in proportion to
    the sizes, so that they are of all the data's sources. Raises InputError if nothing would be left.
    """
    total = int(np.sum(shard_sizes))
    if num >= total:
        raise InputError(f"data.heldout must leave samples to train on: got {num} of {total}")
    return np.diff(np.cumsum(shard_sizes, dtype=np.int64) * num // total, prepend=0)


def held_out_entries(shard_sizes, num):
    """Their index entries (int64 array), in order."""
    ends, nums = np.cumsum(shard_sizes, dtype=np.int64), held_out(shard_sizes, num)
    return np.concatenate([np.arange(end - count, end) for end, count in zip(ends, nums)])


def mix(key, value):
    """uint64 hash of a uint64 array and an integer (or int64 array): the finaliser of SplitMix64, twice."""
    with np.errstate(over="ignore"):
        value = np.asarray(value)
        value = (
            value.astype(np.uint64) if value.ndim else np.uint64(int(value) & 0xFFFFFFFFFFFFFFFF)
        )
        return _finalise(_finalise(key ^ np.uint64(GOLDEN)) + value * np.uint64(GOLDEN))


def _finalise(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(x, size, key):
    """X (int64, in [0, size)) under a bijection of [0, size) chosen by key (uint64); all three broadcast elementwise.

    A Feistel network over the grid rows x columns, the tightest near-square one with at least `size` cells. Addition
    modulo the side takes the place of the xor, so the sides need not be powers of two. What lands outside [0, size)
    walks on along its cycle; fewer than `rows` cells lie outside, so nearly nothing walks.
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


def _feistel(x, rows, columns, key):
    row, column = x // columns, x % columns
    for turn in range(0, NUM_ROUNDS, 2):
        row = (row + _below(mix(mix(key, turn), column), rows)) % rows
        column = (column + _below(mix(mix(key, turn + 1), row), columns)) % columns
    return row * columns + column


def _below(bits, bound):
    """Hash bits (uint64) -> int64 in [0, bound); the bias of the modulus is bound / 2^64."""
    return (bits % bound.astype(np.uint64)).astype(np.int64)


class FixedSizeSampler:
    """The plan of a run on square crops: position n is the n-th entry of `order`.

    A plan says three things, and is all that a source knows of an order. plan(n, attempt) -> index entries of the run
    positions n; attempt > 0 gives those that take the place of samples that cannot be had, here the next ones in the
    order. size_px(step) -> (height, width) of that global batch. is_pair(n) -> which positions hold a caption and not
    an image to look at.
    """

    def __init__(self, order, size_px):
        self.order, self.total = order, order.total
        self._size_px = size_px, size_px

    def __call__(self, n, attempt=0):
        return self.order(np.asarray(n, dtype=np.int64) + attempt)

    def size_px(self, step):
        return self._size_px

    def is_pair(self, n):
        return np.zeros(len(n), dtype=bool)


class SequentialSampler:
    """The plan of some entries one after the other, all images or all pairs; the last one fills the last batch."""

    def __init__(self, entries, size_px, pairs=False):
        self.entries, self.pairs = np.asarray(entries, dtype=np.int64), pairs
        self._size_px = size_px, size_px

    def __call__(self, n, attempt=0):
        return self.entries[np.minimum(np.asarray(n) + attempt, len(self.entries) - 1)]

    def size_px(self, step):
        return self._size_px

    def is_pair(self, n):
        return np.full(len(n), self.pairs)
