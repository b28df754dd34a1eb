"""Images that are smaller than the crops of a run: counted, reported and refused."""

from types import SimpleNamespace

import corrupt_samples
import numpy as np
import pytest
from launches import PIXELS, rows, start

from iomm.config import InputError
from iomm.engine import builders, cli, dry_run
from iomm.engine.config import CONFIGS, load_config
from iomm.engine.data import sizes
from iomm.engine.data.buckets import BucketSampler, bucket_sizes, join_small
from iomm.engine.data.index import build, load
from iomm.engine.data.sizes import (
    PERCENTILES,
    Upscaled,
    describe_edges,
    percent,
    percentiles,
    upscaled_squares,
)
from iomm.engine.data.validate import RECORD


def records_of(widths, heights):
    records = np.zeros(len(widths), dtype=RECORD)
    records["width"], records["height"] = widths, heights
    return records


@pytest.fixture
def records(monkeypatch):
    """5,000 records of random sizes, which are read in more than one part."""
    monkeypatch.setattr(sizes, "CHUNK", 777)
    return records_of(*np.random.default_rng(0).integers(32, 1200, (2, 5000)))


def test_squares_are_counted_by_the_shorter_edge(records):
    edges = [min(record["width"], record["height"]) for record in records]
    for size_px in (16, 32, 512, 1199, 1200, 2000):
        assert upscaled_squares(records, size_px) == (
            sum(edge < size_px for edge in edges),
            5000,
            size_px,
            size_px,
            {},
        )
    # An edge of exactly size_px is enough, on either side.
    exact = records_of([64, 63, 64, 900], [64, 900, 900, 63])
    assert upscaled_squares(exact, 64).num == 2


@pytest.mark.parametrize("global_batch", [4, 1000])
def test_buckets_are_counted_by_the_factor_that_covers_them(records, global_batch):
    """An image is upscaled if the factor by which it just covers its bucket is above 1.

    A global batch of 1,000 merges buckets. Held-out images count, too.
    """
    all_sizes = bucket_sizes(512, 16)
    index = SimpleNamespace(records=records, shards=[{"num_samples": 2500}] * 2)
    sampler = BucketSampler(0, index, global_batch, all_sizes, held_out=100)
    assert (len(sampler.used) < 41) == (global_batch == 1000)
    ratios = np.array([width / height for height, width in all_sizes])
    nearest = [
        int(np.argmin(np.abs(np.log(record["width"] / record["height"] / ratios))))
        for record in records
    ]
    trained = np.r_[0:2400, 2500:4900]
    totals = np.bincount(np.array(nearest)[trained], minlength=len(ratios))
    joined = join_small(totals[None], ratios, [global_batch])
    expected, least = {}, 0
    for record, bucket in zip(records, nearest, strict=True):
        height, width = all_sizes[joined[bucket]]
        small = max(height / record["height"], width / record["width"]) > 1
        num, total = expected.get((height, width), (0, 0))
        expected[height, width] = num + small, total + 1
        if small:
            least = max(least, 1 + int(min(record["width"], record["height"])))
    upscaled = sampler.upscaled(512)
    assert upscaled.buckets == expected and upscaled.total == 5000
    assert upscaled.num == sum(num for num, _ in expected.values()) > 0
    assert (upscaled.size_px, upscaled.enough_px) == (512, least)


def test_percentiles_are_those_of_the_sorted_edges(records):
    for part in (records, records[:1], records[:7]):
        edges = np.sort(np.minimum(part["width"], part["height"]))
        assert percentiles(part) == {
            share: int(np.percentile(edges, share, method="inverted_cdf"))
            for share in (0, *PERCENTILES, 100)
        }
    assert percentiles(records_of([65535], [65535]))[50] == 65535
    assert describe_edges(records_of([100, 300], [200, 900])) == (
        "shorter edges: 100 (min), 100 (1 %), 100 (5 %), 100 (25 %), 100 (50 %), 300 (75 %), "
        "300 (95 %), 300 (max) px"
    )


