"""Fault trials on several hosts (helpers/namespaces.py).

Most run the toy job, one rank on each host. Each function injects a fault n times and returns its
counts, or raises.
"""

import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults.toy_job import Job
from faults.trials import final_files, log_rows, newest_logged_commit, newest_step, samples_of
from namespaces import Hosts

from iomm.engine.resilience.preemption import REQUEUE
from iomm.engine.resilience.watchdog import DEAD, alive

# Trials wait most of the time, therefore several run side by side, each on hosts of its own.
SIDE_BY_SIDE = 4
# Exit codes and names are due so long after guard.lost_s.
BEYOND_S = 5.0


def in_parallel(trial, arguments):
    """Return [trial(*words) for words in arguments]."""
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return list(pool.map(lambda words: trial(*words), arguments))


def wait_for_steps(job, number):
    """Wait until the job has logged a number of steps."""
    log = job.run_dir / "log.jsonl"
    until = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") < number:
        assert time.monotonic() < until and any(map(alive, job.pids)), job.out[-2000:]
        time.sleep(0.01)


def output_of(job, rank):
    """Return the output of one rank."""
    return (job.run_dir / f"out-rank{rank}.txt").read_text()


# What happens to a host, and whether its own ranks live on.
LOSSES = {"kill": False, "cut": True, "unplug": True}


def lose_host(run_dir, kind, lost, number, lost_s, delay_s):
    """Lose a host in the middle of training.

    Every surviving rank must exit with 70 and name the lost host, and if its link is cut, the ranks
    on it must exit with 70 as well and name rank 0's host, whose heartbeats they miss.

    Returns:
        (seconds to the last exit, what went wrong or None).
    """
    with Hosts(number) as hosts:
        job = Job(
            run_dir,
            "train.steps=1000000",
            "checkpoint.every_steps=20",
            f"guard.lost_s={lost_s}",
            size=number,
            hosts=hosts,
            step_s=0.02,
            width=100_000,
        )
        wait_for_steps(job, 3)
        time.sleep(delay_s)
        started = time.monotonic()
        getattr(hosts, kind)(lost)
        while any(map(alive, job.pids)) and time.monotonic() - started < lost_s + 30:
            time.sleep(0.02)
        took_s = time.monotonic() - started
        codes = job.wait(20)
        problems = []
        for rank in range(number):
            out = output_of(job, rank)
            if rank == lost and not LOSSES[kind]:
                continue
            # Rank 0 is what the others hear, and what a host without its link misses.
            missed = f"(h{(0 if lost else 1) if rank == lost else lost})"
            said = [line for line in out.splitlines() if line.startswith("iomm: ")]
            stacks = run_dir / f"stacks-rank{rank}.txt"
            if codes[rank] != DEAD or len(said) != 1 or missed not in said[0] or "Traceback" in out:
                problems.append((rank, codes[rank], out[-1500:]))
            elif kind != "kill" and "File" not in (stacks.read_text() if stacks.exists() else ""):
                problems.append((rank, "no stacks"))
        if took_s > lost_s + BEYOND_S:
            problems.append(f"took {took_s:.1f} s")
    return took_s, ((kind, lost, problems) if problems else None)


def lost_hosts(folder, num_trials, lost_s=30.0, number=3, seed=0):
    """Kill a host, cut a host's link, and lose rank 0's host, num_trials times each.

    Rank 0's host is killed, cut or unplugged in turn. Returns (counts, failures).
    """
    rng, arguments = random.Random(seed), []
    for trial in range(num_trials):
        others = rng.randrange(1, number), rng.randrange(1, number)
        for kind, lost in (
            ("kill", others[0]),
            (("cut", "unplug")[trial % 2], others[1]),
            (("kill", "cut", "unplug")[trial % 3], 0),
        ):
            run_dir = Path(folder) / f"trial{len(arguments)}"
            arguments.append((run_dir, kind, lost, number, lost_s, rng.uniform(0, 0.5)))
    found = in_parallel(lose_host, arguments)
    failures = [problem for _, problem in found if problem]

    def slowest(killed):
        return round(
            max(
                (
                    seconds
                    for (seconds, _), (_, kind, *_) in zip(found, arguments, strict=True)
                    if (kind == "kill") == killed
                ),
                default=0.0,
            ),
            2,
        )

    return {
        "hosts": number,
        "lost_s": lost_s,
        "trials": len(found),
        "exit_70_and_host_named_on_every_survivor": len(found) - len(failures),
        "slowest_s_after_a_kill": slowest(killed=True),
        "slowest_s_after_a_cut": slowest(killed=False),
    }, failures


STEADY = ("train.steps=60", "checkpoint.every_steps=20", "checkpoint.keep=100")


