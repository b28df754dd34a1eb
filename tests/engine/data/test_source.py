"""Batches of images: equal on any number of ranks, exact resume, read-ahead, and damage."""

import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from iomm.config import InputError
from iomm.engine.data.bad_samples import BadSamples
from iomm.engine.data.index import build
from iomm.engine.data.samplers import EpochPermutation
from iomm.engine.data.shards import Damaged, Shards
from iomm.engine.data.source import ImageSource
from iomm.engine.shapes.dataset import write_dataset
from iomm.kernels.philox import CROP, FLIP, uniform

# 72 of 30 samples span three epochs, and no epoch ends at a batch boundary.
G = 8
STEPS = 9


@pytest.fixture(scope="module")
def index_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    return build(
        write_dataset(folder / "tars", num_images=30, size_px=48, shard_size=8),
        folder / "index",
        progress=False,
    )


def source(index_dir, rank=0, world_size=1, micro_batch=4, num_steps=STEPS, **options):
    options = {
        "seed": 11,
        "global_batch": G,
        "size_px": 40,
        "vit_px": 24,
        "device": torch.device("cpu"),
        "flip": True,
    } | options
    return ImageSource(
        Shards(index_dir),
        rank=rank,
        world_size=world_size,
        micro_batch=micro_batch,
        num_steps=num_steps,
        **options,
    )


def joined(batches):
    """Return {n: (entry, pixels, vit pixels)} of batches in which every n occurs once."""
    samples = {}
    for batch in batches:
        for n, entry, pixels, vit_pixels in zip(
            batch.n_B.tolist(),
            batch.entry_B.tolist(),
            batch.pixels_BCHW,
            batch.vit_pixels_BHWC,
            strict=True,
        ):
            assert n not in samples
            samples[n] = entry, pixels, vit_pixels
    return samples


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for n, (entry, pixels, vit_pixels) in expected.items():
        assert (
            got[n][0] == entry
            and torch.equal(got[n][1], pixels)
            and torch.equal(got[n][2], vit_pixels)
        )


@pytest.fixture(scope="module")
def whole(index_dir):
    return list(source(index_dir))


def test_batches_follow_the_sampler(index_dir, whole):
    assert len(whole) == len(source(index_dir)) == 2 * STEPS
    order = EpochPermutation(11, Shards(index_dir).shard_sizes)
    for i, batch in enumerate(whole):
        assert batch.n_B.dtype == batch.entry_B.dtype == torch.int64
        assert batch.n_B.tolist() == list(range(4 * i, 4 * i + 4))
        assert batch.entry_B.tolist() == order(np.arange(4 * i, 4 * i + 4)).tolist()
        assert batch.captions == [""] * 4 and batch.has_image == [True] * 4 and batch.failures == []
        assert batch.pixels_BCHW.shape == (4, 3, 40, 40) and batch.vit_pixels_BHWC.shape == (
            4,
            24,
            24,
            3,
        )
        assert batch.pixels_BCHW.abs().max() <= 1 and batch.wait_s >= 0


@pytest.mark.parametrize("world_size, micro_batch", [(1, 8), (1, 1), (2, 4), (2, 2), (4, 1)])
def test_samples_are_the_same_on_any_number_of_ranks(index_dir, whole, world_size, micro_batch):
    ranks = [list(source(index_dir, rank, world_size, micro_batch)) for rank in range(world_size)]
    # The samples are equal in every global batch.
    for step in range(STEPS):
        per_step = G // micro_batch // world_size
        parts = [
            batch for batches in ranks for batch in batches[step * per_step : (step + 1) * per_step]
        ]
        assert_equal(joined(parts), joined(whole[2 * step : 2 * step + 2]))


@pytest.mark.parametrize("start_step, micro_batch", [(1, 4), (4, 8), (8, 2)])
def test_resume_continues_the_same_sequence(index_dir, whole, start_step, micro_batch):
    """Also with another micro-batch: n decides about a sample's mask, time and noise as well."""
    tail = list(source(index_dir, micro_batch=micro_batch, start_step=start_step))
    assert len(tail) == G // micro_batch * (STEPS - start_step)
    assert_equal(joined(tail), joined(whole[2 * start_step :]))