def test_sentences():
    assert [percent(*share) for share in ((0, 9), (1, 1000), (38, 99), (999, 1000), (9, 9))] == [
        "0 %",
        "under 1 %",
        "38 %",
        "99 %",
        "100 %",
    ]
    assert (
        Upscaled(12345, 32000, 1024, 1024, {}).sentence("images")
        == "38 % of the images (12,345) are smaller than 1024 px and would be upscaled"
    )
    buckets = {(64, 16): (5, 50), (48, 32): (0, 9), (32, 48): (7, 8), (16, 64): (1, 2)}
    sentence = Upscaled(13, 69, 32, 60, buckets).sentence("images")
    assert sentence == (
        "18 % of the images (13) are smaller than their bucket of about 32 x 32 px and would be "
        "upscaled: 7 of 8 in 48 x 32, 5 of 50 in 16 x 64, 1 of 2 in 64 x 16"
    )
    more = Upscaled(15, 74, 32, 60, buckets | {(32, 32): (2, 5)}).sentence("images")
    assert more.endswith("5 of 50 in 16 x 64, 2 of 5 in 32 x 32, 1 in other buckets")


def write_tar(path, shapes):
    """Write a tar of captioned images of these (width, height)."""
    members = []
    for i, shape in enumerate(shapes):
        image = corrupt_samples.encode(corrupt_samples.smooth_image(*shape, i))
        members += [(f"{i:02d}.jpg", image), (f"{i:02d}.txt", b"a picture")]
    path.write_bytes(corrupt_samples.tar_of(members))
    return path


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Tars of images, 3 of 8 of which are too small for 64 px, and of pairs, 1 of 4 of which is."""
    folder = tmp_path_factory.mktemp("tars")
    big = [(64, 64), (64, 90), (120, 64), (200, 200)]
    return (
        write_tar(folder / "images.tar", [*big, (63, 64), (64, 63), (40, 200), (90, 100)]),
        write_tar(folder / "pairs.tar", [*big[1:], (50, 50)]),
    )


def config_of(tmp_path, tars, *overrides):
    return load_config(
        PIXELS,
        [
            f"run.dir={tmp_path}/run",
            f"data.shards={tars[0]}",
            f"data.pairs={tars[1]}",
            "data.size_px=64",
            "train.data=mix",
            "train.global_batch=4",
            # Compiled blocks take seconds to count.
            "train.compile=false",
            *overrides,
        ],
    )


def prepared(config):
    """Return the indexes of a run's images and pairs, which are built if they are missing."""
    return tuple(builders.prepare_data(config, progress=False, pairs=pairs) for pairs in (0, 1))


IMAGES = "37 % of the images (3) are smaller than 64 px and would be upscaled"
PAIRS = "25 % of the pairs' images (1) are smaller than 64 px and would be upscaled"


def test_images_and_pairs_are_reported(tmp_path, tars, caplog):
    config = config_of(tmp_path, tars)
    images, pairs = prepared(config)
    advice = (
        "Set data.min_size_px=64 to leave them out, a smaller data.size_px, or data.upscale=allow "
        "to accept them"
    )
    assert builders.check_upscaling(config, images, pairs) == [IMAGES, PAIRS, advice]
    assert builders.check_upscaling(config, images) == [IMAGES, advice]
    assert builders.check_upscaling(config, None, pairs) == [PAIRS, advice]
    with caplog.at_level("INFO", logger="iomm"):
        builders.report_upscaling(config, images, pairs)
        builders.report_upscaling(config_of(tmp_path, tars, "data.upscale=allow"), images, pairs)
        # All images cover 40 px.
        for upscale in ("allow", "warn", "refuse"):
            small = config_of(tmp_path, tars, f"data.upscale={upscale}", "data.size_px=40")
            builders.report_upscaling(small, images, pairs)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", f"warning: {IMAGES}. {PAIRS}. {advice}"),
        ("INFO", f"{IMAGES}. {PAIRS}"),
    ]


def test_refusal_says_what_to_do_and_that_helps(tmp_path, tars):
    refuse = "data.upscale=refuse"
    config = config_of(tmp_path, tars, refuse)
    images, pairs = prepared(config)
    with pytest.raises(InputError) as error:
        builders.check_upscaling(config, images, pairs)
    assert str(error.value) == (
        f"data.upscale is refuse, but {IMAGES}. {PAIRS}. Set data.min_size_px=64 to leave them "
        "out, a smaller data.size_px, or data.upscale=warn to accept them"
    )
    chosen = config_of(tmp_path, tars, refuse, "data.min_size_px=64")
    assert builders.check_upscaling(chosen, *prepared(chosen)) == []
    # An index that is given has its own rules.
    given = config_of(
        tmp_path, (build(tars[0], tmp_path / "index", progress=False), "null"), refuse
    )
    with pytest.raises(InputError, match="Set --min-size=64 of `iomm index` to leave them out, a"):
        builders.check_upscaling(given, given.data.shards)
    # Without the images that are too small for this size none would be left.
    large = config_of(tmp_path, tars, refuse, "data.size_px=256")
    with pytest.raises(InputError, match=r"100 % of the images \(8\) .*\. Set a smaller data\.s"):
        builders.check_upscaling(large, images, pairs)


