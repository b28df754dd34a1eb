"""Aspect-ratio buckets: each global batch has one shape close to the shapes of its images.

All bucket shapes have about the same area.
"""

import threading
from collections import OrderedDict

import numpy as np

from iomm.config import InputError
from iomm.engine.data.index import Index
from iomm.engine.data.samplers import EpochPermutation, mix, permute
from iomm.engine.data.sizes import Upscaled, chunks

# Of a bucket. Images with a larger aspect ratio are cropped to it.
MAX_ASPECT = 4.0
# Sides are multiples of about size_px / 16: 32 px at 512, 64 px at 1024.
UNITS_PER_SIDE = 16
# Shards whose samples are kept sorted by bucket. 10,000 samples take 40 KB.
CACHED_SHARDS = 64


def bucket_sizes(size_px: int, multiple_px: int = 1) -> list[tuple[int, int]]:
    """Return (height, width) of all buckets, from tall to wide.

    Sides are multiples of multiple_px and of about size_px / 16. Areas are within 6 % of size_px^2,
    and aspect ratios are at most 4. There are 41 buckets where size_px / 16 is a multiple of
    multiple_px.
    """
    unit = -(-size_px // (UNITS_PER_SIDE * multiple_px)) * multiple_px
    sizes = {(size_px, size_px)}
    for short in range(unit, size_px + 1, unit):
        for long in range(size_px // unit * unit, int(MAX_ASPECT * short) + 1, unit):
            if abs(short * long / size_px**2 - 1) <= 0.06:
                sizes |= {(short, long), (long, short)}
    return sorted(sizes, key=lambda size: (size[1] / size[0], size))


class BucketSampler:
    """Sampler (see samplers.Sampler) on aspect-ratio buckets, one bucket per global batch.

    A sample belongs to the bucket whose aspect ratio is nearest to its own on a log scale. A bucket
    with fewer than G = global_batch samples is merged into its nearest neighbour.

    Each bucket has its own order and its own epochs. Its b-th batch is the positions
    [b G, (b + 1) G) of that order. Samples left over at the end of a bucket's epoch open the first
    batch of its next one, so no sample is dropped or repeated. In epoch e of the run, the
    batches that the buckets complete with their e-th pass are shuffled by (seed, e). After E epochs
    each sample was visited E times, except for the fewer than G left-over samples of each bucket,
    which were visited E - 1 times. A position is therefore a pure function of (seed, n), for any
    number of ranks.

    Memory is O(shards x buckets). Construction makes one pass over the sizes in the index (0.3 s
    for 10 M samples). A position then costs O(log shards), plus sorting the samples of a shard that
    was not read recently.

    Two instances make the batches of a mixture (see share_buckets). One leads and the other follows
    its buckets, so step s of both is the b-th batch of the same bucket. The statements about epochs
    hold for the leader. In the follower, each bucket visits all of its samples before it visits one
    twice.
    """

    def __init__(
        self,
        seed: int,
        index: Index,
        global_batch: int,
        sizes: list[tuple[int, int]],
        group_shards: int = 16,
        held_out: int | np.ndarray = 0,
    ) -> None:
        """Assign all samples to buckets.

        Args:
            seed: seed of the run.
            index: the indexed samples.
            global_batch: samples per step, G.
            sizes: (height, width) of the buckets, from bucket_sizes.
            group_shards: shards from which samples are drawn at a time, see EpochPermutation.
            held_out: number of samples at the end of each shard that are never visited.
        """
        self.seed = int(seed)
        self.global_batch = int(global_batch)
        self.group_shards = group_shards
        self.records = index.records
        self.leader: BucketSampler = self
        self._all_sizes = sizes
        shard_sizes = np.array([shard["num_samples"] for shard in index.shards], dtype=np.int64)
        self.num_samples = shard_sizes - held_out
        self.first_entry = np.cumsum(shard_sizes) - shard_sizes
        self.ratios = np.array([width / height for height, width in sizes])
        # Unlike logarithms, square roots are the same floats on every machine.
        self._borders = np.sqrt(self.ratios[1:] * self.ratios[:-1])
        self._joined = np.arange(len(sizes))
        self.counts = np.stack(
            [
                np.bincount(self._buckets(shard), minlength=len(sizes))
                for shard in range(len(shard_sizes))
            ]
        )
        self.join(join_small(self.counts.sum(0)[None], self.ratios, [self.global_batch]))

    def join(self, joined: np.ndarray) -> None:
        """Merge bucket k into bucket joined[k], for all k, and set up the order of each bucket."""
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
        self._sorted: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, n: np.ndarray, attempt: int = 0) -> np.ndarray:
        n = np.asarray(n, dtype=np.int64)
        entries = np.empty_like(n)
        steps = n // self.global_batch
        for step in np.unique(steps):
            chosen = steps == step
            bucket, batch = self.leader._batch(int(step))
            positions = batch * self.global_batch + n[chosen] % self.global_batch + attempt
            entries[chosen] = self._entries(bucket, self.orders[bucket](positions))
        return entries

    def size_px(self, step: int) -> tuple[int, int]:
        return self.sizes[self.leader._batch(int(step))[0]]

    def is_pair(self, n: np.ndarray) -> np.ndarray:
        return np.zeros(len(n), dtype=bool)

    def upscaled(self, size_px: int) -> Upscaled:
        """Count the images of the index, held-out ones too, of which a side is below the bucket's.

        They are upscaled to cover it. size_px is the one that bucket_sizes was given.
        """
        heights, widths = np.array(self._all_sizes).T
        nums, totals = np.zeros((2, len(heights)), dtype=np.int64)
        largest_px = 0
        for records in chunks(self.records):
            width, height = records["width"], records["height"]
            buckets = self._buckets_of(records)
            small = (height < heights[buckets]) | (width < widths[buckets])
            totals += np.bincount(buckets, minlength=len(heights))
            nums += np.bincount(buckets[small], minlength=len(heights))
            edges = np.minimum(width, height)[small]
            largest_px = max(largest_px, int(edges.max(initial=0)))
        return Upscaled(
            num=int(nums.sum()),
            total=len(self.records),
            size_px=size_px,
            enough_px=largest_px + 1,
            buckets={
                self._all_sizes[bucket]: (int(nums[bucket]), int(totals[bucket]))
                for bucket in np.flatnonzero(totals)
            },
        )

    def _batch(self, step: int) -> tuple[int, int]:
        """Return (bucket, number of the batch in that bucket's own order) of a step."""
        epoch = step * self.global_batch // self.total
        while self._batches_before(epoch + 1).sum() <= step:
            epoch += 1
        first = self._batches_before(epoch)
        ends = np.cumsum(self._batches_before(epoch + 1) - first)
        place = int(permute(np.array([step - first.sum()]), ends[-1], mix(self._key, epoch))[0])
        bucket = int(np.searchsorted(ends, place, side="right"))
        return bucket, int(first[bucket]) + place - (int(ends[bucket - 1]) if bucket else 0)

    def _batches_before(self, epoch: int) -> np.ndarray:
        """Return the number of batches that `epoch` passes complete, per bucket."""
        return self.totals * epoch // self.global_batch

    def _entries(self, bucket: int, ordinals: np.ndarray) -> np.ndarray:
        """Return the index entries of a bucket's samples, which are numbered shard by shard."""
        order = self.orders[bucket]
        shards = np.searchsorted(order.first_entry + order.shard_sizes, ordinals, side="right")
        entries = np.empty_like(ordinals)
        for shard in np.unique(shards):
            chosen = shards == shard
            by_bucket, starts = self._by_bucket(int(shard))
            places = starts[self.used[bucket]] + ordinals[chosen] - order.first_entry[shard]
            entries[chosen] = self.first_entry[shard] + by_bucket[places]
        return entries

    def _by_bucket(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (the shard's samples sorted by bucket, the start of each bucket among them)."""
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

    def _buckets(self, shard: int) -> np.ndarray:
        """Return the bucket of each sample of a shard."""
        first = self.first_entry[shard]
        return self._buckets_of(self.records[first : first + self.num_samples[shard]])

    def _buckets_of(self, records: np.ndarray) -> np.ndarray:
        """Return the bucket of each record."""
        return self._joined[np.searchsorted(self._borders, records["width"] / records["height"])]


def join_small(totals: np.ndarray, ratios: np.ndarray, needed: list[int]) -> np.ndarray:
    """Return the bucket that each bucket is merged into, where small ones join their neighbours.

    Afterwards each bucket has at least needed[k] samples of every kind k, or none at all. The
    bucket that lacks the largest share is merged first, into the neighbour nearest in aspect ratio.

    Args:
        totals: (kinds, buckets) number of samples.
        ratios: (buckets,) aspect ratios.
        needed: (kinds,) samples of each kind in a global batch.

    Raises:
        InputError: there are fewer samples of a kind than a global batch needs.
    """
    totals = totals.copy()
    needed = np.array(needed)
    for total, num in zip(totals.sum(1), needed, strict=True):
        if total < num:
            raise InputError(
                f"a global batch needs {num} samples of one kind, but there are only {total} "
                "samples; lower train.global_batch or add data"
            )
    joined = np.arange(totals.shape[1])
    while True:
        filled = np.flatnonzero(totals.sum(0))
        shares = (totals[:, filled] / needed[:, None]).min(0)
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


def share_buckets(images: BucketSampler, pairs: BucketSampler) -> None:
    """Make two samplers, of the images and the pairs of every batch, use the same buckets.

    Buckets are merged until each has enough samples of both kinds. The pairs lead because there are
    fewer of them, so the epochs of the run are the epochs of the pairs.
    """
    joined = join_small(
        np.stack([images.counts.sum(0), pairs.counts.sum(0)]),
        pairs.ratios,
        [images.global_batch, pairs.global_batch],
    )
    for sampler in (images, pairs):
        sampler.join(joined)
        sampler.leader = pairs
