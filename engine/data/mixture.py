"""Images to look at and captioned pairs in one global batch: stage 2's mixture."""

import numpy as np

from iomm.config import InputError
from iomm.engine.data.samplers import mix


def num_images_per_batch(share, global_batch):
    """How many images a global batch of images and pairs holds: round(share * G)."""
    if not 0 <= share <= 1:
        raise InputError(
            f"data.mix, the share of images in a batch, must be between 0 and 1, got {share}"
        )
    return round(share * global_batch)


class MixtureSampler:
    """The plan of a run on two sources (what a plan is: samplers.FixedSizeSampler): every global batch holds exactly num_images samples
    of `images` and the rest of `pairs`.

    They stand evenly spread, from a place that (seed, step) decides, so that any m neighbouring positions, a rank's
    micro-batch for one, hold their share of images to within one. Each source is a plan of its own part of the batch (None
    where there is no such part), and so has epochs of its own; both give a step the same size. Entries are numbered as in
    Joined: first_pair images, then pairs.
    """

    def __init__(self, seed, global_batch, num_images, images, pairs, first_pair):
        self.global_batch, self.num_images = global_batch, num_images
        for name, source, wanted in (
            ("data.shards", images, num_images),
            ("data.pairs", pairs, global_batch - num_images),
        ):
            if wanted > (source.total if source else 0):
                raise InputError(
                    f"{name} has {source.total if source else 0} samples to train on, but every batch of "
                    f"{global_batch} wants {wanted} of them: add data, or change data.mix or train.global_batch"
                )
        self.images, self.pairs, self._first_pair = images, pairs, first_pair
        self._key = mix(mix(np.zeros(1, np.uint64), int(seed)), -2)

    def __call__(self, n, attempt=0):
        is_pair, ordinal = self._split(n)
        entries = np.empty_like(ordinal)
        for chosen, source, first in (
            (~is_pair, self.images, 0),
            (is_pair, self.pairs, self._first_pair),
        ):
            if chosen.any():
                entries[chosen] = first + source(ordinal[chosen], attempt)
        return entries

    def size_px(self, step):
        return (self.pairs or self.images).size_px(step)

    def is_pair(self, n):
        return self._split(n)[0]

    def _split(self, n):
        """(whether it is a pair, its position in its source's own order) of the run positions n."""
        n = np.asarray(n, dtype=np.int64)
        step, place = n // self.global_batch, n % self.global_batch
        turn = (mix(self._key, step) % np.uint64(self.global_batch)).astype(np.int64)
        place = (place + turn) % self.global_batch
        before = place * self.num_images // self.global_batch
        is_pair = (place + 1) * self.num_images // self.global_batch == before
        num_pairs = self.global_batch - self.num_images
        return is_pair, np.where(
            is_pair, step * num_pairs + place - before, step * self.num_images + before
        )


class Joined:
    """Two sets of Shards as one: entries of `images` (may be None), then those of `pairs`; the same methods."""

    def __init__(self, images, pairs):
        self.images, self.pairs = images, pairs
        self._first_pair = len(images) if images is not None else 0
        self._first_shard = len(images.shard_sizes) if images is not None else 0

    def __len__(self):
        return self._first_pair + len(self.pairs)

    def decodable_bytes(self, k):
        shards, k, _ = self._find(k)
        return shards.decodable_bytes(k)

    def caption(self, k):
        shards, k, _ = self._find(k)
        return shards.caption(k)

    def name(self, k):
        shards, k, _ = self._find(k)
        return shards.name(k)

    def shard(self, k):
        shards, k, first_shard = self._find(k)
        return first_shard + shards.shard(k)

    def _find(self, k):
        if k < self._first_pair:
            return self.images, k, 0
        return self.pairs, k - self._first_pair, self._first_shard
