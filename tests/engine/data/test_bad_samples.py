"""Unreadable samples during training are counted, logged and replaced, and too many stop the run.

All ranks then stop with a single message.
"""

import json
import os
import re

import pytest
from launches import PIXELS, hashes, launch, rows, start

from iomm.config import InputError
from iomm.engine.data.bad_samples import BadSamples, Failure
from iomm.engine.data.index import build
from iomm.engine.data.shards import Shards
from iomm.engine.resilience import checkpoint_reader
from iomm.engine.shapes.dataset import write_dataset


def failure(n, shard=0):
    return Failure(n, shard, f"sample {n} is gone")


def test_fraction_of_10000_samples_survives_a_checkpoint():
    bad_samples = BadSamples(0.01, 5)
    # 100 of 10,000 samples are allowed.
    for step in range(100):
        bad_samples.record([failure(100 * step)], 100 * (step + 1))
    restored = BadSamples(0.01, 5)
    restored.restore(json.loads(json.dumps(bad_samples.state())))
    for counter in (bad_samples, restored):
        with pytest.raises(
            InputError,
            match=r"101 of 10050 samples were unreadable, more than data.max_bad_fraction \(0.01\)",
        ):
            counter.record([failure(10_001)], 10_050)
        assert counter.total == 101


@pytest.mark.parametrize(
    "rate, stops",
    [(0.0, False), (0.005, False), (0.009, False), (0.011, True), (0.02, True), (0.05, True)],
)
def test_rate_above_the_budget_stops_the_run(rate, stops):
    bad_samples = BadSamples(0.01, 5)
    step = 0
    batch = 100
    try:
        for step in range(300):
            first, last = int(rate * step * batch), int(rate * (step + 1) * batch)
            bad_samples.record(
                [failure(step * batch + i) for i in range(last - first)], (step + 1) * batch
            )
        assert not stops
    except InputError:
        assert stops and bad_samples.total / max(batch * (step + 1), 10_000) > 0.01


def test_six_bad_shards_stop_the_run():
    bad_samples = BadSamples(0.5, 5)
    for shard in range(5):
        bad_samples.record([failure(10 * shard, shard)], 10 * shard + 10)
    with pytest.raises(
        InputError,
        match=r"6 shards had unreadable samples, more than data.max_bad_shards \(5\) allows",
    ):
        bad_samples.record([failure(60, 5)], 70)


def test_failures_are_logged_in_order(tmp_path):
    bad_samples = BadSamples(1.0, 5, tmp_path / "skipped.jsonl")
    bad_samples.record([failure(5, 1), failure(3)], 8)
    bad_samples.record([failure(9)], 16)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["n"] for line in lines] == [3, 5, 9] and lines[1] == {
        "n": 5,
        "shard": 1,
        "problem": "sample 5 is gone",
        "fatal": False,
        "cut": False,
    }


def test_unwritable_log_file_only_warns(tmp_path, caplog):
    bad_samples = BadSamples(1.0, 5, tmp_path / "missing" / "skipped.jsonl")
    with caplog.at_level("WARNING", logger="iomm"):
        bad_samples.record([failure(3)], 8)
    assert bad_samples.total == 1 and "could not write" in caplog.text


@pytest.fixture(scope="module")
def damaged_dataset(tmp_path_factory):
    """An indexed dataset of 72 samples in which one bit of sample 7 flips.

    The modification time of the tar does not change.
    """
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


# Launches two ranks three times.
@pytest.mark.slow
def test_count_is_exact_after_resume(damaged_dataset, tmp_path):
    """In two epochs sample 7 is read twice, once before and once after the resumed step."""
    budget = "data.max_bad_fraction=0.01"
    whole = launch(2, *settings(damaged_dataset, tmp_path / "whole", "train.steps=9", budget))
    assert whole.returncode == 0, whole.stdout
    counts = [row["skipped_samples"] for row in rows(tmp_path / "whole" / "log.jsonl")]
    assert counts[-1] == 2 and sorted(counts) == counts
    first = launch(2, *settings(damaged_dataset, tmp_path / "parts", "train.steps=6", budget))
    assert first.returncode == 0, first.stdout
    second = launch(
        2,
        "--resume",
        "auto",
        *settings(damaged_dataset, tmp_path / "parts", "train.steps=9", budget),
    )
    assert second.returncode == 0, second.stdout
    assert [row["skipped_samples"] for row in rows(tmp_path / "parts" / "log.jsonl")] == counts
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")
    logged = [
        json.loads(line) for line in (tmp_path / "whole" / "skipped.jsonl").read_text().splitlines()
    ]
    assert len(logged) == 2 and all(
        "000007.jpg: its bytes differ" in line["problem"] for line in logged
    )


def test_too_many_bad_samples_stop_all_ranks(damaged_dataset, tmp_path):
    done = start(
        2, *settings(damaged_dataset, tmp_path / "run", "train.steps=9", "data.max_bad_fraction=0")
    )
    errors = [line for line in done.stdout.splitlines() if line.startswith("iomm: ")]
    assert done.returncode != 0 and len(errors) == 1 and "Traceback" not in done.stdout, done.stdout
    message = (
        r"\b1 of \d+ samples were unreadable, more than data\.max_bad_fraction \(0\.0\) allows; "
        "last failure:"
    )
    assert re.search(message, errors[0])
    steps = [row["step"] for row in rows(tmp_path / "run/log.jsonl")]
    assert (
        checkpoint_reader.step_of(checkpoint_reader.newest(tmp_path / "run/checkpoints"))
        == steps[-1]
        == len(steps)
    )
