"""The finetune stage's mixture: images and captioned pairs in one global batch."""

import numpy as np

from iomm.config import InputError
from iomm.engine.data.samplers import Sampler, mix
from iomm.engine.data.shards import Shards


def num_images_per_batch(share: float, global_batch: int) -> int:
    """Return the number of images in a global batch of images and pairs, round(share * G)."""
    if not 0 <= share <= 1:
        raise InputError(
            f"data.mix, the share of images in a batch, must be between 0 and 1, got {share}"
        )
    return round(share * global_batch)


class MixtureSampler:
    """Sampler (see samplers.Sampler) of images and pairs with a fixed share of each.

    Every global batch holds exactly num_images images, and pairs in the other positions. Both are
    spread evenly over the batch, from a place that (seed, step) decides. Any m neighbouring
    positions, like a rank's micro-batch, therefore hold their share of images to within one. Each
    source has a sampler of its part of the batch, and so its own epochs. Both give a step the same
    size. Entries are numbered as in Joined: first_pair images, then pairs.
    """

    def __init__(
        self,
        seed: int,
        global_batch: int,
        num_images: int,
        images: Sampler | None,
        pairs: Sampler | None,
        first_pair: int,
    ) -> None:
        """Check that both sources have enough samples.

        Args:
            seed: seed of the run.
            global_batch: samples per step.
            num_images: images among them.
            images: sampler of the images, None if num_images is 0.
            pairs: sampler of the pairs, None if num_images is global_batch.
            first_pair: entry of the first pair, which is the number of images in the dataset.

        Raises:
            InputError: a source has fewer samples than one batch needs.
        """
        self.global_batch = global_batch
        self.num_images = num_images
        for name, source, needed in (
            ("data.shards", images, num_images),
            ("data.pairs", pairs, global_batch - num_images),
        ):
            available = source.total if source else 0
            if needed > available:
                raise InputError(
                    f"{name} has {available} samples to train on, but every batch of "
                    f"{global_batch} needs {needed} of them; add data, or change data.mix or "
                    "train.global_batch"
                )
        self.images = images
        self.pairs = pairs
        self._first_pair = first_pair
        self._key = mix(mix(np.zeros(1, np.uint64), int(seed)), -2)

    def __call__(self, n: np.ndarray, attempt: int = 0) -> np.ndarray:
        is_pair, ordinal = self._split(n)
        entries = np.empty_like(ordinal)
        for chosen, source, first in (
            (~is_pair, self.images, 0),
            (is_pair, self.pairs, self._first_pair),
        ):
            if chosen.any():
                entries[chosen] = first + source(ordinal[chosen], attempt)
        return entries

    def size_px(self, step: int) -> tuple[int, int]:
        return (self.pairs or self.images).size_px(step)

    def is_pair(self, n: np.ndarray) -> np.ndarray:
        return self._split(n)[0]

    def _split(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (whether it is a pair, position in its source's order) of run positions n."""
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
    """Two sets of Shards as one, with the same methods.

    The entries of `images`, which may be None, come first, and then the entries of `pairs`.
    """

    def __init__(self, images: Shards | None, pairs: Shards) -> None:
        self.images = images
        self.pairs = pairs
        self._first_pair = len(images) if images is not None else 0
        self._first_shard = len(images.shard_sizes) if images is not None else 0

    def __len__(self) -> int:
        return self._first_pair + len(self.pairs)

    def decodable_bytes(self, k: int) -> bytes:
        shards, k, _ = self._find(k)
        return shards.decodable_bytes(k)

    def caption(self, k: int) -> str:
        shards, k, _ = self._find(k)
        return shards.caption(k)

    def name(self, k: int) -> str:
        shards, k, _ = self._find(k)
        return shards.name(k)

    def shard(self, k: int) -> int:
        shards, k, first_shard = self._find(k)
        return first_shard + shards.shard(k)

    def _find(self, k: int) -> tuple[Shards, int, int]:
        """Return (shards of the entry, its entry there, number of shards before them)."""
        if k < self._first_pair:
            return self.images, k, 0
        return self.pairs, k - self._first_pair, self._first_shard
