"""Several hosts: lost, cut off, preempted, and as containers that share more than a network."""

import os
import signal
import time

import pytest
from faults.hosts import (
    HostsRun,
    bad_network,
    hosts_train,
    lost_hosts,
    preempted_hosts,
    returning_links,
    toy_hosts,
    wire,
)
from faults.real import small_run
from faults.toy_job import Job
from faults.trials import log_rows, newest_step, output
from launches import ROOT
from namespaces import Hosts, why_not

from iomm.engine.resilience import watchdog
from iomm.engine.resilience.preemption import REQUEUE

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def test_containers_with_the_same_name_and_process_ids_reach_each_other(tmp_path):
    """Only the network namespaces differ, so 127.0.0.1 is not rank 0's host."""
    with Hosts(2, shared_pids=True) as hosts:
        job = Job(tmp_path, "train.steps=5", hosts=hosts)
        assert job.wait(60) == [0, 0], output(tmp_path)
        # Process ids are shared, therefore a death is seen at once.
        job = Job(tmp_path, "train.steps=100000", "guard.lost_s=0", hosts=hosts, step_s=0.01)
        time.sleep(1.0)
        job.kill([1])
        assert job.wait(20)[0] == watchdog.DEAD
        assert "iomm: rank 1 (" in job.out and ") died" in job.out


@pytest.mark.parametrize(
    "num_trials, lost_s, number",
    [(1, 3.0, 2), pytest.param(4, 30.0, 3, marks=pytest.mark.slow)],
)
def test_lost_host_is_named_on_every_survivor(num_trials, lost_s, number, tmp_path):
    found, failures = lost_hosts(tmp_path, num_trials, lost_s, number)
    assert not failures and found["trials"] == 3 * num_trials, failures


@pytest.mark.parametrize(
    "num_trials, cuts_s, lost_s",
    [(1, (2.0,), 6.0), pytest.param(2, (5.0, 20.0, 28.0), 30.0, marks=pytest.mark.slow)],
)
def test_link_that_returns_in_time_costs_nothing(num_trials, cuts_s, lost_s, tmp_path):
    found, failures = returning_links(tmp_path, num_trials, cuts_s, lost_s)
    assert not failures and found["trials"] == num_trials * len(cuts_s), failures


@pytest.mark.parametrize("num_trials", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_preempted_host_saves_on_all(num_trials, tmp_path):
    _, failures = preempted_hosts(tmp_path, num_trials)
    assert not failures, failures


def test_wait_for_other_ranks_is_reported_once_per_host(monkeypatch, capsys):
    for local_rank, number in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with watchdog.reported_wait("3 other ranks at h0:29500", after_s=0.05):
            time.sleep(0.3)
        with watchdog.reported_wait("nothing", after_s=0.3):
            pass
        time.sleep(0.4)
        said = capsys.readouterr().err
        assert said.count(" is waiting for 3 other ranks at h0:29500\n") == number
        assert "nothing" not in said


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
@pytest.mark.parametrize("what, lost", [("kill", 1), ("cut", 1), ("kill", 0)])
def test_lost_host_ends_the_launchers_with_70_and_its_name(what, lost, launcher, tmp_path):
    """Host 0 has the store of the ranks, and the rendezvous of torchrun."""
    with Hosts(2) as hosts:
        run = HostsRun(
            hosts,
            launcher,
            tmp_path / "run",
            *small_run(tmp_path),
            "train.steps=100000",
            "guard.lost_s=5",
        )
        run.wait_for_steps(3)
        getattr(hosts, what)(lost)
        assert run.wait()[1 - lost] == watchdog.DEAD, run.output(1 - lost)[-3000:]
        out = run.output(1 - lost)
        assert f"iomm: rank {lost} (h{lost})" in out or f"from rank {lost} (h{lost})" in out, out
        assert "Traceback" not in out, out


@pytest.mark.slow
def test_signal_to_torchrun_of_one_host_ends_all_with_75(tmp_path):
    with Hosts(2) as hosts:
        settings = [*small_run(tmp_path), "checkpoint.every_steps=1000"]
        run_dir = tmp_path / "run"
        run = HostsRun(
            hosts,
            "torchrun",
            run_dir,
            *settings,
            "train.steps=100000",
            options=("--max-restarts", "3"),
        )
        run.wait_for_steps(3)
        os.kill(hosts.pids(1, str(ROOT / "engine/torchrun.py"))[-1], signal.SIGTERM)
        assert run.wait() == {0: REQUEUE, 1: REQUEUE}, run.output(0)[-3000:]
        assert newest_step(run_dir) == log_rows(run_dir)[-1][0]


@pytest.mark.parametrize(
    "trial", [toy_hosts, pytest.param(hosts_train, marks=pytest.mark.slow)], ids=["toy", "real"]
)
def test_hosts_train_like_one(trial, tmp_path):
    for case, found in trial(tmp_path, sizes=(1, 3)).items():
        assert found["samples_in_order"] and found["first_loss_bitwise"], (case, found)
        assert found["worst_relative"] < 1e-3, (case, found)


@pytest.mark.slow
def test_bad_network_is_no_fault(tmp_path):
    found = bad_network(tmp_path, num_steps=50)
    assert found["alarms"] == 0 and found["same_bits"], found


@pytest.mark.slow
def test_counted_bytes_are_on_the_wire(tmp_path):
    for case, found in wire(tmp_path, sizes=(3,)).items():
        if isinstance(found, dict):
            assert 0 <= found["more"] < 0.02, (case, found)
