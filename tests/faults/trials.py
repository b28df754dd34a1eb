"""Fault trials with the toy job.

Each function injects a fault n times and returns its counts, or raises.
"""

import json
import os
import random
import re
import shutil
import signal
import time
from collections import defaultdict
from pathlib import Path

from faults.toy_job import Job, Source, digest

from iomm.engine.resilience import checkpoint_reader
from iomm.engine.resilience.preemption import REQUEUE
from iomm.engine.resilience.watchdog import DEAD, HUNG, alive


def newest_logged_commit(job):
    """Return the newest step whose commit the engine has logged, or 0."""
    return max(
        (int(n) for n in re.findall(r"checkpoint of step (\d+) committed", job.out)), default=0
    )


def newest_step(run_dir):
    """Return the step of the newest intact checkpoint, or 0."""
    folder = checkpoint_reader.newest(Path(run_dir) / "checkpoints")
    return 0 if folder is None else checkpoint_reader.step_of(folder)


def output(run_dir):
    """Return the output of all ranks."""
    return "".join(path.read_text() for path in sorted(Path(run_dir).glob("out-rank*.txt")))


def final_files(run_dir):
    """Return {name: {size, hash}} of the files of the newest checkpoint."""
    return checkpoint_reader.read_manifest(checkpoint_reader.newest(Path(run_dir) / "checkpoints"))[
        "files"
    ]


def log_rows(run_dir):
    """Return (step, loss, gradient norm, rate) of every step, with floats as hex."""
    rows = [json.loads(line) for line in (Path(run_dir) / "log.jsonl").read_text().splitlines()]
    return [
        (r["step"], r["loss"].hex(), (r["grad_norm"] or 0.0).hex(), r["lr"].hex()) for r in rows
    ]


def kill_chain(folder, num_kills, seed=0):
    """Start, SIGKILL {rank 0, rank 1, both, launcher} at a random moment, and start again.

    After each kill, the newest verified step must be at least the last one that was logged as
    committed. The final state and log must equal those of a run without kills bit by bit.
    """
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
        while any(map(alive, job.pids)) and time.monotonic() - started < 30:
            time.sleep(0.01)
        slowest_s = max(slowest_s, time.monotonic() - started)
        assert not any(map(alive, job.pids)), f"a rank still runs 30 s after the death of {target}"
        mid_save += bool(list((run_dir / "checkpoints").glob(".tmp-*")))
        lost += newest_step(run_dir) < newest_logged_commit(job)
        job.wait()
    steps = newest_step(run_dir) + 10
    last = [settings[0], f"train.steps={steps}"]
    assert Job(run_dir, *last, width=100_000).wait(120) == [0, 0]
    golden = Path(folder) / "golden"
    assert Job(golden, "checkpoint.every_steps=1000000", last[1], width=100_000).wait(3600) == [
        0,
        0,
    ]
    equal = final_files(run_dir) == final_files(golden) and log_rows(run_dir) == log_rows(golden)
    return {
        "kills": num_kills,
        "commits_lost": lost,
        "kills_during_a_save": mid_save,
        "steps": steps,
        "final_state_and_log_equal_to_a_run_without_kills": equal,
        "slowest_exit_of_all_ranks_s": round(slowest_s, 2),
    }


