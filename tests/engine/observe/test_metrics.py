"""Metrics of a run follow their definitions, and no failure to write them costs a step."""

import contextlib
import errno
import io
import json
import math
import os
import resource
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from iomm.config import InputError
from iomm.engine.observe import metrics
from iomm.engine.observe.metrics import Metrics, check_wandb, line, scalars
from iomm.profiling import named, named_whole

RANKS = SimpleNamespace(size=2, device=torch.device("cpu"))
STEPS = 10


def make(run_dir, start_step=0, **more):
    run_dir.mkdir(parents=True, exist_ok=True)
    return Metrics(
        run_dir,
        flops_per_image=3e12,
        tokens_per_image=80,
        global_batch=16,
        num_steps=STEPS,
        ranks=RANKS,
        start_step=start_step,
        **more,
    )


def record(one, step, loss=1.0, **more):
    with one.clock, named("generator"):
        time.sleep(0.001)
    return one.record(
        step=step,
        loss=loss,
        by_time=[2.0, 3.0, 4.0, 0.0],
        grad_norm=0.5,
        lr=1e-4,
        data_wait_s=0.25,
        skipped_steps=1,
        skipped_samples=2,
        **more,
    )


def logged(run_dir):
    rows = []
    for text in (run_dir / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(text)["step"])
    return rows


@pytest.fixture
def no_board(monkeypatch):
    monkeypatch.setattr(Metrics, "open_board", lambda *_: None)


def test_record_follows_its_definitions(tmp_path, monkeypatch, no_board):
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1e15)
    one = make(tmp_path, gpu_hours=1.0)
    row = record(one, 3)
    assert row["samples_seen"] == 48 and row["loss_by_time"] == [0.5, None]
    assert row["step_s"] == sum(row["time_s"].values()) and row["time_s"]["generator"] >= 0.001
    assert (
        row["images_per_s"] == 16 / row["step_s"]
        and row["tokens_per_s"] == 80 * row["images_per_s"]
    )
    assert row["mfu"] == pytest.approx(3e12 * row["images_per_s"] / 2e15)
    assert row["gpu_hours"] == 1.0 + row["step_s"] * 2 / 3600
    assert row["gpu_hours_left"] == pytest.approx(row["step_s"] * 7 * 2 / 3600)
    assert json.loads((tmp_path / "log.jsonl").read_text()) == row
    assert (
        scalars(row)["time_s/generator"] == row["time_s"]["generator"]
        and scalars(row)["loss_by_time/0"] == 0.5
    )
    assert not {"step", "time_s", "loss_by_time/1"} & set(scalars(row))
    assert all(isinstance(number, int | float) for number in scalars(row).values())
    assert row["align_loss"] is None and "align" not in line(row, STEPS)
    assert row["cut_captions"] == 0 and "cut" not in line(row, STEPS)
    assert "  cut captions 1,234  " in line({**row, "cut_captions": 1234}, STEPS)
    assert "loss 1.0000  align 0.5000  grad norm" in line({**row, "align_loss": 0.5}, STEPS)
    text = line(row, STEPS)
    for fragment in ("step 3/10", "images/s", "tokens/s", "mfu", "generator", "  GPU-hours 1.00"):
        assert fragment in text
    assert one.hours == "rank-hours" and "  rank-hours 1.00 used" in line(row, STEPS, one.hours)


def test_evaluation_is_added_to_the_row_without_its_time(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = make(tmp_path / "run")
    record(one, 1)
    row = record(one, 2)
    # The row is written before the evaluation starts.
    assert json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[1]) == row
    before = one.gpu_hours
    with one.clock, named("checkpoint"):
        time.sleep(0.02)
    with one.clock, named_whole("evaluation"):
        time.sleep(0.05)
    picture = tmp_path / "grid.png"
    Image.new("RGB", (4, 3)).save(picture)
    found = {
        "heldout_loss": {"image": {"mean": 0.5, "by_time": [0.25, 0.75]}},
        "metrics": {"score": 3.0},
        "samples": str(picture),
    }
    row = one.add(row, found)
    assert (
        row["evaluation_s"] >= 0.05
        and row["step_s"] == sum(row["time_s"].values())
        and "evaluation" not in row["time_s"]
    )
    assert (
        row["gpu_hours"] == one.gpu_hours == pytest.approx(before + row["evaluation_s"] * 2 / 3600)
    )
    assert (
        json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[1]) == row
        and row.items() >= found.items()
    )
    after = record(one, 3)
    assert (
        "held-out image 0.5000" in line(row, STEPS)
        and "evaluation_s" not in after
        and after["time_s"]["checkpoint"] >= 0.02
    )
    assert after["step_s"] == sum(after["time_s"].values()) and logged(tmp_path / "run") == [
        1,
        2,
        3,
    ]
    one.close()
    # The checkpoint of step 2 was written before the evaluation.
    again = make(tmp_path / "run", start_step=2, gpu_hours=before)
    assert again.gpu_hours == row["gpu_hours"] and logged(tmp_path / "run") == [1, 2]
    again.close()
    seen = EventAccumulator(str(tmp_path / "run/tb")).Reload()
    assert set(seen.Tags()["scalars"]) >= {
        "heldout_loss/image/by_time/1",
        "metrics/score",
        "evaluation_s",
    }
    assert seen.Tags()["images"] == ["evaluate"]


