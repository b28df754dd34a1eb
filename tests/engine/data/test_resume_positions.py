"""Samplers of aspect-ratio buckets and mixtures.

Every sample occurs once per epoch, every reader gets the same order, and batches have the right
shapes.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iomm.config import InputError
from iomm.engine.data.buckets import BucketSampler, bucket_sizes, join_small, share_buckets
from iomm.engine.data.index import build
from iomm.engine.data.mixture import Joined, MixtureSampler, num_images_per_batch
from iomm.engine.data.samplers import EpochPermutation, FixedSizeSampler, held_out, held_out_entries
from iomm.engine.data.shards import Shards
from iomm.engine.data.source import ImageSource
from iomm.engine.data.validate import RECORD
from iomm.engine.shapes.dataset import write_dataset


@dataclass
class SizesOnly:
    """The attributes of an Index that BucketSampler uses."""

    records: np.ndarray
    shards: list


def sizes_only(shard_sizes, seed=0):
    """Return an index of random sizes, more often landscape than portrait."""
    random = np.random.default_rng(seed)
    records = np.zeros(sum(shard_sizes), dtype=RECORD)
    ratio = np.exp(random.normal(0.15, 0.4, len(records)))
    records["width"], records["height"] = 600 * np.sqrt(ratio), 600 / np.sqrt(ratio)
    return SizesOnly(records, [{"num_samples": size} for size in shard_sizes])


@pytest.mark.parametrize(
    "size_px, multiple_px, num", [(512, 16, 41), (1024, 16, 41), (256, 16, 41), (32, 4, 9)]
)
def test_bucket_sizes(size_px, multiple_px, num):
    found = bucket_sizes(size_px, multiple_px)
    assert len(found) == len(set(found)) == num and (size_px, size_px) in found
    ratios = [width / height for height, width in found]
    assert (
        ratios == sorted(ratios) and len(set(ratios)) == num and max(ratios) == 1 / min(ratios) == 4
    )
    for height, width in found:
        assert (
            height % multiple_px == width % multiple_px == 0
            and abs(height * width / size_px**2 - 1) < 0.061
        )
        assert (width, height) in found


def run_of(sampler, global_batch, num_steps):
    return sampler(np.arange(num_steps * global_batch)).reshape(num_steps, global_batch)


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) >= 16),
    st.integers(0, 10**9),
    st.sampled_from([1, 4, 7, 16]),
    st.integers(1, 3),
)
def test_bucket_visits_its_samples_once_per_epoch(shard_sizes, seed, batch, group_shards):
    """After E epochs each sample has been visited E times.

    Exceptions are the left-over samples of a bucket. They are fewer than a batch, have been visited
    E - 1 times, and open the bucket's next epoch.
    """
    index = sizes_only(shard_sizes, seed)
    sampler = BucketSampler(seed, index, batch, bucket_sizes(512, 16), group_shards)
    assert (sampler.totals >= batch).all() and sampler.totals.sum() == len(index.records)
    epochs = [int(sampler._batches_before(epoch).sum()) for epoch in range(4)]
    steps = run_of(sampler, batch, epochs[3])
    shape_of = {}
    for step, entries in enumerate(steps):
        size = sampler.size_px(step)
        # A batch has one shape, and so does a sample.
        assert {shape_of.setdefault(entry, size) for entry in entries.tolist()} == {size}
    for epoch in (1, 2, 3):
        visits = Counter(steps[: epochs[epoch]].ravel().tolist())
        for size, total in zip(sampler.sizes, sampler.totals, strict=True):
            times = Counter(visits[entry] for entry, shape in shape_of.items() if shape == size)
            assert times[epoch] == total - total * epoch % batch and set(times) <= {
                epoch,
                epoch - 1,
            }
    assert len(shape_of) == len(index.records)


def test_epoch_holds_the_batches_that_its_passes_complete():
    index = sizes_only([400] * 5)
    sampler = BucketSampler(3, index, 16, bucket_sizes(512, 16))
    per_epoch = [
        int((sampler.totals * (e + 1) // 16 - sampler.totals * e // 16).sum()) for e in range(4)
    ]
    assert abs(sum(per_epoch) - 4 * 2000 / 16) <= len(sampler.sizes)
    first = [sampler.size_px(step) for step in range(per_epoch[0])]
    assert Counter(first) == {
        size: total // 16 for size, total in zip(sampler.sizes, sampler.totals, strict=True)
    }
    assert first != sorted(first) and first != [
        sampler.size_px(per_epoch[0] + step) for step in range(per_epoch[0])
    ]


def test_image_gets_the_nearest_shape():
    index = sizes_only([800])
    found = bucket_sizes(512, 16)
    sampler = BucketSampler(0, index, 1, found)
    for step, (entry,) in enumerate(run_of(sampler, 1, 800)):
        ratio = index.records["width"][entry] / index.records["height"][entry]
        height, width = sampler.size_px(step)
        nearest = min(abs(np.log(w / h / ratio)) for h, w in found)
        assert abs(np.log(width / height / ratio)) == pytest.approx(nearest, abs=1e-9)


def test_random_access_needs_no_replay():
    index = sizes_only([300] * 10)
    sequential = run_of(BucketSampler(5, index, 8, bucket_sizes(512, 16)), 8, 800)
    fresh = BucketSampler(5, index, 8, bucket_sizes(512, 16))
    for step in (799, 3, 500, 0, 421):
        # Each rank reads only its own part.
        for rank in range(4):
            n = np.arange(step * 8 + 2 * rank, step * 8 + 2 * rank + 2)
            assert fresh(n).tolist() == sequential[step, 2 * rank : 2 * rank + 2].tolist()
    # Replacements come from the same bucket.
    replacements = fresh(np.arange(400, 408), attempt=1)
    assert {tuple(bucket_of(fresh, index, entry)) for entry in replacements} == {fresh.size_px(50)}


def bucket_of(sampler, index, entry):
    shard = int(np.searchsorted(sampler.first_entry + sampler.num_samples, entry, side="right"))
    bucket = sampler._buckets(shard)[entry - sampler.first_entry[shard]]
    return sampler.sizes[int(np.flatnonzero(sampler.used == bucket)[0])]


def test_small_buckets_join_their_neighbours():
    ratios = np.array([0.5, 0.8, 1.0, 1.3, 2.0])
    assert join_small(np.array([[5, 0, 9, 3, 20]]), ratios, [8]).tolist() == [2, 1, 2, 2, 4]
    assert join_small(np.array([[1, 1, 1, 1, 4]]), ratios, [8]).tolist() == [4] * 5
    with pytest.raises(InputError, match="there are only 30 samples"):
        join_small(np.array([[10, 20]]), ratios[:2], [64])


def test_bucket_without_one_kind_joins_a_neighbour():
    ratios = np.array([0.5, 0.8, 1.0, 1.3, 2.0])
    images, pairs = [50, 50, 50, 50, 50], [0, 9, 90, 0, 3]
    assert join_small(np.array([images, pairs]), ratios, [4, 4]).tolist() == [1, 1, 2, 2, 2]
    with pytest.raises(
        InputError, match="needs 8 samples of one kind, but there are only 7 samples"
    ):
        join_small(np.array([[10, 20], [0, 7]]), ratios[:2], [8, 8])


def squares(seed, shard_sizes):
    return FixedSizeSampler(EpochPermutation(seed, shard_sizes), 32)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 48), st.floats(0, 1), st.integers(0, 10**9), st.integers(0, 10**6))
def test_mixture_has_its_exact_share_in_every_batch(batch, share, seed, step):
    sampler = MixtureSampler(
        seed,
        batch,
        num_images_per_batch(share, batch),
        squares(seed, [40, 24]),
        squares(seed, [50]),
        64,
    )
    n = np.arange(step * batch, (step + 1) * batch)
    is_pair = sampler.is_pair(n)
    assert (~is_pair).sum() == round(share * batch)
    assert ((sampler(n) >= 64) == is_pair).all()
    # The kinds are spread evenly: any m neighbours have their share to within one image.
    for m in {1, 2, 4, batch}:
        for start in range(batch - m + 1):
            assert (
                abs((~is_pair[start : start + m]).sum() - m * round(share * batch) / batch)
                < 1 + 1e-9
            )
    assert sampler(n[::-1]).tolist() == sampler(n)[::-1].tolist()


def test_each_source_of_a_mixture_has_its_own_epochs():
    images, pairs = squares(1, [30, 34]), squares(1, [25])
    sampler = MixtureSampler(1, 10, 3, images, pairs, 64)
    n = np.arange(10 * 200)
    is_pair, entries = sampler.is_pair(n), sampler(n)
    assert entries[~is_pair].max() < 64 <= entries[is_pair].min()
    # Batches are rotated, so they are compared as sets.
    for step in range(200):
        batch = slice(10 * step, 10 * step + 10)
        assert set(entries[batch][~is_pair[batch]]) == set(
            images(np.arange(3 * step, 3 * step + 3)).tolist()
        )
        assert set(entries[batch][is_pair[batch]]) == {
            64 + k for k in pairs(np.arange(7 * step, 7 * step + 7)).tolist()
        }
    assert len({tuple(is_pair[10 * step : 10 * step + 10]) for step in range(200)}) > 3


def test_wrong_mixtures_raise_input_error():
    with pytest.raises(
        InputError,
        match=r"data\.mix, the share of images in a batch, must be between 0 and 1, got 1\.5",
    ):
        num_images_per_batch(1.5, 8)
    with pytest.raises(
        InputError,
        match=r"data\.pairs has 3 samples to train on, but every batch of 8 needs 4 of them",
    ):
        MixtureSampler(0, 8, 4, squares(0, [9]), squares(0, [3]), 9)
    with pytest.raises(InputError, match=r"data\.shards has 0 samples"):
        MixtureSampler(0, 8, 4, None, squares(0, [30]), 0)


@pytest.mark.parametrize(
    "seed, batch, share, num_held_out", [(0, 8, 0.5, 0), (1, 7, 0.4, 40), (2, 12, 0.25, 40)]
)
def test_mixture_in_buckets_has_one_shape_and_its_exact_share(seed, batch, share, num_held_out):
    """Pairs lead, and each is visited once per epoch.

    Images follow the shapes of the pairs. In each shape all images are visited before one is
    visited twice.
    """
    num_images = num_images_per_batch(share, batch)
    images, pairs = sizes_only([120, 0, 180], seed), sizes_only([90, 50], seed + 1)
    shapes = bucket_sizes(512, 16)
    kept = [
        held_out([shard["num_samples"] for shard in index.shards], num_held_out)
        for index in (images, pairs)
    ]

    def make():
        samplers = (
            BucketSampler(seed, images, num_images, shapes, held_out=kept[0]),
            BucketSampler(seed, pairs, batch - num_images, shapes, held_out=kept[1]),
        )
        share_buckets(*samplers)
        return *samplers, MixtureSampler(seed, batch, num_images, *samplers, 300)

    follower, leader, sampler = make()
    assert (
        follower.sizes == leader.sizes
        and (follower.totals >= num_images).all()
        and (leader.totals >= batch - num_images).all()
    )
    num_steps = int(leader._batches_before(3).sum())
    entries = run_of(sampler, batch, num_steps)
    is_pair = sampler.is_pair(np.arange(num_steps * batch)).reshape(num_steps, batch)
    assert ((~is_pair).sum(1) == num_images).all() and ((entries >= 300) == is_pair).all()
    visits = Counter(entries.ravel().tolist())
    by_shape = {}
    for step in range(num_steps):
        assert sampler.size_px(step) == follower.size_px(step) == leader.size_px(step)
        for entry in entries[step].tolist():
            by_shape.setdefault((entry < 300, sampler.size_px(step)), set()).add(entry)
    for (is_image, shape), seen in by_shape.items():
        source, index, first = (follower, images, 0) if is_image else (leader, pairs, 300)
        assert all(bucket_of(source, index, entry - first) == shape for entry in seen)
        times = [visits[entry] for entry in seen]
        if is_image:
            assert max(times) - min(times) <= 1
        else:
            assert set(times) <= {2, 3} and times.count(2) < batch - num_images
    never = {
        *held_out_entries([120, 0, 180], num_held_out),
        *(300 + held_out_entries([90, 50], num_held_out)),
    }
    assert len(never) == 2 * num_held_out and not never & set(visits)
    assert {k for k in visits if k >= 300} | {k for k in never if k >= 300} == set(range(300, 440))
    # Any rank can start at any position.
    *_, fresh = make()
    for step in (num_steps - 1, 0, num_steps // 2):
        for place in (0, batch - 1):
            assert fresh(np.array([step * batch + place])).tolist() == [entries[step, place]]
    replacements = sampler(np.arange(batch), attempt=1)
    assert ((replacements >= 300) == is_pair[0]).all()
    assert set(replacements.tolist()).isdisjoint(never)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 4),
    st.data(),
)
def test_held_out_samples_are_spread_and_never_visited(shard_sizes, data):
    total = sum(shard_sizes)
    num = data.draw(st.integers(0, total - 1))
    kept, entries = held_out(shard_sizes, num), held_out_entries(shard_sizes, num)
    assert kept.sum() == len(set(entries)) == len(entries) == num and (kept <= shard_sizes).all()
    assert all(
        abs(count - size * num / total) < 1 for count, size in zip(kept, shard_sizes, strict=True)
    )
    order = EpochPermutation(5, shard_sizes, held_out=kept)
    for epoch in range(2):
        seen = order(np.arange(epoch * order.total, (epoch + 1) * order.total)).tolist()
        assert sorted([*seen, *entries]) == list(range(total))


def test_held_out_none_is_identity_and_all_is_refused():
    assert (
        EpochPermutation(3, [9, 8])(np.arange(40)).tolist()
        == EpochPermutation(3, [9, 8], held_out=held_out([9, 8], 0))(np.arange(40)).tolist()
    )
    with pytest.raises(
        InputError, match=r"data\.heldout must leave samples to train on: got 17 of 17"
    ):
        held_out([9, 8], 17)


@pytest.fixture(scope="module")
def two_datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    return [
        Shards(
            build(
                write_dataset(folder / name, num_images=num, size_px=48, seed=seed, shard_size=8),
                folder / f"{name}-index",
                progress=False,
            )
        )
        for name, num, seed in (("images", 20, 1), ("pairs", 12, 2))
    ]


def batches_of(samples, sampler, rank=0, world_size=1, micro_batch=4, **options):
    return list(
        ImageSource(
            samples,
            seed=3,
            global_batch=8,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
            size_px=32,
            vit_px=24,
            device="cpu",
            num_steps=5,
            sampler=sampler,
            **options,
        )
    )


def test_mixed_batch_has_captions_and_vit_pixels(two_datasets):
    images, pairs = two_datasets
    sampler = MixtureSampler(
        3, 8, 4, *(squares(3, shards.shard_sizes) for shards in two_datasets), 20
    )
    samples = Joined(images, pairs)
    flipped_batches = batches_of(samples, sampler, flip=True)
    for batch in flipped_batches:
        assert batch.has_image == [k < 20 for k in batch.entry_B.tolist()]
        assert batch.captions == [
            "" if k < 20 else pairs.caption(k - 20) for k in batch.entry_B.tolist()
        ]
        assert batch.pixels_BCHW.shape == (4, 3, 32, 32) and batch.vit_pixels_BHWC.shape == (
            sum(batch.has_image),
            24,
            24,
            3,
        )
    # Pairs are not mirrored, because the caption may mention left or right.
    for flipped, straight in zip(flipped_batches, batches_of(samples, sampler), strict=True):
        for i, has_image in enumerate(flipped.has_image):
            assert has_image or (flipped.pixels_BCHW[i] == straight.pixels_BCHW[i]).all()
    two_ranks = [
        batch for rank in range(2) for batch in batches_of(samples, sampler, rank, 2, flip=True)
    ]
    pixels = {
        n: pixel
        for batch in two_ranks
        for n, pixel in zip(batch.n_B.tolist(), batch.pixels_BCHW, strict=True)
    }
    assert all(
        (pixels[n] == pixel).all()
        for batch in flipped_batches
        for n, pixel in zip(batch.n_B.tolist(), batch.pixels_BCHW, strict=True)
    )


def test_batches_of_pairs_only(two_datasets):
    _, pairs = two_datasets
    for batch in batches_of(
        Joined(None, pairs), MixtureSampler(3, 8, 0, None, squares(3, pairs.shard_sizes), 0)
    ):
        assert (
            not any(batch.has_image)
            and all(batch.captions)
            and batch.vit_pixels_BHWC.shape == (0, 24, 24, 3)
        )


def test_batch_of_a_bucket_has_its_shape(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, size in enumerate([(90, 40), (40, 90), (64, 60)] * 12):
        Image.new("RGB", size, (7 * i, 0, 255 - 7 * i)).save(tmp_path / "photos" / f"{i:02d}.png")
    shards = Shards(build(tmp_path / "photos", tmp_path / "index", progress=False))
    sampler = BucketSampler(3, shards.index, 8, bucket_sizes(32, 4))
    shapes = {(height, width) for height, width in sampler.sizes}
    assert len(shapes) == 3
    seen = set()
    for rank in range(2):
        for i, batch in enumerate(batches_of(shards, sampler, rank, 2)):
            assert batch.pixels_BCHW.shape[-2:] == sampler.size_px(
                i
            ) and batch.vit_pixels_BHWC.shape[1:] == (24, 24, 3)
            seen.add(tuple(batch.pixels_BCHW.shape[-2:]))
            for entry, pixels in zip(batch.entry_B.tolist(), batch.pixels_BCHW, strict=True):
                colour = shards.name(entry).split(": ")[1].split(".")[0]
                assert round(float((pixels[0].mean() + 1) * 127.5)) == 7 * int(colour)
    assert seen <= shapes and len(seen) > 1
