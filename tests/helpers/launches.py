"""Start runs in tests, with DeepSpeed's launcher or without, and read what they leave."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from forked_ranks import Rank, start_server

from iomm.engine.config_parser import layered
from iomm.engine.parallel.cpu_ranks import free_port
from iomm.engine.resilience import checkpoint_reader

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240
# Config for tests of the engine, with no VAE, no alignment and one rank.
PIXELS = str(ROOT / "tests/helpers/pixels.yaml")
# Just-in-time builds could leave a lock in the default folder.
BUILDS = Path(tempfile.mkdtemp(prefix="iomm-test-"))


def command(ranks, *arguments):
    """Return the deepspeed command line that starts engine/launch.py.

    Here and below, a later setting of a key replaces an earlier one.
    """
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        str(ROOT / "engine/launch.py"),
        *layered(arguments),
    ]


def environment():
    """Return the environment of a run, which hides GPUs.

    Two ranks would need two, and losses are compared with those of a CPU.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(BUILDS),
    }


def launch(ranks, *arguments):
    """Run to the end, and return the completed process with its output as text.

    After LIMIT_S all of its processes are killed.
    """
    process = subprocess.Popen(
        command(ranks, *arguments),
        cwd=ROOT,
        env=environment(),
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, output)


def group_environment(ranks):
    """Return the environment of a new job without the rank."""
    return {
        **environment(),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


@functools.cache
def start_server_once():
    """Start the process that all ranks are forked from."""
    start_server({**environment(), "PYTHONPATH": str(ROOT)})


def start_ranks(ranks, script, *arguments, output):
    """Start ranks as any launcher would, but forked (forked_ranks.py), and return them.

    They write to the file at the path `output`.
    """
    start_server_once()
    shared = group_environment(ranks)
    return [
        Rank(
            str(script),
            tuple(layered(arguments)),
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            str(output),
        )
        for rank in range(ranks)
    ]


def start_processes(ranks, script, *arguments, output):
    """Do the same as start_ranks() with processes of their own; `output` is an open file."""
    shared = group_environment(ranks)
    return [
        subprocess.Popen(
            [sys.executable, str(script), *layered(arguments)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]


def finish(processes, limit_s=LIMIT_S):
    """Wait for all processes and return their exit codes.

    If one has not ended within limit_s, all are killed.
    """
    try:
        return [process.wait(limit_s) for process in processes]
    finally:
        for process in processes:
            process.kill()


def start(ranks, *arguments, script=ROOT / "engine/launch.py"):
    """Do the same as launch() with forked ranks and without DeepSpeed's launcher."""
    with tempfile.NamedTemporaryFile("r") as output:
        codes = finish(start_ranks(ranks, script, *arguments, output=output.name))
        return subprocess.CompletedProcess(arguments, max(codes, key=abs), output.read())


def wait_for_step(log, step, running):
    """Wait until `log` has the step; fail when running() is false or LIMIT_S has passed."""
    deadline = time.monotonic() + LIMIT_S
    while not any(row["step"] >= step for row in rows(log)):
        assert running() and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.02)


def launch_and_kill(ranks, log, after_step, *arguments):
    """Start a run and kill all of its processes once `log` has the step `after_step`."""
    process = subprocess.Popen(
        command(ranks, *arguments),
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_step(log, after_step, lambda: process.poll() is None)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def start_and_kill(ranks, log, after_step, *arguments):
    """Do the same as launch_and_kill() with forked ranks and without DeepSpeed's launcher."""
    processes = start_ranks(ranks, ROOT / "engine/launch.py", *arguments, output=os.devnull)
    wait_for_step(log, after_step, lambda: all(rank.poll() is None for rank in processes))
    for rank in processes:
        rank.kill()
    for rank in processes:
        rank.wait(LIMIT_S)


def rows(log):
    """Return the rows of a log.jsonl, without a line that is still being written."""
    found = []
    for line in Path(log).read_text().splitlines() if Path(log).exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def hashes(run_dir):
    """Return {name: {size, hash}} of the files of the newest checkpoint."""
    return checkpoint_reader.read_manifest(checkpoint_reader.newest(Path(run_dir) / "checkpoints"))[
        "files"
    ]
