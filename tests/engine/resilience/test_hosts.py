"""Several hosts: lost, cut off, preempted, and as containers that share more than a network."""

import time

import pytest
from faults.hosts import lost_hosts, preempted_hosts, returning_links
from faults.toy_job import Job
from faults.trials import output
from namespaces import Hosts, why_not

from iomm.engine.resilience import watchdog

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