def test_tensorboard_has_the_values_of_log_jsonl(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = make(tmp_path)
    rows = [record(one, step, loss=float(step)) for step in (1, 2)]
    one.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(scalars(rows[0]))
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0)]


def test_resumed_run_drops_repeated_and_damaged_rows(tmp_path, no_board):
    lines = [json.dumps({"step": step}) for step in (1, 2, 3, 4)] + [
        '{"step": 5, "lo',
        "3",
        "\x00\x00",
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    one = make(tmp_path, start_step=2)
    record(one, 3)
    assert logged(tmp_path) == [1, 2, 3]


# Telemetry is never fatal: each step below is recorded, and a failure is logged once.


def test_log_that_cannot_be_opened_costs_no_step(tmp_path, no_board, caplog):
    (tmp_path / "log.jsonl").mkdir()
    one = make(tmp_path)
    assert [record(one, step)["step"] for step in (1, 2)] == [1, 2]
    one.close()
    assert caplog.text.count("log.jsonl cannot be written") == 1


def test_full_disk_costs_rows_until_it_has_room(tmp_path, no_board, caplog):
    """RLIMIT_FSIZE simulates a full disk: the kernel writes what fits, then refuses."""
    one = make(tmp_path)
    record(one, 1)
    before, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (os.path.getsize(tmp_path / "log.jsonl") + 100, before[1])
        )
        assert [record(one, step)["step"] for step in (2, 3, 4)] == [2, 3, 4]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    record(one, 5)
    record(one, 6)
    one.close()
    assert logged(tmp_path) == [1, 5, 6] and caplog.text.count("log.jsonl cannot be written") == 1


@pytest.mark.parametrize("where", ["open", "add_scalar", "thread", "close"])
def test_failing_tensorboard_costs_no_step(tmp_path, monkeypatch, caplog, where):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "open":
        (tmp_path / "tb").write_text("a file in place of the folder")
    one = make(tmp_path)
    if where == "add_scalar":
        monkeypatch.setattr(one.board, "add_scalar", fail)
    # Where tensorboard writes.
    if where == "thread":
        monkeypatch.setattr(RecordWriter, "write", fail)
        monkeypatch.setattr("threading.excepthook", lambda _: None)
    if where == "close":
        monkeypatch.setattr(one.board, "close", fail)
    for step in range(1, STEPS + 1):
        record(one, step)
        # Time for the thread to fail.
        time.sleep(0.01)
    one.image("samples", tmp_path / "no.png", 1)
    one.close()
    assert logged(tmp_path) == list(range(1, STEPS + 1))
    assert caplog.text.count("TensorBoard cannot be written") == 1


def test_wall_clock_jumps_do_not_affect_step_times(tmp_path, monkeypatch):
    """Jumps of an hour back and a day forth. TensorBoard and the bar read the wall clock."""
    from tqdm import tqdm

    one = make(tmp_path)
    real, jumps = time.time, [0, -3600, 86400, -86400, 0]
    bar = tqdm(total=5, file=io.StringIO())
    for step, jump in enumerate(jumps, start=1):
        monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
        row = record(one, step)
        assert 0 < row["step_s"] < 60 and row["gpu_hours"] < 0.1
        bar.update()
    bar.close()
    one.close()
    assert logged(tmp_path) == [1, 2, 3, 4, 5]


def test_missing_wandb_is_refused_before_the_start(tmp_path, monkeypatch, capsys):
    from iomm.engine.launch import main

    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    assert main(["log.wandb=true", "--dry-run"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "log.wandb=true needs the package wandb: pip install wandb" in error
    monkeypatch.undo()
    # wandb leaves this folder where a run is started; it is not the package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError):
        check_wandb()


@pytest.mark.parametrize("fails", ["", "init", "log", "finish"])
def test_failing_wandb_costs_no_step(tmp_path, monkeypatch, no_board, caplog, fails):
    class Run:
        rows, finished = [], False

        def log(self, row, step):
            if fails == "log":
                raise RuntimeError("the service is gone")
            self.rows.append((step, row["loss"]))

        def finish(self):
            if fails == "finish":
                time.sleep(60)
            self.finished = True

    run, asked = Run(), {}

    def init(**options):
        if fails == "init":
            raise RuntimeError("no API key")
        asked.update(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setattr(metrics, "WANDB_PATIENCE_S", 0.1)
    one = make(tmp_path / "runs/mine", wandb=True, settings={"train.steps": STEPS})
    for step in (1, 2):
        record(one, step)
    started = time.monotonic()
    one.close()
    assert logged(tmp_path / "runs/mine") == [1, 2] and time.monotonic() - started < 30
    assert caplog.text.count("wandb cannot be written") == (fails in ("init", "log"))
    assert run.rows == (
        [] if fails in ("init", "log") else [(1, 1.0), (2, 1.0)]
    ) and run.finished == (not fails)
    if fails != "init":
        assert (asked["project"], asked["name"], asked["config"]) == (
            "runs",
            "mine",
            {"train.steps": STEPS},
        )


def test_row_of_a_skipped_step_is_written(tmp_path):
    """Its loss is NaN and it has no gradient norm."""
    one = make(tmp_path)
    row = one.record(
        step=1,
        loss=math.nan,
        by_time=[0.0, 0.0],
        grad_norm=None,
        lr=0.0,
        data_wait_s=0.0,
        skipped_steps=0,
        skipped_samples=0,
    )
    one.close()
    assert "skipped" in line(row, STEPS) and logged(tmp_path) == [1]
