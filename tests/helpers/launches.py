"""How tests start runs: through DeepSpeed's launcher or without it, to the end or until a kill; and what runs leave."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from forked_ranks import Rank, start_server

from iomm.engine.parallel.cpu_ranks import free_port
from iomm.engine.resilience import checkpoint_reader

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 240
# A config of the engine's tests: no VAE, no alignment, one rank.
PIXELS = str(ROOT / "tests/helpers/pixels.yaml")
# Where just-in-time builds would leave a lock.
BUILDS = Path(tempfile.mkdtemp(prefix="iomm-test-"))


def command(ranks, *arguments):
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        str(ROOT / "engine/launch.py"),
        *arguments,
    ]


def environment():
    """Without a GPU, where there is one: two ranks want two, and losses are compared with a CPU's."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(BUILDS),
    }


def launch(ranks, *arguments):
    """Runs to the end -> completed process, output as text."""
    return subprocess.run(
        command(ranks, *arguments),
        cwd=ROOT,
        env=environment(),
        text=True,
        timeout=LIMIT_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def group_environment(ranks):
    """Environment of a new job, without the rank."""
    return {
        **environment(),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def start_ranks(ranks, script, *arguments, said):
    """The ranks alone, as any launcher would start them, writing to the open file `said` -> their processes."""
    shared = group_environment(ranks)
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=ROOT,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]


def finish(processes):
    """Waits for all -> their exit codes; what has not ended within LIMIT_S, or when one has not, is killed."""
    try:
        return [process.wait(LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()


def start(ranks, *arguments):
    """As launch(), without DeepSpeed's launcher, by ranks that are forked (forked_ranks.py)."""
    start_server(tuple(sorted({**environment(), "PYTHONPATH": str(ROOT)}.items())))
    with tempfile.NamedTemporaryFile("r") as output:
        shared = group_environment(ranks)
        codes = finish(
            [
                Rank(
                    str(ROOT / "engine/launch.py"),
                    arguments,
                    {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    output.name,
                )
                for rank in range(ranks)
            ]
        )
        return subprocess.CompletedProcess(arguments, max(codes, key=abs), output.read())


def launch_and_kill(ranks, log, after_step, *arguments):
    """Starts a run and kills all of its processes once `log` shows the step `after_step`."""
    process = subprocess.Popen(
        command(ranks, *arguments),
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + LIMIT_S
    while not any(row["step"] >= after_step for row in rows(log)):
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run ended before it could be killed"
        )
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rows(log):
    found = []
    for line in Path(log).read_text().splitlines() if Path(log).exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            # The line being written.
            pass
    return found


def hashes(run_dir):
    return checkpoint_reader.read_manifest(checkpoint_reader.newest(Path(run_dir) / "checkpoints"))[
        "files"
    ]