def test_buckets_of_a_mixture_are_those_of_its_sampler(tmp_path, tars):
    """Images and pairs share their buckets. With data.min_size_px as advised, none is upscaled."""
    settings = ("data.buckets=true", "train.global_batch=2", "data.upscale=refuse")
    config = config_of(tmp_path, tars, *settings)
    images, pairs = prepared(config)
    found = builders.count_upscaled(config, images, pairs)
    shards = [builders.Shards(folder) for folder in (images, pairs)]
    order = builders.make_order(config, *shards, SimpleNamespace(factor=1, patch=2))
    for noun, sampler in zip(found, (order.images, order.pairs), strict=True):
        assert found[noun] == sampler.upscaled(64) and found[noun].num
        assert set(found[noun].buckets) <= set(sampler.sizes)
    with pytest.raises(InputError) as error:
        builders.check_upscaling(config, images, pairs)
    assert "of the images (" in str(error.value) and "of about 64 x 64 px" in str(error.value)
    least_px = max(upscaled.enough_px for upscaled in found.values())
    assert f"Set data.min_size_px={least_px} to leave them out" in str(error.value)
    chosen = config_of(tmp_path, tars, *settings, f"data.min_size_px={least_px}")
    assert builders.check_upscaling(chosen, *prepared(chosen)) == []


def test_dry_run_counts_where_an_index_is_at_hand(tmp_path, tars):
    config = config_of(tmp_path, tars, "train.micro_batch=4")
    plan = dry_run.make_plan(config, ranks=1)
    assert plan.upscaling == [] and not list(tmp_path.iterdir())
    assert "upscaled" not in dry_run.describe(plan, config)
    prepared(config)
    plan = dry_run.make_plan(config, ranks=1)
    assert plan.upscaling[:2] == [IMAGES, PAIRS]
    assert dry_run.describe(plan, config).splitlines()[-1].startswith(f"{IMAGES}. {PAIRS}. Set ")
    refused = config_of(tmp_path, tars, "train.micro_batch=4", "data.upscale=refuse")
    with pytest.raises(InputError, match=r"data\.upscale is refuse, but 37 % of the images \(3\)"):
        dry_run.make_plan(refused, ranks=1)
    # Only the data that the run trains on count.
    pairs = config_of(tmp_path, tars, "train.micro_batch=4", "train.data=pair")
    assert dry_run.make_plan(pairs, ranks=1).upscaling[:1] == [PAIRS]
    # Other rules need another index, which is not built yet.
    other = config_of(tmp_path, tars, "train.micro_batch=4", "data.min_size_px=64")
    assert dry_run.make_plan(other, ranks=1).upscaling == []


def test_index_prints_the_distribution_of_edges(tmp_path, tars, capsys):
    assert cli.main(["index", str(tars[0]), "--out", str(tmp_path / "index")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == describe_edges(load(tmp_path / "index").records)
    assert lines[1].startswith("shorter edges: 40 (min), ")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_at_1024_px_refuse(path):
    config = load_config(path.stem)
    assert (config.data.upscale == "refuse") == (config.data.size_px == 1024)


def test_run_warns_or_does_not_start(tmp_path, tars):
    settings = [
        f"run.dir={tmp_path}/run",
        f"data.shards={tars[0]}",
        "data.size_px=64",
        "train.global_batch=4",
        "train.steps=1",
        "log.sample_images=0",
    ]
    refused = start(2, "--config", PIXELS, *settings, "data.upscale=refuse")
    assert refused.returncode == 2, refused.stdout
    assert refused.stdout.count(f"data.upscale is refuse, but {IMAGES}. Set data.min_size") == 1
    assert rows(tmp_path / "run/log.jsonl") == []
    # A run may change its mind: the key does not change what a step computes.
    warned = start(2, "--config", PIXELS, "--resume", "auto", *settings)
    assert warned.returncode == 0, warned.stdout
    assert warned.stdout.count(f"warning: {IMAGES}. Set data.min_size_px=64") == 1
    assert len(rows(tmp_path / "run/log.jsonl")) == 1
