"""Ranks that rank 0 starts train like launched ranks, and none outlives the run."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from launches import LIMIT_S, PIXELS, ROOT, rows, start, start_processes

from iomm.engine.config import TrainSection, differences, load_config
from iomm.engine.launch import main
from iomm.engine.parallel import cpu_ranks
from iomm.engine.resilience import checkpoint_reader
from iomm.engine.resilience.preemption import REQUEUE
from iomm.engine.resilience.watchdog import DEAD, REFUSED, alive
from iomm.engine.shapes.dataset import write_dataset


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_dataset(folder, num_images=72, size_px=32, seed=1, shard_size=24)
    return [
        "--config",
        PIXELS,
        f"data.shards={folder}",
        "data.size_px=32",
        "model.vae=pixel:4",
        "train.global_batch=8",
        "train.threads=1",
        "precision=fp32",
        "checkpoint.every_steps=2",
        "log.sample_images=0",
    ]


class Job:
    """A run of two ranks, of which one is started as DeepSpeed's launcher starts it.

    Its output is in <run_dir>.out.
    """

    def __init__(self, run_dir, *arguments):
        self.run_dir = run_dir
        self.path = Path(f"{run_dir}.out")
        with open(self.path, "w") as output:
            (self.rank_0,) = start_processes(
                1,
                ROOT / "engine/launch.py",
                f"run.dir={run_dir}",
                "train.cpu_ranks=2",
                *arguments,
                output=output,
            )
        self.wait_until(self.peers)
        (self.peer,) = self.peers()

    def peers(self):
        """Return the process ids of rank 1 whose parent is rank 0."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if (
                    parent == self.rank_0.pid
                    and b"\0RANK=1\0" in b"\0" + (path / "environ").read_bytes()
                ):
                    found.append(int(path.name))
            except OSError:
                # The process has ended.
                pass
        return found

    def wait_until(self, condition):
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.rank_0.poll() is None and time.monotonic() < deadline, self.out
            time.sleep(0.02)

    def wait_for_step(self, step):
        log = self.run_dir / "log.jsonl"
        self.wait_until(lambda: any(row["step"] >= step for row in rows(log)))

    def exit_code(self):
        """Return the exit code of rank 0 once both ranks have ended."""
        code, deadline = self.rank_0.wait(LIMIT_S), time.monotonic() + LIMIT_S
        while alive(self.peer):
            assert time.monotonic() < deadline, "the peer still runs after rank 0 has ended"
            time.sleep(0.02)
        return code

    @property
    def out(self):
        return self.path.read_text()


def test_peers_train_and_stop_like_launched_ranks(settings, tmp_path):
    """Losses equal those of launched ranks bit by bit, with Muon at stage 0.

    A dead peer ends the run. After a resume, SIGTERM stops both ranks.
    """
    launched = start(2, f"run.dir={tmp_path / 'launched'}", *settings, "train.steps=2")
    assert launched.returncode == 0, launched.stdout
    job = Job(tmp_path / "own", *settings, "train.steps=100000")
    job.wait_for_step(3)
    os.kill(job.peer, signal.SIGKILL)
    assert job.exit_code() == DEAD, job.out
    assert f"iomm: rank 1 ({socket.gethostname()}) died" in job.out, job.out
    own, expected = (rows(tmp_path / name / "log.jsonl") for name in ("own", "launched"))
    # The run with peers trained for more steps.
    for ours, theirs in zip(own, expected, strict=False):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    assert "72 samples" in job.out and "2 ranks on cpu, 1 thread each" in job.out
    assert job.out.count("step 1/") == 1
    assert "rank 1 of 2, process" in (tmp_path / "own/logs/rank-00001.txt").read_text()

    (tmp_path / "own/log.jsonl").unlink()
    job = Job(tmp_path / "own", "--resume", "auto", *settings, "train.steps=100000")
    assert b"OMP_NUM_THREADS=1" in Path(f"/proc/{job.peer}/environ").read_bytes().split(b"\0")
    job.wait_for_step(1)
    job.rank_0.send_signal(signal.SIGTERM)
    assert job.exit_code() == REQUEUE, job.out
    steps = rows(tmp_path / "own/log.jsonl")[-1]["step"]
    assert f"stopped by a signal; step {steps} is saved" in job.out and "resumed from" in job.out
    newest = checkpoint_reader.newest(tmp_path / "own/checkpoints")
    assert checkpoint_reader.step_of(newest) == steps


