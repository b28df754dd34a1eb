"""Fault trials of real runs under ZeRO-3, through the deepspeed launcher.

The dataset has 72 images. A trial takes about half a minute.
"""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from faults.nonfinite import injections
from faults.toy_job import digest
from faults.trials import PLACES, log_rows, newest_step
from launches import PIXELS, ROOT, command, environment, rows

from iomm.engine.resilience import checkpoint_reader
from iomm.engine.resilience.watchdog import alive
from iomm.engine.shapes.dataset import write_dataset

LIMIT_S = 600


def small_run(folder):
    """Render a small dataset into the folder, and return the settings of a run on it."""
    write_dataset(Path(folder) / "shapes", num_images=72, size_px=32, seed=1, shard_size=24)
    return [
        "--config",
        PIXELS,
        f"data.shards={folder}/shapes",
        "train.global_batch=4",
        "log.sample_images=0",
        "train.threads=1",
        "precision=fp32",
    ]


class Run:
    """A started run, with its output in <run.dir>.out."""

    def __init__(
        self,
        run_dir,
        *arguments,
        size=2,
        script=("broken.py", "none", 0, 0),
        port=None,
        **variables,
    ):
        line = command(size, *arguments, f"run.dir={run_dir}")
        at = line.index(str(ROOT / "engine/launch.py"))
        line[at : at + 1] = [str(ROOT / "tests/faults" / script[0]), *map(str, script[1:])]
        self.port = port or line[line.index("--master_port") + 1]
        line[line.index("--master_port") + 1] = self.port
        self.run_dir = Path(run_dir)
        self.path = Path(f"{run_dir}.out")
        self.size = size
        self.started = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            self.process = subprocess.Popen(
                line,
                cwd=ROOT,
                env={**environment(), **variables},
                start_new_session=True,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def out(self):
        return self.path.read_text(errors="replace")

    def ranks(self):
        """Return the process ids by rank, once all ranks have started."""
        found = []
        while len(found) < self.size and self.process.poll() is None:
            found = ranks_below(self.process.pid)
            time.sleep(0.02)
        return found

    def wait(self):
        return self.process.wait(LIMIT_S)

    def remaining(self):
        """Return the process ids of this run that still exist."""
        table = subprocess.run(
            ["ps", "-eo", "pid,sid,stat"], text=True, capture_output=True
        ).stdout.splitlines()[1:]
        return [
            int(pid)
            for pid, sid, stat in map(str.split, table)
            if int(sid) == self.process.pid and stat[0] != "Z"
        ]


def ranks_below(pid):
    """Return the process ids of the ranks that a deepspeed command has started, by rank."""
    found = subprocess.run(
        ["ps", "-eo", "pid,ppid,args"], text=True, capture_output=True
    ).stdout.splitlines()[1:]
    table = [
        (int(p), int(parent), args) for p, parent, args in (line.split(None, 2) for line in found)
    ]
    launchers = {p for p, parent, _ in table if parent == pid}
    mine = [
        (args, p) for p, parent, args in table if parent in launchers and "--local_rank" in args
    ]
    return [
        p
        for _, p in sorted(
            mine, key=lambda row: int(re.search(r"--local_rank[= ](\d+)", row[0])[1])
        )
    ]


def listening():
    """Return the TCP ports of this machine that are in use by a listener."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {int(fields[1].rpartition(":")[2], 16) for fields in lines if fields[3] == "0A"}


def exit_time(run, rank):
    """Wait until the rank kills itself, and return the seconds until all ranks have ended."""
    pids = run.ranks()
    while alive(pids[rank]):
        assert run.process.poll() is None or not alive(pids[rank]), run.out[-2000:]
        time.sleep(0.01)
    died = time.monotonic()
    while any(map(alive, pids)) and time.monotonic() - died < 60:
        time.sleep(0.01)
    return time.monotonic() - died


def restart_time(run_dir, *arguments, port=None, **variables):
    """Start again at the same port for one step, and return the seconds until it has ended.

    They include the first step and its save. The run must succeed.
    """
    run = Run(
        run_dir,
        "--resume",
        "auto",
        *arguments,
        f"train.steps={newest_step(run_dir) + 1}",
        port=port,
        **variables,
    )
    assert run.wait() == 0, run.out[-3000:]
    return time.monotonic() - run.started


def real_deaths(folder, num_trials):
    """SIGKILL one rank in each part of a step, in a load and in a save of a real run."""
    settings = [*small_run(folder), "checkpoint.every_steps=2"]
    assert Run(f"{folder}/base", *settings, "train.steps=2").wait() == 0
    leaving, starting = [], []
    for trial in range(num_trials):
        run_dir, place, rank = (
            Path(folder) / f"trial{trial}",
            PLACES[trial % len(PLACES)],
            trial // len(PLACES) % 2,
        )
        shutil.copytree(f"{folder}/base", run_dir)
        run = Run(
            run_dir,
            "--resume",
            "auto",
            *settings,
            "train.steps=100000",
            script=("broken.py", place, rank, 2),
        )
        leaving.append(exit_time(run, rank))
        assert run.wait() != 0
        starting.append(restart_time(run_dir, *settings))
        shutil.rmtree(run_dir)
    return {
        "trials": num_trials,
        "survivor_gone_within_5_s": sum(t <= 5 for t in leaving),
        "slowest_s": round(max(leaving), 2),
        "first_step_of_the_next_start_within_60_s": sum(t <= 60 for t in starting),
        "slowest_start_s": round(max(starting), 1),
    }


STARTS = ("build", "data", "bind", "rendezvous", "index")


def interrupted_starts(folder, num_trials):
    """SIGKILL one rank during a start.

    It dies while a block is compiled (torch.compile runs g++), while the decoder starts, just after
    the watchdog's or the process group's store was bound, or while worker processes index shards.
    No process of the run, nothing in /dev/shm and no open descriptor may remain, and the next
    start, at the same port and with the same caches, must train.
    """
    starting, clean = [], 0
    for trial in range(num_trials):
        # Each trial has its own index and caches.
        base = Path(folder) / f"trial{trial}"
        place, rank = (
            STARTS[trial % len(STARTS)],
            trial // len(STARTS) % 2 if trial % len(STARTS) in (0, 1) else 0,
        )
        settings = small_run(base)
        if place == "build":
            settings.append("train.compile=true")
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": str(base / "inductor"),
            "TORCH_EXTENSIONS_DIR": str(base / "extensions"),
        }
        before = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd")), listening()
        run = Run(
            base / "run",
            "--resume",
            "auto",
            *settings,
            "train.steps=100000",
            script=("broken.py", place, rank, 0),
            **caches,
        )
        exit_time(run, rank)
        assert run.wait() != 0, place
        until = time.monotonic() + 10
        while run.remaining() and time.monotonic() < until:
            time.sleep(0.1)
        left, port = run.remaining(), run.port
        starting.append(restart_time(base / "run", *settings, port=port, **caches))
        after = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd")), listening()
        clean += (
            not left
            and after[0] <= before[0]
            and after[1] == before[1]
            and int(port) not in after[2]
        )
        shutil.rmtree(base)
    return {
        "trials": num_trials,
        "next_start_trains_within_60_s": sum(t <= 60 for t in starting),
        "slowest_start_s": round(max(starting), 1),
        "no_process_shared_memory_descriptor_or_port_left": clean,
    }


def entries(run_dir):
    """Return {run position: index entry} of the samples that all ranks have trained on."""
    lines = [
        json.loads(line)
        for path in Path(run_dir).glob("samples-rank*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return dict(pair for line in lines for pair in line)


def real_world_sizes(folder, paths=([1, 2], [2, 1], [2, 1, 2], [4, 2])):
    """Resume with another number of ranks under ZeRO-3 in fp32.

    1 -> 2, 2 -> 1, 2 -> 1 -> 2 and 4 -> 2. Compares the samples, the whole state after each load,
    and the losses of 50 steps.
    """
    settings, found = [*small_run(folder), "train.global_batch=8", "checkpoint.every_steps=10"], {}
    for path in paths:
        run_dir = Path(folder) / "-".join(map(str, path))
        same = [*settings, f"train.micro_batch={8 // max(path)}"]
        golden = Path(folder) / f"golden{path[0]}-{max(path)}"
        if not golden.exists():
            assert Run(golden, *same, "train.steps=60", size=path[0]).wait() == 0
        loads = 0
        for size, steps in zip(path, [10, 30, 60] if len(path) == 3 else [10, 60], strict=True):
            before, expected = checkpoint_reader.newest(run_dir / "checkpoints"), None
            # Read before the run, which may remove this checkpoint.
            if before is not None:
                reader = checkpoint_reader.Reader(before)
                saved_digest = digest(reader.manifest["shapes"], reader.full)
                expected = f"state {saved_digest} after loading {before}\n"
            run = Run(run_dir, "--resume", "auto", *same, f"train.steps={steps}", size=size)
            assert run.wait() == 0, run.out[-3000:]
            loads += expected is not None and expected in run.out
        ours, theirs = log_rows(run_dir), log_rows(golden)
        losses = [
            (float.fromhex(a[1]), float.fromhex(b[1])) for a, b in zip(ours, theirs, strict=True)
        ]
        found["->".join(map(str, path))] = {
            "samples_in_order": entries(run_dir) == entries(golden)
            and len(ours) == 60
            and sorted(entries(golden)) == list(range(480)),
            "loads": len(path) - 1,
            "bitwise_loads": loads,
            "first_loss_bitwise": ours[10][1] == theirs[10][1],
            "bitwise_to_the_end": [row[1::2] for row in ours] == [row[1::2] for row in theirs],
            "worst_relative": max(abs(a - b) / abs(b) for a, b in losses),
        }
    return found


def nonfinite(folder, num_trials, precisions=("fp32", "bf16")):
    """Inject NaN, inf and -inf on one rank in every second step from the first to the last.

    The value is in a pixel, a latent, the condition, the loss, one element of a gradient, or a
    moment. The steps are divided equally among the precisions. No bit of masters, moments and
    average may change, both ranks must skip, the samples must be named, and every step in between
    must be applied.
    """
    settings = [*small_run(folder), "guard.max_skips=1", "checkpoint.every_steps=1000"]
    count = {
        "injections": 0,
        "every_bit_unchanged_on_both_ranks": 0,
        "samples_named": 0,
        "good_steps_between": 0,
        "good_steps_that_counted": 0,
    }
    for precision in precisions:
        number = num_trials // len(precisions)
        injected, report = injections(number), f"{folder}/report-{precision}"
        run = Run(
            f"{folder}/{precision}",
            *settings,
            f"precision={precision}",
            f"train.steps={2 * number - 1}",
            script=("nonfinite.py", report, number),
        )
        assert run.wait() == 0, run.out[-3000:]
        reports = [json.loads(Path(f"{report}-rank{r}.json").read_text()) for r in range(2)]
        skipped = {
            int(s): (int(a), int(b), rest)
            for s, a, b, rest in re.findall(
                r"step (\d+) skipped on all ranks.*samples (\d+) to (\d+)(.*)", run.out
            )
        }
        for step in range(1, 2 * number):
            same = [
                r["hashes"][step] == r["hashes"][step - 1] and not r["applied"][step - 1]
                for r in reports
            ]
            changed = [
                r["hashes"][step] != r["hashes"][step - 1] and r["applied"][step - 1]
                for r in reports
            ]
            if step not in injected:
                count["good_steps_between"] += 1
                count["good_steps_that_counted"] += all(changed) and step not in skipped
                continue
            first, last, rest = skipped.get(step, (0, 0, ""))
            named = (first, last) == (4 * step - 4, 4 * step - 1)
            if injected[step][0] in ("pixel", "latent", "embedding"):
                bad = [int(n) for n in re.findall(r"\d+", rest)]
                named &= bool(bad) and all(first <= n <= last for n in bad)
            count["injections"] += 1
            count["every_bit_unchanged_on_both_ranks"] += all(same)
            count["samples_named"] += named
        assert rows(f"{folder}/{precision}/log.jsonl")[-1]["skipped_steps"] == number
    return count
