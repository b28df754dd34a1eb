"""Skipped steps, loss spikes, preemption, and dead and hung ranks."""

import json
import math
import os
import random
import re
import signal
import socket
import time
from types import SimpleNamespace

import pytest
from faults.real import Run, interrupted_starts, nonfinite, real_deaths, small_run
from faults.toy_job import Job
from faults.trials import (
    deaths,
    false_alarms,
    hangs,
    log_rows,
    newest_step,
    output,
    requests_to_stop,
)
from launches import rows

from iomm.config import InputError
from iomm.engine.launch import main
from iomm.engine.resilience import watchdog
from iomm.engine.resilience.loss_guard import LossGuard
from iomm.engine.resilience.preemption import REQUEUE
from iomm.engine.resilience.watchdog import REFUSED


@pytest.mark.parametrize(
    "precisions, num_injections",
    [(["fp32"], 12), pytest.param(["fp32", "bf16"], 60, marks=pytest.mark.slow)],
)
def test_nonfinite_values_change_no_state(precisions, num_injections, tmp_path):
    found = nonfinite(tmp_path, num_injections, precisions)
    assert (
        found["injections"]
        == found["every_bit_unchanged_on_both_ranks"]
        == found["samples_named"]
        == num_injections
    ), found
    assert (
        found["good_steps_that_counted"]
        == found["good_steps_between"]
        == num_injections - len(precisions)
    ), found


def test_too_many_skips_in_a_row_stop_the_run():
    guard = LossGuard(max_skips=2)
    for applied in (False, False, True, False, False):
        guard.record(1, math.nan, "samples 0 to 3", applied)
    with pytest.raises(
        InputError,
        match=r"3 steps in a row up to step 9 .*samples 8 to 9.*a new run.dir "
        r".*resume OLD/checkpoints/step-00000009",
    ):
        guard.record(9, math.nan, "samples 8 to 9", False)
    assert guard.total == 5


def test_run_stopped_by_loss_guard_saves_its_last_step(tmp_path):
    settings = ["train.steps=20", "checkpoint.every_steps=100", "guard.max_skips=1"]
    same = {"nan_steps": [6, 7]}
    assert Job(tmp_path, *settings, **same).wait(20) == [REFUSED] * 2
    assert newest_step(tmp_path) == 7
    assert [row[0] for row in log_rows(tmp_path)] == list(range(1, 8))
    assert "iomm: 2 steps in a row up to step 7 " in output(tmp_path)
    assert Job(tmp_path, *settings, **same).wait(20) == [0, 0]
    assert "resumed from step 7" in output(tmp_path)


def noise(rng, step):
    """Return a loss like the demo's: a slow decay with noise heavier-tailed than a Gaussian."""
    return (0.4 + 0.6 * math.exp(-step / 400)) * (
        1 + 0.06 * rng.gauss(0, 1) + 0.02 * rng.expovariate(1)
    )


@pytest.mark.parametrize("num_steps", [20_000])
def test_spikes_are_found_and_kept_out_of_the_statistics(num_steps, caplog):
    rng = random.Random(3)
    guard, spiked, found = LossGuard(max_skips=5), [], []
    for step in range(num_steps):
        loss, before = noise(rng, step), guard.spikes
        if step > 100 and step % 200 == 0:
            loss *= rng.uniform(3, 10)
            spiked.append(step)
        guard.record(step, loss, "", True)
        if guard.spikes > before:
            found.append(step)
        assert max(guard.losses) < 2
    assert set(spiked) <= set(found) and len(caplog.messages) >= len(spiked)
    assert len(found) - len(spiked) <= 1, "false alarms"


def test_statistics_restart_empty_at_a_new_loss_level():
    guard = LossGuard(max_skips=5)
    rng = random.Random(0)
    for step in range(200):
        guard.record(step, 1 + 0.01 * rng.random(), "", True)
    for step in range(LossGuard.WINDOW):
        guard.record(step, 3 + 0.01 * rng.random(), "", True)
        assert max(guard.losses, default=0) < 2
    assert not guard.losses
    for step in range(LossGuard.LEAST):
        guard.record(step, 3 + 0.01 * rng.random(), "", True)
    assert not guard.is_spike(3.01) and guard.is_spike(9)


def test_resumed_loss_guard_detects_the_same_spikes():
    rng, one = random.Random(5), LossGuard(max_skips=5)
    for step in range(150):
        one.record(step, noise(rng, step), "", True)
    other = LossGuard(max_skips=5)
    other.restore(json.loads(json.dumps(one.state())))
    assert other.state() == one.state()
    assert all(one.is_spike(x / 100) == other.is_spike(x / 100) for x in range(200))


