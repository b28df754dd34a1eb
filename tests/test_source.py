"""Batches of stage 1: the same samples on any number of ranks, exact resume, reads ahead, damage."""

import threading

import numpy as np
import pytest
import torch

from iomm.config import InputError
from iomm.engine.data.index import build
from iomm.engine.data.order import Order
from iomm.engine.data.shards import Shards
from iomm.engine.data.source import ImageSource
from iomm.engine.shapes.world import write_world
from iomm.kernels.philox import FLIP, uniform

G, STEPS = 8, 9      # 72 samples of 30: three epochs, and no batch boundary falls on the end of one


@pytest.fixture(scope="module")
def index_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return build(write_world(folder / "tars", num_images=30, size_px=48, shard_size=8), folder / "index", progress=False)


def source(index_dir, rank=0, world_size=1, micro_batch=4, num_steps=STEPS, **options):
    options = {"seed": 11, "global_batch": G, "size_px": 40, "vit_px": 24, "device": torch.device("cpu"), "flip": True} | options
    return ImageSource(Shards(index_dir), rank=rank, world_size=world_size, micro_batch=micro_batch, num_steps=num_steps, **options)


def joined(batches):
    """{n: (entry, pixels, vit pixels)} over batches; every n once."""
    samples = {}
    for batch in batches:
        for n, entry, pixels, vit_pixels in zip(batch.n_B.tolist(), batch.entry_B.tolist(), batch.pixels_BCHW, batch.vit_pixels_BCHW):
            assert n not in samples
            samples[n] = entry, pixels, vit_pixels
    return samples


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for n, (entry, pixels, vit_pixels) in wanted.items():
        assert got[n][0] == entry and torch.equal(got[n][1], pixels) and torch.equal(got[n][2], vit_pixels)


@pytest.fixture(scope="module")
def whole(index_dir):
    return list(source(index_dir))


def test_batches(index_dir, whole):
    assert len(whole) == len(source(index_dir)) == 2 * STEPS
    order = Order(11, Shards(index_dir).shard_sizes)
    for i, batch in enumerate(whole):
        assert batch.n_B.dtype == batch.entry_B.dtype == torch.int64
        assert batch.n_B.tolist() == list(range(4 * i, 4 * i + 4))
        assert batch.entry_B.tolist() == order(np.arange(4 * i, 4 * i + 4)).tolist()
        assert batch.pixels_BCHW.shape == (4, 3, 40, 40) and batch.vit_pixels_BCHW.shape == (4, 3, 24, 24)
        assert batch.pixels_BCHW.abs().max() <= 1 and batch.wait_s >= 0


@pytest.mark.parametrize("world_size, micro_batch", [(1, 8), (1, 1), (2, 4), (2, 2), (4, 1)])
def test_any_number_of_ranks_sees_the_same_samples(index_dir, whole, world_size, micro_batch):
    ranks = [list(source(index_dir, rank, world_size, micro_batch)) for rank in range(world_size)]
    for step in range(STEPS):      # equal in every global batch, hence in all
        per_step = G // micro_batch // world_size
        parts = [batch for batches in ranks for batch in batches[step * per_step:(step + 1) * per_step]]
        assert_equal(joined(parts), joined(whole[2 * step:2 * step + 2]))


@pytest.mark.parametrize("start_step", [1, 4, 8])
def test_resumed_in_the_middle_it_goes_on_the_same(index_dir, whole, start_step):
    tail = list(source(index_dir, start_step=start_step))
    assert len(tail) == 2 * (STEPS - start_step)
    assert_equal(joined(tail), joined(whole[2 * start_step:]))


def test_flips_come_from_the_sample_number(index_dir, whole):
    plain = joined(source(index_dir, flip=False))
    flips = uniform(11, FLIP, torch.arange(G * STEPS), 1)[:, 0] < 0.5
    assert 0.3 < flips.float().mean() < 0.7
    for n, (_, pixels, vit_pixels) in joined(whole).items():
        turned = [image.flip(-1) if flips[n] else image for image in plain[n][1:]]
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


def test_a_damaged_sample_is_named(tmp_path):
    tars = write_world(tmp_path / "tars", num_images=12, size_px=48, shard_size=12)
    folder = build(tars, tmp_path / "index", progress=False)
    some = source(folder)
    entry = int(some.order(5))
    data = bytearray(tars[0].read_bytes())
    data[int(some.shards.index.records[entry]["image_offset"]) + 700] ^= 1
    tars[0].write_bytes(data)
    with pytest.raises(InputError, match=f"00000.tar: {entry:06d}.jpg: its bytes are not those"):
        list(some)


def test_an_image_that_only_dali_refuses_is_named(index_dir):
    some = source(index_dir)
    whole_image = some.shards.decodable_bytes
    entry = int(some.order(6))
    some.shards.decodable_bytes = lambda k: whole_image(k)[:400] if k == entry else whole_image(k)
    with pytest.raises(InputError, match=f"DALI cannot decode [^,]*{entry:06d}.jpg, though"):
        list(some)


def test_wrong_input_is_one_line(index_dir):
    with pytest.raises(InputError, match="multiple of train.micro_batch x ranks, got 8 and 3 x 1"):
        source(index_dir, micro_batch=3)
    with pytest.raises(InputError, match="got 8 and 8 x 2"):
        source(index_dir, micro_batch=8, world_size=2)
    with pytest.raises(InputError, match="train.global_batch is 32, but there are only 30 samples"):
        source(index_dir, global_batch=32)