def test_flips_depend_only_on_the_sample_number(index_dir, whole):
    unflipped = joined(source(index_dir, flip=False))
    flips = uniform(11, FLIP, torch.arange(G * STEPS), 1)[:, 0] < 0.5
    assert 0.3 < flips.float().mean() < 0.7
    for n, (_, pixels, vit_pixels) in joined(whole).items():
        expected = [
            image.flip(axis) if flips[n] else image
            for image, axis in zip(unflipped[n][1:], (-1, -2), strict=True)
        ]
        assert torch.equal(pixels, expected[0]) and torch.equal(vit_pixels, expected[1])


def test_source_reads_only_its_samples_and_leaves_no_thread(index_dir):
    before = threading.active_count()
    two_steps = source(index_dir, num_steps=2)
    read = []
    real = two_steps.shards.decodable_bytes

    def recorded(k):
        read.append(k)
        return real(k)

    two_steps.shards.decodable_bytes = recorded
    batches = list(two_steps)
    assert sorted(read) == sorted(entry for batch in batches for entry in batch.entry_B.tolist())
    stopped = iter(source(index_dir))
    next(stopped)
    stopped.close()
    assert threading.active_count() <= before


def damage(path, at):
    """Flip one bit as a faulty disk would, without a change of the file's time."""
    data, status = bytearray(path.read_bytes()), path.stat()
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_replacement_is_the_same_on_any_number_of_ranks(tmp_path):
    """The next sample replaces it. It is reported once, and no other sample changes."""
    tars = write_dataset(tmp_path / "tars", num_images=12, size_px=48, shard_size=12)
    folder = build(tars, tmp_path / "index", progress=False)
    before = joined(source(folder, num_steps=2))
    reader = source(folder)
    # They are neighbours, so the first one needs a second attempt.
    entries = [int(reader.sampler(np.array([n]))[0]) for n in (5, 6)]
    for entry in entries:
        damage(tars[0], int(reader.shards.index.records[entry]["image_offset"]) + 700)
    for world_size, micro_batch in ((1, 4), (2, 2), (4, 1)):
        batches = [
            batch
            for rank in range(world_size)
            for batch in source(folder, rank, world_size, micro_batch, num_steps=2)
        ]
        after = joined(batches)
        assert after.keys() == before.keys()
        failures = sorted(
            (failure for batch in batches for failure in batch.failures), key=lambda f: f.n
        )
        # Each damaged sample occurs once per epoch of 12 samples.
        hit = [n for n, (entry, _, _) in before.items() if entry in entries]
        assert [failure.n for failure in failures] == hit == [f.n for f in failures if not f.fatal]
        for failure in failures:
            assert failure.shard == 0 and "its bytes differ" in failure.problem
        n = 7
        assert after[5][0] == after[6][0] == before[n][0]
        assert_equal(
            {k: v for k, v in after.items() if k not in hit},
            {k: v for k, v in before.items() if k not in hit},
        )


def test_image_refused_by_dali_is_replaced(index_dir, whole):
    reader = source(index_dir)
    whole_image = reader.shards.decodable_bytes
    entries = reader.sampler(np.array([6, 33, 34, 35]))
    reader.shards.decodable_bytes = lambda k: (
        whole_image(k)[:400] if k in entries else whole_image(k)
    )
    batches = list(reader)
    got, expected = joined(batches), joined(whole)
    hit = [n for n, (entry, _, _) in expected.items() if entry in entries]
    failures = [failure for batch in batches for failure in batch.failures]
    assert [failure.n for failure in failures] == hit
    assert all("DALI cannot decode it, although" in failure.problem for failure in failures)
    assert got[6][0] == expected[7][0] and got[33][0] == expected[36][0]
    assert_equal(
        {k: v for k, v in got.items() if k not in hit},
        {k: v for k, v in expected.items() if k not in hit},
    )