def bitwise_resumes(folder, num_trials, seed=0):
    """SIGKILL one rank in the last micro-batch of a step, then start again.

    The step is just after a skipped step, at or next to the end of an epoch, in the middle of one,
    or random. Every loss, gradient norm and rate (as hex), the samples and the last state must
    equal those of a run without kills, from the resumed step to the last, which are at least 20
    steps.
    """
    rng, folder = random.Random(seed), Path(folder)
    settings = [
        "train.steps=40",
        "checkpoint.every_steps=1",
        "checkpoint.keep=100",
        "train.micro_batch=2",
    ]
    same = {"nan_steps": [7, 15], "record": True}
    assert Job(folder / "golden", *settings, **same).wait(120) == [0, 0]
    # The step in which the first epoch ends.
    edge = Source.NUM_SAMPLES // 8 + 1
    steps = [8, 16, edge, edge + 1, edge // 2, *(rng.randint(2, 20) for _ in range(num_trials))][
        :num_trials
    ]
    equal, expected = 0, samples_of(folder / "golden")
    for trial, step in enumerate(steps):
        run_dir = folder / f"trial{trial}"
        fault = {"step": step, "ranks": [trial % 2], "kind": "kill", "place": "data"}
        assert Job(run_dir, *settings, fault=fault, **same).wait(60) != [0, 0]
        assert Job(run_dir, *settings, **same).wait(120) == [0, 0]
        resumed = int(
            re.findall(r"resumed from step (\d+)", (run_dir / "out-rank0.txt").read_text())[-1]
        )
        assert step - 2 <= resumed < step <= 20, "at most the save that was in progress may be lost"
        equal += (
            final_files(run_dir) == final_files(folder / "golden")
            and log_rows(run_dir) == log_rows(folder / "golden")
            and samples_of(run_dir) == expected
        )
        shutil.rmtree(run_dir)
    return {"trials": num_trials, "bitwise": equal, "steps_compared_at_least": 20}