def interrupted_link(run_dir, golden, cut_s, lost_s, step, delay_s):
    """Cut a link for cut_s seconds in a step, and return what differs from an undisturbed run."""
    with Hosts(2) as hosts:
        job = Job(
            run_dir, *STEADY, f"guard.lost_s={lost_s}", hosts=hosts, step_s=0.02, width=100_000
        )
        wait_for_steps(job, step)
        time.sleep(delay_s)
        hosts.cut(step % 2)
        time.sleep(cut_s)
        before = len(log_rows(run_dir))
        hosts.mend(step % 2)
        codes = job.wait(cut_s + 60)
    if codes != [0, 0]:
        return codes, job.out[-1500:], output_of(job, 1)[-1500:]
    if before == len(log_rows(run_dir)):
        return "the cut came too late"
    if final_files(run_dir) != final_files(golden) or log_rows(run_dir) != log_rows(golden):
        return "other losses or another state"
    return None


def returning_links(folder, num_trials, cuts_s=(5.0, 20.0), lost_s=30.0, seed=0):
    """Cut a link for a while in the middle of training, num_trials times for each duration.

    The run must go on and end with the bits of an undisturbed one. Returns (counts, failures).
    """
    rng, golden = random.Random(seed), Path(folder) / "golden"
    assert Job(golden, *STEADY, width=100_000).wait(60) == [0, 0]
    arguments = [
        (
            Path(folder) / f"trial{trial}-{cut_s:g}",
            golden,
            cut_s,
            lost_s,
            rng.randint(3, 40),
            rng.uniform(0, 0.03),
        )
        for trial in range(num_trials)
        for cut_s in cuts_s
    ]
    failures = [found for found in in_parallel(interrupted_link, arguments) if found]
    return {
        "lost_s": lost_s,
        "cut_for_s": list(cuts_s),
        "trials": len(arguments),
        "went_on_with_the_same_bits": len(arguments) - len(failures),
    }, failures


def preempt_host(run_dir, golden, host, number, delay_s):
    """Send SIGTERM to the ranks of one host, and resume on the hosts that are left.

    Returns what went wrong, or None.
    """
    settings = ("train.global_batch=12", "train.micro_batch=2", "checkpoint.every_steps=1000")
    with Hosts(number) as hosts:
        job = Job(
            run_dir,
            *settings,
            "train.steps=100000",
            size=number,
            hosts=hosts,
            step_s=0.02,
            record=True,
        )
        wait_for_steps(job, 3)
        time.sleep(delay_s)
        started = time.monotonic()
        job.kill([host], signal.SIGTERM)
        codes = job.wait(30)
        took_s = time.monotonic() - started
        step = newest_step(run_dir)
        if codes != [REQUEUE] * number or not (
            step == newest_logged_commit(job) == log_rows(run_dir)[-1][0]
        ):
            return took_s, (codes, step, job.out[-1000:])
        hosts.kill(host)
        # The hosts that are left form a new job, whose rank 0 is the first of them.
        left = [i for i in range(number) if i != host]
        hosts.holders = [hosts.holders[i] for i in left]
        hosts.addresses = [hosts.addresses[i] for i in left]
        hosts.processes = [hosts.processes[i] for i in left]
        hosts.number = number - 1
        last = step + 10
        again = Job(
            run_dir,
            *settings,
            f"train.steps={last}",
            size=number - 1,
            hosts=hosts,
            record=True,
        )
        if again.wait(60) != [0] * (number - 1) or f"resumed from step {step}" not in again.out:
            return took_s, output_of(again, 0)[-1000:]
    assert Job(golden, *settings, f"train.steps={last}", size=1, record=True).wait(90) == [0]
    expected, got = samples_of(golden), samples_of(run_dir)
    for found in (expected, got):
        for samples in found.values():
            samples.sort()
    if {n: got[n] for n in range(1, last + 1)} != expected:
        return took_s, "other global batches"
    return took_s, None


def preempted_hosts(folder, num_trials, number=3, seed=0):
    """Preempt one of several hosts at a random moment. Returns (counts, failures)."""
    rng = random.Random(seed)
    arguments = [
        (
            Path(folder) / f"trial{trial}",
            Path(folder) / f"golden{trial}",
            rng.randrange(number),
            number,
            rng.uniform(0, 0.4),
        )
        for trial in range(num_trials)
    ]
    found = in_parallel(preempt_host, arguments)
    failures = [problem for _, problem in found if problem]
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "hosts": number,
        "trials": num_trials,
        "same_step_saved_exit_75_and_same_batches_on_the_hosts_left": num_trials - len(failures),
        "slowest_exit_s": round(max(seconds for seconds, _ in found), 2),
    }, failures