def test_turns_are_drawn_in_reader_threads_for_the_samples_of_the_batch(index_dir):
    """A refused sample is replaced, by another caption, after its turn was drawn."""
    threads = []

    def draw_turns(n_B, captions, has_image):
        threads.append(threading.current_thread().name)
        return n_B.tolist(), captions, has_image

    reader = source(index_dir, draw_turns=draw_turns)
    whole_image, (refused,) = reader.shards.decodable_bytes, reader.sampler(np.array([6]))
    reader.shards.decodable_bytes = lambda k: whole_image(k)[: 400 if k == refused else None]
    reader.shards.caption = lambda k: f"caption {k}"
    reader.sampler.is_pair = lambda n: n % 2 == 0
    batches = list(reader)
    for batch in batches:
        assert batch.turns == (batch.n_B.tolist(), batch.captions, batch.has_image)
    failed = sum(bool(batch.failures) for batch in batches)
    assert failed and batches[1].captions[2] not in ("", f"caption {refused}")
    in_readers = [name for name in threads if name.startswith("reader")]
    assert len(in_readers) == len(batches) and len(threads) == len(batches) + failed


def test_batches_stay_full_when_all_samples_are_unreadable(index_dir):
    reader = source(index_dir, num_steps=1)

    def gone(k):
        raise Damaged(f"sample {k} is gone")

    reader.shards.decodable_bytes = gone
    batches = list(reader)
    assert [len(batch.pixels_BCHW) for batch in batches] == [4, 4]
    assert all(failure.fatal for batch in batches for failure in batch.failures)
    assert all((batch.pixels_BCHW == -1).all() for batch in batches)
    bad_samples = BadSamples(1.0, 10)
    with pytest.raises(
        InputError, match=r"sample \d+ is gone. The 16 replacement samples were unreadable as well"
    ):
        bad_samples.record([failure for batch in batches for failure in batch.failures], 8)


def test_shrinking_or_deleted_shard_is_no_bus_error(tmp_path):
    tars = write_dataset(tmp_path / "tars", num_images=40, size_px=48, shard_size=20)
    folder = build(tars, tmp_path / "index", progress=False)
    batches = iter(source(folder, num_steps=30))
    got = [next(batches)]
    os.truncate(tars[0], 30_000)
    # A deleted file stays readable while it is open.
    os.remove(tars[1])
    got += list(batches)
    failures = [failure for batch in got for failure in batch.failures]
    assert len(got) == 60 and failures and {failure.shard for failure in failures} == {0}
    assert all(
        "bytes were read because the shard has changed" in failure.problem for failure in failures
    )


def test_random_crops_depend_only_on_the_sample_number(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.fromarray(noise).save(tmp_path / "photos" / f"{i}.png")
    folder = build(tmp_path / "photos", tmp_path / "index", progress=False)
    options = {"size_px": 48, "crop": "random", "flip": False, "num_steps": 4}
    one = joined(source(folder, **options))
    two = joined([batch for rank in range(2) for batch in source(folder, rank, 2, 2, **options)])
    assert_equal(one, two)
    places = uniform(11, CROP, torch.arange(32), 2)
    assert len(set(places[:, 0].tolist())) == 32
    for n, (_, pixels, _) in one.items():
        left = int(48 * places[n, 0])
        assert torch.equal(
            ((pixels + 1) * 127.5).round().byte(),
            torch.from_numpy(noise[:, left : left + 48].copy()).permute(2, 0, 1),
        )


def test_wrong_input_raises_input_error(index_dir):
    with pytest.raises(
        InputError, match=r"multiple of train\.micro_batch x ranks, got 8 and 3 x 1"
    ):
        source(index_dir, micro_batch=3)
    with pytest.raises(InputError, match="got 8 and 8 x 2"):
        source(index_dir, micro_batch=8, world_size=2)
    with pytest.raises(
        InputError, match=r"train\.global_batch is 32, but there are only 30 samples"
    ):
        source(index_dir, global_batch=32)
