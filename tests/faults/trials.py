"""Trials of what a run survives: each function breaks something n times and returns what it counted, or raises."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

from faults.mini import Job

from iomm.engine import checkpoint
from iomm.engine.guard import REQUEUE
from iomm.engine.watch import HUNG, alive


def logged(job):
    """Newest step whose commit the engine has printed."""
    return max((int(n) for n in re.findall(r"checkpoint of step (\d+) committed", job.out)), default=0)


def newest_step(run_dir):
    folder = checkpoint.newest(Path(run_dir) / "checkpoints", say=lambda line: None)
    return 0 if folder is None else checkpoint.step_of(folder)


def final_files(run_dir):
    return checkpoint.read_manifest(checkpoint.newest(Path(run_dir) / "checkpoints"))["files"]


def log_rows(run_dir):
    rows = [json.loads(line) for line in (Path(run_dir) / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"].hex(), (r["grad_norm"] or 0.0).hex(), r["lr"].hex()) for r in rows]


def kill_chain(folder, num_kills, seed=0):
    """Start, SIGKILL {rank 0, rank 1, both, launcher} at a random moment, start again ...; after each kill the newest
    verified step must be at least the last one logged as committed, and in the end all bits those of a run without kills."""
    rng, run_dir = random.Random(seed), Path(folder) / "killed"
    settings = ["checkpoint.every_steps=3", "train.steps=1000000"]
    lost = mid_save = 0
    slowest_s = 0.0
    for _ in range(num_kills):
        job = Job(run_dir, *settings, step_s=0.004, width=100_000)
        time.sleep(rng.uniform(0.05, 1.2))
        target = rng.choice(["rank 0", "rank 1", "both", "launcher"])
        started = time.monotonic()
        if target == "launcher":
            os.kill(job.launcher, signal.SIGKILL)
        else:
            job.kill({"rank 0": [0], "rank 1": [1], "both": [0, 1]}[target])
        while any(map(alive, job.pids)) and time.monotonic() - started < 10:
            time.sleep(0.01)
        slowest_s = max(slowest_s, time.monotonic() - started)
        assert not any(map(alive, job.pids)), f"a rank outlives {target} by 10 s"
        mid_save += bool(list((run_dir / "checkpoints").glob(".tmp-*")))
        lost += newest_step(run_dir) < logged(job)
        job.wait()
    steps = newest_step(run_dir) + 10
    last = [settings[0], f"train.steps={steps}"]
    assert Job(run_dir, *last, width=100_000).wait(120) == [0, 0]
    golden = Path(folder) / "golden"
    assert Job(golden, "checkpoint.every_steps=1000000", last[1], width=100_000).wait(3600) == [0, 0]
    equal = final_files(run_dir) == final_files(golden) and log_rows(run_dir) == log_rows(golden)
    return {"kills": num_kills, "commits_lost": lost, "kills_during_a_save": mid_save, "steps": steps,
            "final_state_and_log_equal_to_a_run_without_kills": equal, "slowest_exit_of_all_ranks_s": round(slowest_s, 2)}


def bitwise_resumes(folder, num_trials, seed=0):
    """Stop at a random step (in an epoch's middle, in accumulation, after a skipped step ...), resume: every later loss,
    gradient norm and rate as hex, and the last state, are those of the run that was not stopped."""
    rng, folder = random.Random(seed), Path(folder)
    settings = ["train.steps=60", "checkpoint.every_steps=1", "checkpoint.keep=100", "train.micro_batch=2"]
    assert Job(folder / "golden", *settings, nan_steps=[7, 23]).wait(60) == [0, 0]
    equal = 0
    for trial in range(num_trials):
        run_dir, step = folder / f"trial{trial}", rng.choice([7, 8, 23, *range(1, 40)])
        shutil.copytree(folder / "golden", run_dir)
        for path in checkpoint.steps(run_dir / "checkpoints"):
            if checkpoint.step_of(path) > step:
                shutil.rmtree(path)
        assert Job(run_dir, *settings, nan_steps=[7, 23]).wait(60) == [0, 0]
        assert f"resumed from step {step}" in (run_dir / "out-rank0.txt").read_text()
        equal += final_files(run_dir) == final_files(folder / "golden") and log_rows(run_dir) == log_rows(folder / "golden")
        shutil.rmtree(run_dir)
    return {"trials": num_trials, "bitwise": equal, "steps_compared_at_least": 20}


def world_sizes(folder):
    """1 -> 2, 2 -> 1, 2 -> 1 -> 2, 4 -> 2, 3 -> 2: whole state bit-equal after the load, first loss bitwise, then within
    1e-6 for 50 steps; where only two-term sums occur (1 and 2 ranks), bitwise to the end."""
    found = {}
    for path in ([1, 2], [2, 1], [2, 1, 2], [4, 2], [2, 4]):
        run_dir, golden = Path(folder) / "-".join(map(str, path)), Path(folder) / f"golden{path[0]}-{max(path)}"
        same = [f"train.micro_batch={2 if 4 in path else 4}", "train.global_batch=8", "checkpoint.keep=100"]
        if not golden.exists():
            assert Job(golden, *same, "checkpoint.every_steps=10", f"train.steps={10 + 25 * 2}", size=path[0]).wait(90) == [0] * path[0]
        for i, size in enumerate(path):
            steps = [10, *([35, 60] if len(path) == 3 else [60])][i]
            assert Job(run_dir, *same, "checkpoint.every_steps=10", f"train.steps={steps}", size=size).wait(90) == [0] * size
        ours, theirs = log_rows(run_dir), log_rows(golden)
        losses = [(float.fromhex(a[1]), float.fromhex(b[1])) for a, b in zip(ours, theirs, strict=True)]
        found["->".join(map(str, path))] = {
            "steps": [row[0] for row in ours] == list(range(1, 61)), "first_loss_bitwise": ours[10][1] == theirs[10][1],
            "bitwise_to_the_end": [row[1::2] for row in ours] == [row[1::2] for row in theirs], "worst_relative": max(abs(a - b) / abs(b) for a, b in losses)}
    return found


def requests_to_stop(folder, num_trials, seed=0):
    """SIGTERM or SIGUSR1 to one or all ranks at a random moment, once or twice: both ranks leave with the requeue code,
    having committed the last step they did."""
    rng, good, slowest_s = random.Random(seed), 0, 0.0
    for trial in range(num_trials):
        run_dir = Path(folder) / f"trial{trial}"
        job = Job(run_dir, "train.steps=100000", "checkpoint.every_steps=4", step_s=0.02, width=100_000)
        while not (run_dir / "log.jsonl").exists() or not (run_dir / "log.jsonl").read_text().count("\n"):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.4))
        number = rng.choice([signal.SIGTERM, signal.SIGUSR1])
        targets, started = rng.choice([[0], [1], [0, 1]]), time.monotonic()
        job.kill(targets, number)
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0.0, 0.02))
            job.kill(targets, number)
        codes = job.wait(20)
        slowest_s = max(slowest_s, time.monotonic() - started)
        last = log_rows(run_dir)[-1][0]
        good += codes == [REQUEUE] * 2 and newest_step(run_dir) == last == logged(job)
        shutil.rmtree(run_dir)
    return {"trials": num_trials, "same_step_committed_and_requeue_code": good, "slowest_exit_s": round(slowest_s, 2)}


def hangs(folder, num_trials, hang_s=1.5, beyond_s=2.0, seed=0):
    """One rank stands still in a random step: both ranks end, the right one is named, the stacks of both are there."""
    kinds = ("stop", "lock", "fifo", "worker", "mismatch")
    rng, good, slowest_s, failures = random.Random(seed), 0, 0.0, []
    for trial in range(num_trials):
        run_dir, kind, rank, step = Path(folder) / f"trial{trial}", kinds[trial % len(kinds)], rng.randrange(2), rng.randint(3, 9)
        job = Job(run_dir, "train.steps=100000", f"guard.hang_s={hang_s}", step_s=0.01,
                  fault={"step": step, "ranks": [rank], "kind": kind})
        log = run_dir / "log.jsonl"
        while not log.exists() or log.read_text().count("\n") < step - 1:
            time.sleep(0.005)
        started = time.monotonic()
        while all(map(alive, job.pids)) and time.monotonic() - started < hang_s + 15:
            time.sleep(0.01)
        took_s = time.monotonic() - started
        codes = job.wait(15)
        said = "".join(path.read_text() for path in run_dir.glob("out-rank*.txt"))
        stacks = all("File" in (run_dir / f"stacks-rank{r}.txt").read_text() for r in range(2))
        named = ("all wait in collective" if kind == "mismatch" else f"step {step}: rank {rank} (") in said
        slowest_s = max(slowest_s, took_s)
        if HUNG in codes and named and stacks and took_s < hang_s + beyond_s:
            good += 1
        else:
            failures.append((kind, rank, codes, round(took_s, 2), stacks, said[-500:]))
    return {"trials": num_trials, "found_named_and_stacks_saved": good, "slowest_s_beyond_the_limit": round(slowest_s - hang_s, 2)}, failures


def false_alarms(folder, num_steps, hang_s=1.5):
    """A long run whose one step is ten times as slow as the others, and one pause just below the limit: no alarm."""
    code = Job(Path(folder) / "quiet", f"train.steps={num_steps}", "checkpoint.every_steps=1000", f"guard.hang_s={hang_s}",
               slow_step=num_steps // 2, step_s=0.0).wait(600)
    slow = Job(Path(folder) / "slow", "train.steps=40", f"guard.hang_s={hang_s}", slow_step=20, step_s=0.1).wait(60)
    return {"steps": num_steps + 40, "alarms": (code != [0, 0]) + (slow != [0, 0])}


def deaths(folder, num_trials, seed=0):
    """SIGKILL of one rank at a random moment: how long the other takes to leave."""
    rng, times = random.Random(seed), []
    for trial in range(num_trials):
        run_dir = Path(folder) / f"trial{trial}"
        job = Job(run_dir, "train.steps=100000", "checkpoint.every_steps=3", step_s=0.01, width=100_000)
        time.sleep(rng.uniform(0.2, 1.0))
        job.kill([trial % 2])
        started = time.monotonic()
        codes = job.wait(20)
        assert None not in codes, codes
        times.append(time.monotonic() - started)
        shutil.rmtree(run_dir)
    return {"trials": num_trials, "survivor_gone_within_5_s": sum(t <= 5 for t in times), "slowest_s": round(max(times), 2)}
