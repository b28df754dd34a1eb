"""Aspect-ratio buckets: every global batch has one shape near its images' own, and all shapes have equal area."""

import threading
from collections import OrderedDict

import numpy as np

from iomm.config import InputError
from iomm.engine.data.samplers import EpochPermutation, mix, permute

# Of a bucket; longer pictures are cropped to it.
MAX_ASPECT = 4.0
# Sides are multiples of about size_px / 16: 32 px at 512, 64 px at 1024
UNITS = 16
# Whose samples are sorted by bucket; 10,000 samples are 40 KB.
CACHED_SHARDS = 64


def bucket_sizes(size_px, multiple_px=1):
    """(height, width) of the buckets, from tall to wide: sides multiples of multiple_px and about size_px / 16, area
    within 6 % of size_px^2, aspect ratio at most 4. 41 of them, where size_px / 16 is a multiple of multiple_px.
    """
    unit = -(-size_px // (UNITS * multiple_px)) * multiple_px
    found = {(size_px, size_px)}
    for short in range(unit, size_px + 1, unit):
        for long in range(size_px // unit * unit, int(MAX_ASPECT * short) + 1, unit):
            if abs(short * long / size_px**2 - 1) <= 0.06:
                found |= {(short, long), (long, short)}
    return sorted(found, key=lambda size: (size[1] / size[0], size))


class BucketSampler:
    """The plan of a run on aspect-ratio buckets (what a plan is: samplers.FixedSizeSampler); one bucket per global batch.

    A sample belongs to the bucket whose aspect ratio is nearest to its own, on a log scale; a bucket with fewer than
    global_batch samples joins its nearest neighbour. Each bucket has an order and epochs of its own, its b-th batch is
    the positions [b G, (b + 1) G) of that order, and what is left of an epoch opens the bucket's first batch in the
    next: no sample is dropped or repeated. In epoch e of the run, the batches that the buckets complete with their e-th
    pass stand in an order shuffled by (seed, e): after E epochs each sample was seen E times, but for the fewer than G
    left over in each bucket, seen E - 1 times. So a position is a pure function of (seed, n), for any number of
    ranks. Memory is O(shards x buckets); one pass over the index's sizes at the start (0.3 s for 10 M samples), then
    one position costs O(log shards) and, for a shard not read lately, sorting its samples.

    Two of them make the batches of a mixture (see share_buckets): one leads, the other follows its buckets, so that
    step s of either is the b-th batch of the same bucket. What is said of epochs holds for the leader; of the
    follower, each bucket visits all of its samples before any twice.
    """

    def __init__(self, seed, index, global_batch, sizes, group_shards=16, held_out=0):
        """held_out: samples of each shard that are never visited, its last ones."""
        self.seed, self.global_batch, self.group_shards = int(seed), int(global_batch), group_shards
        self.records, self.leader, self._all_sizes = index.records, self, sizes
        whole = np.array([shard["num_samples"] for shard in index.shards], dtype=np.int64)
        self.num_samples, self.first_entry = whole - held_out, np.cumsum(whole) - whole
        self.ratios = np.array([width / height for height, width in sizes])
        # The same floats on every machine, unlike logarithms.
        self._borders = np.sqrt(self.ratios[1:] * self.ratios[:-1])
        self._joined = np.arange(len(sizes))
        self.counts = np.stack(
            [np.bincount(self._buckets(shard), minlength=len(sizes)) for shard in range(len(whole))]
        )
        self.join(join_small(self.counts.sum(0)[None], self.ratios, [self.global_batch]))

    def join(self, joined):
        """Makes each bucket part of the one that `joined` names, and orders what is in each."""
        self._joined = joined
        merged = np.zeros_like(self.counts)
        for bucket, target in enumerate(joined):
            merged[:, target] += self.counts[:, bucket]
        self.used = np.flatnonzero(merged.sum(0))
        self.sizes = [self._all_sizes[bucket] for bucket in self.used]
        self.totals = merged.sum(0)[self.used]
        self.total = int(self.totals.sum())
        key = mix(np.zeros(1, np.uint64), self.seed)
        self.orders = [
            EpochPermutation(int(mix(key, int(bucket))[0]), merged[:, bucket], self.group_shards)
            for bucket in self.used
        ]
        self._key = mix(key, -1)
        self._sorted, self._lock = OrderedDict(), threading.Lock()

    def __call__(self, n, attempt=0):
        n = np.asarray(n, dtype=np.int64)
        entries = np.empty_like(n)
        steps = n // self.global_batch
        for step in np.unique(steps):
            here = steps == step
            bucket, batch = self.leader._batch(int(step))
            positions = batch * self.global_batch + n[here] % self.global_batch + attempt
            entries[here] = self._entries(bucket, self.orders[bucket](positions))
        return entries

    def size_px(self, step):
        return self.sizes[self.leader._batch(int(step))[0]]

    def is_pair(self, n):
        return np.zeros(len(n), dtype=bool)

    def _batch(self, step):
        """(bucket, number of the batch in that bucket's own order) of a step."""
        epoch = step * self.global_batch // self.total
        while self._batches_before(epoch + 1).sum() <= step:
            epoch += 1
        first = self._batches_before(epoch)
        ends = np.cumsum(self._batches_before(epoch + 1) - first)
        place = int(permute(np.array([step - first.sum()]), ends[-1], mix(self._key, epoch))[0])
        bucket = int(np.searchsorted(ends, place, side="right"))
        return bucket, int(first[bucket]) + place - (int(ends[bucket - 1]) if bucket else 0)

    def _batches_before(self, epoch):
        """Per bucket, the batches that `epoch` passes complete."""
        return self.totals * epoch // self.global_batch

    def _entries(self, bucket, ordinals):
        """The bucket's samples, numbered shard by shard -> index entries."""
        order = self.orders[bucket]
        shards = np.searchsorted(order.first_entry + order.shard_sizes, ordinals, side="right")
        entries = np.empty_like(ordinals)
        for shard in np.unique(shards):
            here = shards == shard
            by_bucket, starts = self._by_bucket(int(shard))
            places = starts[self.used[bucket]] + ordinals[here] - order.first_entry[shard]
            entries[here] = self.first_entry[shard] + by_bucket[places]
        return entries

    def _by_bucket(self, shard):
        """(the shard's samples sorted by bucket, where each bucket starts)."""
        with self._lock:
            if shard not in self._sorted:
                buckets = self._buckets(shard)
                counts = np.bincount(buckets, minlength=len(self._joined))
                self._sorted[shard] = (
                    np.argsort(buckets, kind="stable").astype(np.uint32),
                    np.cumsum(counts) - counts,
                )
                while len(self._sorted) > CACHED_SHARDS:
                    self._sorted.popitem(last=False)
            self._sorted.move_to_end(shard)
            return self._sorted[shard]

    def _buckets(self, shard):
        """Bucket of each sample of a shard."""
        some = self.records[
            self.first_entry[shard] : self.first_entry[shard] + self.num_samples[shard]
        ]
        return self._joined[np.searchsorted(self._borders, some["width"] / some["height"])]


def join_small(totals, ratios, wanted):
    """Which bucket each bucket becomes part of, so that each has wanted[k] samples of kind k or more, or none of any.
    totals: (kinds, buckets).

    The one that lacks the largest share goes first, to the neighbour nearest in ratio. Raises InputError if there are
    not enough samples.
    """
    totals, wanted = totals.copy(), np.array(wanted)
    for total, want in zip(totals.sum(1), wanted):
        if total < want:
            raise InputError(
                f"train.global_batch wants {want} samples of a kind, but there are only {total} samples: lower it "
                "or add data"
            )
    joined = np.arange(totals.shape[1])
    while True:
        filled = np.flatnonzero(totals.sum(0))
        shares = (totals[:, filled] / wanted[:, None]).min(0)
        if shares.min() >= 1:
            return joined
        small = filled[np.argmin(shares)]
        others = filled[filled != small]
        near = others[
            np.argmin(np.maximum(ratios[others] / ratios[small], ratios[small] / ratios[others]))
        ]
        joined[joined == small] = near
        totals[:, near] += totals[:, small]
        totals[:, small] = 0


def share_buckets(images, pairs):
    """Makes of two BucketSampler, of the images and of the pairs of every batch, those of a mixture: alike joined, so that each
    bucket has enough of either kind, and with the pairs in the lead. They are the fewer; their epochs are those of a run.
    """
    joined = join_small(
        np.stack([images.counts.sum(0), pairs.counts.sum(0)]),
        pairs.ratios,
        [images.global_batch, pairs.global_batch],
    )
    for plan in (images, pairs):
        plan.join(joined)
        plan.leader = pairs