def test_ranks_end_together_before_they_have_joined(settings, tmp_path):
    """A rank 0 that waits for its peer ends, and so does a peer that still loads torch."""
    job = Job(tmp_path / "peer", *settings)
    os.kill(job.peer, signal.SIGKILL)
    assert job.exit_code() == DEAD, job.out
    assert "iomm: rank 1 ended with exit code -9" in job.out, job.out
    job = Job(tmp_path / "rank 0", *settings)
    job.rank_0.kill()
    assert job.exit_code() == -signal.SIGKILL


@pytest.fixture
def no_processes(monkeypatch):
    """Fail the test if it starts a process."""

    def popen(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(cpu_ranks.subprocess, "Popen", popen)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train.cpu_ranks=-1"], "train.cpu_ranks must be >= 0, got -1"),
        (["train.cpu_ranks=many"], "train.cpu_ranks must be a whole number, got 'many'"),
        (["train.cpu_ranks=2", "--stage", "finetune"], "give --init RUN"),
    ],
)
def test_input_errors_start_no_process(arguments, message, no_processes, capsys):
    assert main(arguments, start_peers=True) == REFUSED
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_dry_run_starts_no_process(no_processes, capsys):
    assert (
        main(["--dry-run", "2", "train.cpu_ranks=2", "data.shards=shapes"], start_peers=True) == 0
    )
    assert capsys.readouterr().err == ""


def test_peer_that_cannot_be_started_is_named(monkeypatch):
    def fails(*_, **__):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(cpu_ranks.subprocess, "Popen", fails)
    monkeypatch.setattr(os, "environ", {"RANK": "0"})
    with pytest.raises(
        cpu_ranks.InputError,
        match=r"train\.cpu_ranks: rank 1 cannot be started: Resource temporarily",
    ):
        cpu_ranks.Peers(3, 1).__enter__()


@pytest.mark.parametrize(
    "cpu_ranks_key, micro_batch, world_size, device, expected",
    [
        (1, None, None, "cpu", 1),
        (0, None, None, "cpu", 4),
        (0, None, "1", "cpu", 4),
        (3, None, None, "cpu", 3),
        (5, None, None, "cpu", 4),
        (4, 8, None, "cpu", 3),
        (3, "auto", None, "cpu", 3),
        (8, 24, None, "cpu", 1),
        (7, 9, None, "cpu", 1),
        (0, None, "2", "cpu", 1),
        (4, None, None, "cuda", 1),
    ],
)
def test_number_of_ranks(cpu_ranks_key, micro_batch, world_size, device, expected, monkeypatch):
    """With a global batch of 24 on 5 cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    train = TrainSection(cpu_ranks=cpu_ranks_key, micro_batch=micro_batch, global_batch=24)
    assert cpu_ranks.num_ranks(train, device) == expected
    small = replace(train, cpu_ranks=0, global_batch=3, micro_batch=None)
    assert cpu_ranks.num_ranks(small, "cpu") == 1


def test_cpu_ranks_does_not_import_torch():
    """launch.py imports it first, because OMP_NUM_THREADS is read when torch is loaded."""
    code = (
        "import sys, iomm.engine.parallel.cpu_ranks as ranks; ranks.die_with_rank_0(); "
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=LIMIT_S).returncode == 0


def test_cpu_ranks_may_change_on_resume():
    config = load_config("demo")
    assert not differences(config, load_config("demo", ["train.cpu_ranks=3"]))
    assert [
        config.train.cpu_ranks,
        load_config("demo-finetune").train.cpu_ranks,
        TrainSection().cpu_ranks,
    ] == [0, 0, 1]
