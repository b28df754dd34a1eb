"""Steps that must not count, requests to stop, dead and hung ranks."""

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.nonfinite import planned
from faults.trials import deaths, false_alarms, hangs, requests_to_stop
from test_run import LIMIT_S, command, environment, rows

from iomm.config import InputError
from iomm.engine.guard import REQUEUE, Guard
from iomm.engine.shapes.world import write_world

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_world(folder, num_images=72, size_px=32, seed=1, shard_size=24)
    return [f"data.shards={folder}", "train.global_batch=4", "checkpoint.every_steps=1000", "log.sample_images=0",
            "train.threads=1"]


@pytest.mark.parametrize("precision, num_injections", [
    ("fp32", 12), pytest.param("fp32", 30, marks=pytest.mark.slow), pytest.param("bf16", 30, marks=pytest.mark.slow)])
def test_what_is_not_finite_changes_nothing(precision, num_injections, settings, tmp_path):
    """Pixel, latent, condition, loss on one rank, gradient, moment; NaN, inf, -inf: both ranks skip, every bit stays, the
    samples are named, and the good step after each counts."""
    line = command(2, *settings, f"run.dir={tmp_path / 'run'}", f"precision={precision}", f"train.steps={2 * num_injections + 1}",
                   "guard.max_skips=1")
    script = line.index(str(ROOT / "engine/launch.py"))
    line[script:script + 1] = [str(ROOT / "tests/faults/nonfinite.py"), str(tmp_path / "report"), str(num_injections)]
    done = subprocess.run(line, cwd=ROOT, env=environment(), text=True, timeout=2 * LIMIT_S, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-3000:]
    reports = [json.loads((tmp_path / f"report-rank{r}.json").read_text()) for r in range(2)]
    assert reports[0]["applied"] == reports[1]["applied"]
    plan = planned(num_injections)
    for step in range(1, 2 * num_injections + 1):
        for report in reports:
            same = report["hashes"][step] == report["hashes"][step - 1]
            assert same == (step in plan) and report["applied"][step - 1] != same, (step, plan.get(step))
    said = re.findall(r"step (\d+) skipped on all ranks.*samples (\d+) to (\d+)(.*)", done.stdout)
    assert [(int(s), int(a), int(b)) for s, a, b, _ in said] == [(s, 4 * s - 4, 4 * s - 1) for s in plan]
    for step, first, last, words in said:
        if plan[int(step)][0] in ("pixel", "latent", "embedding"):
            bad = [int(n) for n in re.search(r"not finite: ([\d, ]+)", words)[1].split(",")]
            assert bad and all(int(first) <= n <= int(last) for n in bad)
    assert rows(tmp_path / "run/log.jsonl")[-1]["skipped_steps"] == num_injections


def test_too_many_skips_in_a_row_stop_the_run():
    guard = Guard(max_skips=2, say=lambda line: None)
    for applied in (False, False, True, False, False):
        guard.saw(1, math.nan, "samples 0 to 3", applied)
    with pytest.raises(InputError, match="3 steps in a row up to step 9 .*samples 8 to 9.*resume auto"):
        guard.saw(9, math.nan, "samples 8 to 9", False)
    assert guard.total == 5


def noise(rng, step):
    """Losses as the demo's look: a slow fall with noise whose tail is heavier than a Gaussian's."""
    return (0.4 + 0.6 * math.exp(-step / 400)) * (1 + 0.06 * rng.gauss(0, 1) + 0.02 * rng.expovariate(1))


@pytest.mark.parametrize("num_steps", [20_000])
def test_spikes_are_found_and_never_believed(num_steps):
    rng, said = random.Random(3), []
    guard, spiked, found = Guard(max_skips=5, say=said.append), [], []
    for step in range(num_steps):
        loss, before = noise(rng, step), guard.spikes
        if step > 100 and step % 200 == 0:
            loss *= rng.uniform(3, 10)
            spiked.append(step)
        guard.saw(step, loss, "", True)
        if guard.spikes > before:
            found.append(step)
        assert max(guard.losses) < 2
    assert set(spiked) <= set(found) and len(said) >= len(spiked)
    assert len(found) - len(spiked) <= 1, "false alarms"


def test_a_new_level_is_learnt_from_nothing():
    guard = Guard(max_skips=5, say=lambda line: None)
    rng = random.Random(0)
    for step in range(200):
        guard.saw(step, 1 + 0.01 * rng.random(), "", True)
    for step in range(Guard.WINDOW):
        guard.saw(step, 3 + 0.01 * rng.random(), "", True)
        assert max(guard.losses, default=0) < 2
    assert not guard.losses
    for step in range(Guard.LEAST):
        guard.saw(step, 3 + 0.01 * rng.random(), "", True)
    assert not guard.is_spike(3.01) and guard.is_spike(9)


