"""Batches of stage 1: the same samples on any number of ranks, exact resume, reads ahead, damage."""

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

# 72 samples of 30: three epochs, and no batch boundary falls on the end of one
G, STEPS = 8, 9


@pytest.fixture(scope="module")
def index_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
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
    """{n: (entry, pixels, vit pixels)} over batches; every n once."""
    samples = {}
    for batch in batches:
        for n, entry, pixels, vit_pixels in zip(
            batch.n_B.tolist(), batch.entry_B.tolist(), batch.pixels_BCHW, batch.vit_pixels_BHWC
        ):
            assert n not in samples
            samples[n] = entry, pixels, vit_pixels
    return samples


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for n, (entry, pixels, vit_pixels) in wanted.items():
        assert (
            got[n][0] == entry
            and torch.equal(got[n][1], pixels)
            and torch.equal(got[n][2], vit_pixels)
        )


@pytest.fixture(scope="module")
def whole(index_dir):
    return list(source(index_dir))


def test_batches(index_dir, whole):
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
def test_any_number_of_ranks_sees_the_same_samples(index_dir, whole, world_size, micro_batch):
    ranks = [list(source(index_dir, rank, world_size, micro_batch)) for rank in range(world_size)]
    # Equal in every global batch, hence in all.
    for step in range(STEPS):
        per_step = G // micro_batch // world_size
        parts = [
            batch for batches in ranks for batch in batches[step * per_step : (step + 1) * per_step]
        ]
        assert_equal(joined(parts), joined(whole[2 * step : 2 * step + 2]))


@pytest.mark.parametrize("start_step", [1, 4, 8])
def test_resumed_in_the_middle_it_goes_on_the_same(index_dir, whole, start_step):
    tail = list(source(index_dir, start_step=start_step))
    assert len(tail) == 2 * (STEPS - start_step)
    assert_equal(joined(tail), joined(whole[2 * start_step :]))


def test_flips_come_from_the_sample_number(index_dir, whole):
    plain = joined(source(index_dir, flip=False))
    flips = uniform(11, FLIP, torch.arange(G * STEPS), 1)[:, 0] < 0.5
    assert 0.3 < flips.float().mean() < 0.7
    for n, (_, pixels, vit_pixels) in joined(whole).items():
        turned = [
            image.flip(axis) if flips[n] else image for image, axis in zip(plain[n][1:], (-1, -2))
        ]
        assert torch.equal(pixels, turned[0]) and torch.equal(vit_pixels, turned[1])


def test_it_reads_nothing_beyond_the_plan_and_leaves_no_thread(index_dir):
    before = threading.active_count()
    some = source(index_dir, num_steps=2)
    read = []
    shards_read = some.shards.decodable_bytes
    some.shards.decodable_bytes = lambda k: read.append(k) or shards_read(k)
    batches = list(some)
    assert sorted(read) == sorted(entry for batch in batches for entry in batch.entry_B.tolist())
    stopped = iter(source(index_dir))
    next(stopped)
    stopped.close()
    assert threading.active_count() <= before


def damage(path, at):
    """Flips a bit as a disk would: the file's time stays."""
    data, status = bytearray(path.read_bytes()), path.stat()
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_damaged_sample_is_replaced_alike_on_any_number_of_ranks(tmp_path):
    """By the next one in the order; named, counted once, and everything else stays as it was."""
    tars = write_dataset(tmp_path / "tars", num_images=12, size_px=48, shard_size=12)
    folder = build(tars, tmp_path / "index", progress=False)
    before = joined(source(folder, num_steps=2))
    some = source(folder)
    # neighbours: the first needs a second attempt
    entries = [int(some.sampler(np.array([n]))[0]) for n in (5, 6)]
    for entry in entries:
        damage(tars[0], int(some.shards.index.records[entry]["image_offset"]) + 700)
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
        # Once an epoch, of 12 samples.
        hit = [n for n, (entry, _, _) in before.items() if entry in entries]
        assert [failure.n for failure in failures] == hit == [f.n for f in failures if not f.fatal]
        for failure in failures:
            assert failure.shard == 0 and "its bytes are not those" in failure.problem
        n = 7
        assert after[5][0] == after[6][0] == before[n][0]
        assert_equal(
            {k: v for k, v in after.items() if k not in hit},
            {k: v for k, v in before.items() if k not in hit},
        )


def test_an_image_that_only_dali_refuses_is_replaced(index_dir, whole):
    some = source(index_dir)
    whole_image = some.shards.decodable_bytes
    entries = some.sampler(np.array([6, 33, 34, 35]))
    some.shards.decodable_bytes = lambda k: whole_image(k)[:400] if k in entries else whole_image(k)
    batches = list(some)
    got, wanted = joined(batches), joined(whole)
    hit = [n for n, (entry, _, _) in wanted.items() if entry in entries]
    failures = [failure for batch in batches for failure in batch.failures]
    assert [failure.n for failure in failures] == hit
    assert all("DALI cannot decode it, though" in failure.problem for failure in failures)
    assert got[6][0] == wanted[7][0] and got[33][0] == wanted[36][0]
    assert_equal(
        {k: v for k, v in got.items() if k not in hit},
        {k: v for k, v in wanted.items() if k not in hit},
    )


def test_where_nothing_can_be_had_batches_stay_full_and_say_so(index_dir):
    some = source(index_dir, num_steps=1)

    def gone(k):
        raise Damaged(f"sample {k} is gone")

    some.shards.decodable_bytes = gone
    batches = list(some)
    assert [len(batch.pixels_BCHW) for batch in batches] == [4, 4]
    assert all(failure.fatal for batch in batches for failure in batch.failures)
    assert all((batch.pixels_BCHW == -1).all() for batch in batches)
    skips = BadSamples(1.0, 10)
    with pytest.raises(
        InputError, match=r"sample \d+ is gone; nor could the samples that would take its place"
    ):
        skips.record([failure for batch in batches for failure in batch.failures], 8)


def test_a_shard_that_shrinks_or_vanishes_while_it_is_read_is_no_bus_error(tmp_path):
    tars = write_dataset(tmp_path / "tars", num_images=40, size_px=48, shard_size=20)
    folder = build(tars, tmp_path / "index", progress=False)
    batches = iter(source(folder, num_steps=30))
    got = [next(batches)]
    os.truncate(tars[0], 30_000)
    # An open file stays readable.
    os.remove(tars[1])
    got += list(batches)
    failures = [failure for batch in got for failure in batch.failures]
    assert len(got) == 60 and failures and {failure.shard for failure in failures} == {0}
    assert all("bytes are there; the shard changed" in failure.problem for failure in failures)


def test_random_crops_come_from_the_sample_number(tmp_path):
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


def test_wrong_input_is_one_line(index_dir):
    with pytest.raises(InputError, match="multiple of train.micro_batch x ranks, got 8 and 3 x 1"):
        source(index_dir, micro_batch=3)
    with pytest.raises(InputError, match="got 8 and 8 x 2"):
        source(index_dir, micro_batch=8, world_size=2)
    with pytest.raises(InputError, match="train.global_batch is 32, but there are only 30 samples"):
        source(index_dir, global_batch=32)