def damaged_starts(folder):
    """Damage each file of the newest checkpoint of a run in four ways, then start again.

    The start must log the damage, resume from the previous checkpoint, and end with the same bits.
    """
    golden, good = Path(folder) / "golden", 0
    settings = ["train.steps=12", "checkpoint.every_steps=4", "checkpoint.keep=100"]
    assert Job(golden, *settings).wait(60) == [0, 0]
    names = sorted(p.name for p in checkpoint_reader.newest(golden / "checkpoints").iterdir())
    ways = {
        "flip": lambda raw: raw[:-9] + bytes([raw[-9] ^ 4]) + raw[-8:],
        "cut": lambda raw: raw[:-1],
        "hole": lambda raw: raw[: len(raw) // 4] + bytes(len(raw) // 2) + raw[-(len(raw) // 4) :],
        "missing": lambda raw: None,
    }
    for name in names:
        for way, change in ways.items():
            run_dir = Path(folder) / f"{name}-{way}"
            shutil.copytree(golden, run_dir)
            path = run_dir / "checkpoints/step-00000012" / name
            raw = change(path.read_bytes())
            if raw is not None:
                path.write_bytes(raw)
            else:
                path.unlink()
            codes = Job(run_dir, *settings).wait(60)
            lines = output(run_dir)
            good += (
                codes == [0, 0]
                and lines.count("damaged checkpoint skipped: ") == 1
                and "resumed from step 8" in lines
                and final_files(run_dir) == final_files(golden)
            )
            shutil.rmtree(run_dir)
    return {
        "starts": len(names) * len(ways),
        "went_on_from_the_one_before_and_ended_at_the_same_bits": good,
    }


def samples_of(run_dir):
    """Return {step: samples of the global batch in order}, for any number of ranks.

    A step that several starts trained has the samples of the last one.
    """
    found = defaultdict(dict)
    for path in sorted(Path(run_dir).glob("samples-rank*.jsonl")):
        for step, micro, samples in map(json.loads, path.read_text().splitlines()):
            found[step][micro, path.name] = samples
    return {
        step: [n for _, samples in sorted(parts.items()) for n in samples]
        for step, parts in found.items()
    }


def world_sizes(folder):
    """Resume with another number of ranks: 1 -> 2, 2 -> 1, 2 -> 1 -> 2, 4 -> 2, 2 -> 4.

    The samples of every step must be in the same order. The ranks' state after each load must equal
    the files bit by bit. The first loss must be bitwise equal, and the next 50 within 1e-6. With
    only two-term sums (1 and 2 ranks), all must be bitwise equal.
    """
    found = {}
    for path in ([1, 2], [2, 1], [2, 1, 2], [4, 2], [2, 4]):
        run_dir, golden = (
            Path(folder) / "-".join(map(str, path)),
            Path(folder) / f"golden{path[0]}-{max(path)}",
        )
        same = [
            f"train.micro_batch={2 if 4 in path else 4}",
            "train.global_batch=8",
            "checkpoint.keep=100",
            "checkpoint.every_steps=10",
        ]
        if not golden.exists():
            assert (
                Job(golden, *same, "train.steps=60", size=path[0], record=True).wait(90)
                == [0] * path[0]
            )
        loads, in_order, expected = 0, True, samples_of(golden)
        for size, steps in zip(path, [10, 30, 60] if len(path) == 3 else [10, 60], strict=True):
            before = checkpoint_reader.newest(run_dir / "checkpoints") if steps > 10 else None
            for samples in run_dir.glob("samples-rank*.jsonl"):
                # All parts of a step must come from one start.
                samples.rename(run_dir / f"{samples.name}-{steps}")
            job = Job(run_dir, *same, f"train.steps={steps}", size=size, record=True)
            assert job.wait(90) == [0] * size
            now = samples_of(run_dir)
            in_order &= now == {step: expected[step] for step in now} and max(now) == steps
            if before is not None:
                reader = checkpoint_reader.Reader(before)
                saved_digest = digest(reader.manifest["shapes"], reader.full)
                loads += job.out.splitlines().count(
                    f"resumed from step {checkpoint_reader.step_of(before)} {saved_digest}"
                )
        ours, theirs = log_rows(run_dir), log_rows(golden)
        losses = [
            (float.fromhex(a[1]), float.fromhex(b[1])) for a, b in zip(ours, theirs, strict=True)
        ]
        found["->".join(map(str, path))] = {
            "samples_in_order": in_order and [row[0] for row in ours] == list(range(1, 61)),
            "loads": len(path) - 1,
            "bitwise_loads": loads,
            "first_loss_bitwise": ours[10][1] == theirs[10][1],
            "bitwise_to_the_end": [row[1::2] for row in ours] == [row[1::2] for row in theirs],
            "worst_relative": max(abs(a - b) / abs(b) for a, b in losses),
        }
    return found


def requests_to_stop(folder, num_trials, seed=0):
    """Send SIGTERM or SIGUSR1 to one or all ranks at a random moment, once or twice.

    Both ranks must commit their last step and exit with the requeue code.
    """
    rng, good, slowest_s, mid_save = random.Random(seed), 0, 0.0, 0
    for trial in range(num_trials):
        run_dir = Path(folder) / f"trial{trial}"
        job = Job(
            run_dir, "train.steps=100000", "checkpoint.every_steps=4", step_s=0.02, width=100_000
        )
        while not (run_dir / "log.jsonl").exists() or not (run_dir / "log.jsonl").read_text().count(
            "\n"
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.4))
        number = rng.choice([signal.SIGTERM, signal.SIGUSR1])
        targets, started = rng.choice([[0], [1], [0, 1]]), time.monotonic()
        job.kill(targets, number)
        mid_save += bool(list((run_dir / "checkpoints").glob(".tmp-*")))
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0.0, 0.02))
            job.kill(targets, number)
        codes = job.wait(20)
        slowest_s = max(slowest_s, time.monotonic() - started)
        last = log_rows(run_dir)[-1][0]
        good += codes == [REQUEUE] * 2 and newest_step(run_dir) == last == newest_logged_commit(job)
        shutil.rmtree(run_dir)
    return {
        "trials": num_trials,
        "same_step_committed_and_requeue_code": good,
        "asked_during_a_save": mid_save,
        "slowest_exit_s": round(slowest_s, 2),
    }


def hangs(folder, num_trials, hang_s=1.5, beyond_s=2.0, seed=0):
    """Make one rank hang in a random step.

    Both ranks must end, name the rank at fault and save the stacks of both.
    """
    kinds = ("stop", "lock", "fifo", "worker", "mismatch")
    rng, good, slowest_s, failures = random.Random(seed), 0, 0.0, []
    for trial in range(num_trials):
        run_dir, kind, rank, step = (
            Path(folder) / f"trial{trial}",
            kinds[trial % len(kinds)],
            rng.randrange(2),
            rng.randint(3, 9),
        )
        job = Job(
            run_dir,
            "train.steps=100000",
            f"guard.hang_s={hang_s}",
            step_s=0.01,
            fault={"step": step, "ranks": [rank], "kind": kind, "place": "data"},
        )
        log = run_dir / "log.jsonl"
        while not log.exists() or log.read_text().count("\n") < step - 1:
            time.sleep(0.005)
        started = time.monotonic()
        while all(map(alive, job.pids)) and time.monotonic() - started < hang_s + 15:
            time.sleep(0.01)
        took_s = time.monotonic() - started
        codes = job.wait(15)
        stacks = all("File" in (run_dir / f"stacks-rank{r}.txt").read_text() for r in range(2))
        named = (
            "all wait in collective" if kind == "mismatch" else f"step {step}: rank {rank} ("
        ) in output(run_dir)
        slowest_s = max(slowest_s, took_s)
        if HUNG in codes and named and stacks and took_s < hang_s + beyond_s:
            good += 1
        else:
            failures.append((kind, rank, codes, round(took_s, 2), stacks, output(run_dir)[-500:]))
    return {
        "trials": num_trials,
        "found_named_and_stacks_saved": good,
        "slowest_s_beyond_the_limit": round(slowest_s - hang_s, 2),
    }, failures