def test_a_resumed_guard_judges_as_if_nothing_had_been():
    rng, one = random.Random(5), Guard(max_skips=5, say=lambda line: None)
    for step in range(150):
        one.saw(step, noise(rng, step), "", True)
    other = Guard(max_skips=5, say=lambda line: None)
    other.restore(json.loads(json.dumps(one.state())))
    assert other.state() == one.state() and all(one.is_spike(x / 100) == other.is_spike(x / 100) for x in range(200))


@pytest.mark.parametrize("num_trials", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_request_to_stop_is_met_by_all_ranks_at_one_step(num_trials, tmp_path):
    found = requests_to_stop(tmp_path, num_trials)
    assert found["same_step_committed_and_requeue_code"] == num_trials, found


@pytest.mark.parametrize("num_trials", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_dead_rank_ends_the_other(num_trials, tmp_path):
    found = deaths(tmp_path, num_trials)
    assert found["survivor_gone_within_5_s"] == num_trials, found


# Other work on the machine delays what is timed; the slow test wants it to itself.
@pytest.mark.parametrize("num_trials, beyond_s", [(3, 8.0), pytest.param(40, 2.0, marks=pytest.mark.slow)])
def test_a_hang_is_found_and_explained(num_trials, beyond_s, tmp_path):
    found, failures = hangs(tmp_path, num_trials, beyond_s=beyond_s)
    assert found["found_named_and_stacks_saved"] == num_trials, failures


@pytest.mark.parametrize("num_steps", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_slow_step_is_no_hang(num_steps, tmp_path):
    assert false_alarms(tmp_path, num_steps)["alarms"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("moment_s", [1.0, 4.0, 7.0, 10.0, None])
def test_a_killed_rank_of_a_real_run_ends_it_and_the_next_start_works(moment_s, settings, tmp_path):
    """SIGKILL of one rank while importing, building, training: the other is gone within 5 s, nothing stays in /dev/shm, and
    the next start trains within a minute."""
    line = ["--resume", "auto", f"run.dir={tmp_path / 'run'}", *settings, "checkpoint.every_steps=2"]
    before = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(command(2, *line, "train.steps=100000"), cwd=ROOT, env=environment(), start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = time.monotonic()
    while (time.monotonic() - started < moment_s) if moment_s else len(rows(tmp_path / "run/log.jsonl")) < 5:
        time.sleep(0.05)
    pids = ranks_below(process.pid)
    while len(pids) < 2:
        pids = ranks_below(process.pid)
    os.kill(pids[0], 9)
    killed = time.monotonic()
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        assert time.monotonic() - killed < 30
        time.sleep(0.02)
    assert time.monotonic() - killed <= 5
    assert process.wait(20) != 0
    assert set(os.listdir("/dev/shm")) <= before
    again = time.monotonic()
    done = subprocess.run(command(2, *line, f"train.steps={len(rows(tmp_path / 'run/log.jsonl')) + 1}"), cwd=ROOT, env=environment(),
                          text=True, timeout=LIMIT_S, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and time.monotonic() - again < 60, done.stdout[-2000:]


def ranks_below(pid):
    """Process ids of the ranks that a deepspeed command has started."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,args"], text=True, capture_output=True).stdout.splitlines()[1:]
    table = [(int(p), int(parent), args) for p, parent, args in (line.split(None, 2) for line in found)]
    launchers = {p for p, parent, _ in table if parent == pid}
    return [p for p, parent, args in table if parent in launchers and "--local_rank" in args]


@pytest.mark.slow
def test_a_real_run_stops_when_asked(settings, tmp_path):
    process = subprocess.Popen(command(2, f"run.dir={tmp_path / 'run'}", *settings, "train.steps=100000"), cwd=ROOT,
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(rows(tmp_path / "run/log.jsonl")) < 3:
        time.sleep(0.05)
    os.kill(ranks_below(process.pid)[1], 10)
    said, _ = process.communicate(timeout=60)
    steps = len(rows(tmp_path / "run/log.jsonl"))
    assert process.returncode == REQUEUE and f"stopped as asked; step {steps} is saved" in said
    assert (tmp_path / f"run/checkpoints/step-{steps:08d}").is_dir() and sys.executable
