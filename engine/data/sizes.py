"""Sizes in an index: shorter edges, images that a run upscales, and captions that it cuts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from iomm.config import InputError

if TYPE_CHECKING:
    from iomm.caption_limit import CaptionLimit
    from iomm.engine.data.shards import Shards

# Of the shorter edges, in the summary of an index.
PERCENTILES = (1, 5, 25, 50, 75, 95)
# Records read at a time, 39 MB.
CHUNK = 1 << 20
NUM_SIDES = 1 << 16
# Buckets that a sentence names.
NAMED_BUCKETS = 3
# Captions that are tokenized to count the long ones. It takes a few seconds.
MAX_TOKENIZED = 10_000


class Upscaled(NamedTuple):
    """How many images of an index are smaller than the crops of a run, which upscales them."""

    # Images that are smaller, and all images.
    num: int
    total: int
    # Side of a square with the area of the crops.
    size_px: int
    # A data.min_size_px that leaves out all of these images.
    enough_px: int
    # (height, width) of each bucket -> (smaller images, all images). Empty for squares.
    buckets: dict[tuple[int, int], tuple[int, int]]

    def sentence(self, noun: str) -> str:
        """Return the share in a sentence without a full stop. noun: like "images"."""
        counts = f"{percent(self.num, self.total)} of the {noun} ({self.num:,})"
        if not self.buckets:
            return f"{counts} are smaller than {self.size_px} px and would be upscaled"
        return (
            f"{counts} are smaller than their bucket of about {self.size_px} x {self.size_px} px "
            f"and would be upscaled{self._by_bucket()}"
        )

    def _by_bucket(self) -> str:
        """Return the buckets with most such images, width x height, to append to a sentence."""
        found = sorted(
            ((num, total, size) for size, (num, total) in self.buckets.items() if num), reverse=True
        )
        parts = [
            f"{num:,} of {total:,} in {width} x {height}"
            for num, total, (height, width) in found[:NAMED_BUCKETS]
        ]
        others = sum(num for num, *_ in found[NAMED_BUCKETS:])
        if others:
            parts.append(f"{others:,} in other buckets")
        return f": {', '.join(parts)}" if parts else ""


def upscaled_squares(records: np.ndarray, size_px: int) -> Upscaled:
    """Count the images whose shorter edge is below size_px, the side of square crops.

    records: (N,) of RECORD. The time is that of reading them once, 0.2 s for 10 M images.
    """
    num = sum(int((edges < size_px).sum()) for edges in shorter_edges(records))
    return Upscaled(num, len(records), size_px, size_px, {})


class LongCaptions(NamedTuple):
    """How many captions of an index exceed the MLLM's context, so that a run cuts them."""

    # Captions that are longer, and all captions.
    num: int
    total: int
    # Tokens of the longest caption that fits.
    max_tokens: int
    # Shard and member of the first one.
    example: str
    # Only some of the captions were tokenized.
    estimated: bool

    def sentence(self, mllm: str) -> str:
        """Return the counts in a sentence without a full stop. mllm: name of the MLLM."""
        about = "about " if self.estimated else ""
        return (
            f"{about}{self.num:,} of {self.total:,} captions are longer than the "
            f"{self.max_tokens:,} tokens that fit into the context of model.mllm={mllm}, and "
            f"training cuts them; the first is {self.example}"
        )


def count_long(shards: Shards, limit: CaptionLimit) -> LongCaptions:
    """Count the captions that a run would cut.

    Only those with more bytes than the limit has tokens are read. Of more than MAX_TOKENIZED, so
    many are tokenized, spread evenly, and the others are counted in proportion. A caption that
    cannot be read now does not count.
    """
    sizes = shards.index.records["caption_bytes"]
    suspects = np.flatnonzero(sizes > limit.max_tokens)
    chosen = suspects
    if len(suspects) > MAX_TOKENIZED:
        chosen = suspects[np.arange(MAX_TOKENIZED) * len(suspects) // MAX_TOKENIZED]
    long = []
    for k in chosen.tolist():
        try:
            caption = shards.caption(k)
        except InputError:
            continue
        if limit.cut(caption) != caption:
            long.append(k)
    return LongCaptions(
        num=round(len(long) * len(suspects) / max(1, len(chosen))),
        total=int((sizes > 0).sum()),
        max_tokens=limit.max_tokens,
        example=shards.name(long[0]) if long else "",
        estimated=len(chosen) < len(suspects),
    )


def percentiles(records: np.ndarray) -> dict[int, int]:
    """Return {0, PERCENTILES and 100: the shorter edge in px that this share does not exceed}."""
    counts = np.zeros(NUM_SIDES, dtype=np.int64)
    for edges in shorter_edges(records):
        counts += np.bincount(edges, minlength=NUM_SIDES)
    ends = np.cumsum(counts)
    # The smallest edge is that of the first image.
    return {
        share: int(np.searchsorted(ends, max(1, -(-share * len(records) // 100))))
        for share in (0, *PERCENTILES, 100)
    }


def describe_edges(records: np.ndarray) -> str:
    """Return the distribution of shorter edges in a line."""
    low, *middle, high = percentiles(records).items()
    parts = [f"{edge} ({share} %)" for share, edge in middle]
    return f"shorter edges: {low[1]} (min), {', '.join(parts)}, {high[1]} (max) px"


def chunks(records: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the records in order, in parts of at most CHUNK."""
    for start in range(0, len(records), CHUNK):
        yield records[start : start + CHUNK]


def shorter_edges(records: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the shorter edges of all images in px, in parts."""
    for part in chunks(records):
        yield np.minimum(part["width"], part["height"])


def percent(num: int, total: int) -> str:
    """Return a share like "38 %". It is rounded down, but not to 0 %, so only all are 100 %."""
    share = 100 * num // total if total else 0
    return "under 1 %" if num and not share else f"{share} %"