def false_alarms(folder, num_steps, hang_s=1.5):
    """Run slow jobs that do not hang, and count the alarms.

    A long run has one step that is ten times as slow as the others. A second run has a step just
    below the limit and an evaluation above it. Two more have saves above the limit, in the
    foreground and in the background, where the next save waits for them.
    """
    code = Job(
        Path(folder) / "quiet",
        f"train.steps={num_steps}",
        "checkpoint.every_steps=1000",
        f"guard.hang_s={hang_s}",
        slow_step=num_steps // 2,
        step_s=0.0,
    ).wait(1800)
    slow = Job(
        Path(folder) / "slow",
        "train.steps=40",
        f"guard.hang_s={hang_s}",
        slow_step=20,
        step_s=0.1,
        evaluate_at=30,
        evaluate_s=1.5 * hang_s,
    ).wait(60)
    disks = [
        Job(
            Path(folder) / f"disk-{background}",
            "train.steps=6",
            "checkpoint.every_steps=2",
            f"guard.hang_s={hang_s}",
            f"checkpoint.background={background}",
            disk_s=1.5 * hang_s,
        ).wait(60)
        for background in ("false", "true")
    ]
    return {
        "steps": num_steps + 52,
        "alarms": sum(codes != [0, 0] for codes in (code, slow, *disks)),
    }


PLACES = ("forward", "backward", "step", "load", "save")


def deaths(folder, num_trials, seed=0):
    """SIGKILL one rank in each part of a step, in a load or in a save.

    The parts are the forward pass, the backward pass and the optimizer's step. Measures how long
    the other rank takes to exit, and a new start to its first step.
    """
    rng, leaving, starting, named = random.Random(seed), [], [], 0
    for trial in range(num_trials):
        run_dir, place, rank = (
            Path(folder) / f"trial{trial}",
            PLACES[trial % len(PLACES)],
            trial % 2,
        )
        settings, width = ["checkpoint.every_steps=3"], 100_000
        if place == "load":
            assert Job(run_dir, *settings, "train.steps=3", width=width).wait(30) == [0, 0]
        job = Job(
            run_dir,
            *settings,
            "train.steps=100000",
            step_s=0.01,
            width=width,
            fault={"step": rng.randint(2, 12), "ranks": [rank], "kind": "kill", "place": place},
        )
        while alive(job.pids[rank]):
            time.sleep(0.005)
        started = time.monotonic()
        codes = job.wait(20)
        leaving.append(time.monotonic() - started)
        named += codes[1 - rank] == DEAD and f"rank {rank} (" in output(run_dir)
        started = time.monotonic()
        last = [*settings, f"train.steps={newest_step(run_dir) + 1}"]
        assert Job(run_dir, *last, width=width).wait(120) == [0, 0], place
        # Includes the first step, its save and the exit.
        starting.append(time.monotonic() - started)
        shutil.rmtree(run_dir)
    return {
        "trials": num_trials,
        "survivor_gone_within_5_s": sum(t <= 5 for t in leaving),
        "and_named_the_dead": named,
        "slowest_s": round(max(leaving), 2),
        "first_step_of_the_next_start_within_60_s": sum(t <= 60 for t in starting),
        "slowest_start_s": round(max(starting), 2),
    }
