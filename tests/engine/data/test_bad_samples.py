"""Samples lost while training: counted, logged, replaced, and ended by one line on every rank when they are too many."""

import json
import os

import pytest
from launches import PIXELS, hashes, launch, rows, start

from iomm.config import InputError
from iomm.engine.data.bad_samples import BadSamples, Failure
from iomm.engine.data.index import build
from iomm.engine.data.shards import Shards
from iomm.engine.resilience import checkpoint_reader
from iomm.engine.shapes.dataset import write_dataset


def lost(n, shard=0):
    return Failure(n, shard, f"sample {n} is gone")


def test_the_share_is_judged_over_ten_thousand_samples_and_counts_survive_a_checkpoint():
    skips = BadSamples(0.01, 5)
    # 100 of 10,000
    for step in range(100):
        skips.record([lost(100 * step)], 100 * (step + 1))
    again = BadSamples(0.01, 5)
    again.restore(json.loads(json.dumps(skips.state())))
    for some in (skips, again):
        with pytest.raises(
            InputError,
            match=r"101 samples of 10050 could not be had, more than data.max_bad_fraction \(0.01\)",
        ):
            some.record([lost(10_001)], 10_050)
        assert some.total == 101


@pytest.mark.parametrize(
    "rate, stops",
    [(0.0, False), (0.005, False), (0.009, False), (0.011, True), (0.02, True), (0.05, True)],
)
def test_a_rising_rate_stops_above_the_budget(rate, stops):
    skips, step, batch = BadSamples(0.01, 5), 0, 100
    try:
        for step in range(300):
            first, last = int(rate * step * batch), int(rate * (step + 1) * batch)
            skips.record([lost(step * batch + i) for i in range(last - first)], (step + 1) * batch)
        assert not stops
    except InputError:
        assert stops and skips.total / max(batch * (step + 1), 10_000) > 0.01


def test_six_dead_shards_stop():
    skips = BadSamples(0.5, 5)
    for shard in range(5):
        skips.record([lost(10 * shard, shard)], 10 * shard + 10)
    with pytest.raises(
        InputError,
        match=r"samples of 6 shards could not be had, more than data.max_bad_shards \(5\) allows",
    ):
        skips.record([lost(60, 5)], 70)


def test_failures_are_logged_in_order(tmp_path):
    skips = BadSamples(1.0, 5, tmp_path / "skipped.jsonl")
    skips.record([lost(5, 1), lost(3)], 8)
    skips.record([lost(9)], 16)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["n"] for line in lines] == [3, 5, 9] and lines[1] == {
        "n": 5,
        "shard": 1,
        "problem": "sample 5 is gone",
        "fatal": False,
    }


@pytest.fixture(scope="module")
def damaged_world(tmp_path_factory):
    """A world of 72 samples and its index; then a bit of sample 7 flips, and the tar's time stays."""
    folder = tmp_path_factory.mktemp("damaged")
    tars = write_dataset(folder / "tars", num_images=72, size_px=32, seed=1, shard_size=24)
    record = Shards(build(folder / "tars", folder / "index", progress=False)).index.records[7]
    data, status = bytearray(tars[0].read_bytes()), tars[0].stat()
    data[int(record["image_offset"]) + 500] ^= 1
    tars[0].write_bytes(data)
    os.utime(tars[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    return folder / "index"


def settings(index_dir, run_dir, *more):
    return [
        "--config",
        PIXELS,
        f"run.dir={run_dir}",
        f"data.shards={index_dir}",
        "train.global_batch=16",
        "checkpoint.every_steps=3",
        "log.sample_images=0",
        "train.threads=1",
        *more,
    ]


# Three launches of two ranks.
@pytest.mark.slow
def test_a_run_goes_on_and_its_count_is_exact_after_resuming(damaged_world, tmp_path):
    """Two ranks, two epochs: sample 7 is met twice, once before the resumed step and once behind it."""
    budget = "data.max_bad_fraction=0.01"
    whole = launch(2, *settings(damaged_world, tmp_path / "whole", "train.steps=9", budget))
    assert whole.returncode == 0, whole.stdout
    counts = [row["skipped_samples"] for row in rows(tmp_path / "whole" / "log.jsonl")]
    assert counts[-1] == 2 and sorted(counts) == counts
    first = launch(2, *settings(damaged_world, tmp_path / "parts", "train.steps=6", budget))
    assert first.returncode == 0, first.stdout
    second = launch(
        2, "--resume", "auto", *settings(damaged_world, tmp_path / "parts", "train.steps=9", budget)
    )
    assert second.returncode == 0, second.stdout
    assert [row["skipped_samples"] for row in rows(tmp_path / "parts" / "log.jsonl")] == counts
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")
    logged = [
        json.loads(line) for line in (tmp_path / "whole" / "skipped.jsonl").read_text().splitlines()
    ]
    assert len(logged) == 2 and all(
        "000007.jpg: its bytes are not those" in line["problem"] for line in logged
    )


def test_too_many_end_every_rank_with_one_line(damaged_world, tmp_path):
    done = start(
        2, *settings(damaged_world, tmp_path / "run", "train.steps=9", "data.max_bad_fraction=0")
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("iomm: ")]
    assert done.returncode != 0 and len(said) == 1 and "Traceback" not in done.stdout, done.stdout
    assert (
        "1 samples of" in said[0]
        and "more than data.max_bad_fraction (0.0) allows; last:" in said[0]
    )
    steps = [row["step"] for row in rows(tmp_path / "run/log.jsonl")]
    assert (
        checkpoint_reader.step_of(checkpoint_reader.newest(tmp_path / "run/checkpoints"))
        == steps[-1]
        == len(steps)
    )