@pytest.mark.parametrize("num_trials", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_stop_signal_stops_all_ranks_at_the_same_step(num_trials, tmp_path):
    found = requests_to_stop(tmp_path, num_trials)
    assert found["same_step_committed_and_requeue_code"] == num_trials, found


@pytest.mark.parametrize("num_trials", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_dead_rank_is_named_and_ends_the_other(num_trials, tmp_path):
    found = deaths(tmp_path, num_trials)
    assert found["and_named_the_dead"] == found["survivor_gone_within_5_s"] == num_trials, found
    assert found["first_step_of_the_next_start_within_60_s"] == num_trials, found


@pytest.mark.parametrize(
    "ranks, who",
    [([0, 1], ""), ([0], ""), ([1], rf"rank 1 \({re.escape(socket.gethostname())}\): ")],
)
def test_input_error_is_printed_once_on_any_ranks(ranks, who, tmp_path):
    job = Job(
        tmp_path,
        "train.steps=100000",
        step_s=0.01,
        fault={"step": 3, "ranks": ranks, "kind": "mistake", "place": "data"},
    )
    assert job.wait(20) == [REFUSED, REFUSED]
    lines = [line for line in output(tmp_path).splitlines() if "iomm: " in line]
    assert len(lines) == 1, lines
    assert re.fullmatch(f"iomm: {who}a size must be >= 1, got 0", lines[0]), lines


def test_error_before_ranks_join_is_printed_once_per_host(monkeypatch, capsys):
    for rank, local_rank, who in (
        (0, 0, "iomm: --config"),
        (1, 1, None),
        (8, 0, f"iomm: rank 8 ({socket.gethostname()}): --config"),
    ):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setenv("WORLD_SIZE", "16")
        assert main(["--config", "dmeo"]) == REFUSED
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith(who) if who else not err


def test_equal_host_names_do_not_make_the_same_host(monkeypatch, tmp_path):
    """Only process ids of the same host are watched.

    On this host, those of another one would be dead or belong to another process. Containers may
    share process ids but not the network.
    """
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    host = watchdog.host_identity()
    assert host.name == socket.gethostname() and len(host.boot) == 36
    assert host.pid_namespace.startswith("pid:[") and host.net_namespace.startswith("net:[")
    others = [
        host,
        host._replace(boot="another boot"),
        host._replace(pid_namespace="pid:[another]"),
        host._replace(name="another"),
        host._replace(net_namespace="net:[another]"),
    ]
    ranks = SimpleNamespace(
        first=True,
        rank=0,
        size=6,
        all=lambda mine: [mine] + [(host, 1000 + r, 0, "") for r, host in enumerate(others)],
    )
    one = watchdog.Watchdog(ranks, tmp_path, 0)
    assert one.pids == {1: 1000, 5: 1004} and one.remote == [2, 3, 4, 5]
    assert [host.name for host in one.hosts] == [host.name] * 4 + ["another", host.name]


@pytest.mark.slow
def test_dead_rank_of_a_real_run_ends_it_and_it_restarts(tmp_path):
    found = real_deaths(tmp_path, 10)
    assert (
        found["survivor_gone_within_5_s"] == found["first_step_of_the_next_start_within_60_s"] == 10
    ), found


@pytest.mark.slow
def test_interrupted_start_does_not_block_the_next(tmp_path):
    found = interrupted_starts(tmp_path, 20)
    assert (
        found["next_start_trains_within_60_s"]
        == found["no_process_shared_memory_descriptor_or_port_left"]
        == 20
    ), found


# Other work on the machine delays the job. The slow test needs an idle machine.
@pytest.mark.parametrize(
    "num_trials, beyond_s", [(3, 8.0), pytest.param(40, 2.0, marks=pytest.mark.slow)]
)
def test_hang_is_found_and_explained(num_trials, beyond_s, tmp_path):
    found, failures = hangs(tmp_path, num_trials, beyond_s=beyond_s)
    assert found["found_named_and_stacks_saved"] == num_trials, failures


@pytest.mark.parametrize("num_steps", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_slow_step_is_not_a_hang(num_steps, tmp_path):
    assert false_alarms(tmp_path, num_steps)["alarms"] == 0


@pytest.mark.slow
def test_real_run_stops_on_a_signal(tmp_path):
    run = Run(
        tmp_path / "run", *small_run(tmp_path), "checkpoint.every_steps=1000", "train.steps=100000"
    )
    while len(rows(tmp_path / "run/log.jsonl")) < 3:
        time.sleep(0.05)
    os.kill(run.ranks()[1], signal.SIGUSR1)
    assert run.wait() == REQUEUE
    steps = len(rows(tmp_path / "run/log.jsonl"))
    assert (
        f"stopped by a signal; step {steps} is saved" in run.out
        and newest_step(tmp_path / "run") == steps
    )
