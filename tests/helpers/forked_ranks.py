"""Ranks forked from a process that has imported the engine, so that a start does not import it.

Importing torch, DeepSpeed and transformers takes about 5 s of CPU time, which is most of a run of a
few steps. Everything else is as in a started process: arguments, environment, output, exit code.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

# What a run imports, at its start or later.
MODULES = (
    "iomm.engine.launch",
    "iomm.engine.observe.report",
    "deepspeed",
    "diffusers.models.autoencoders.autoencoder_kl",
    "tensorboard.summary.writer.event_file_writer",
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.internvl.modeling_internvl",
    "transformers.models.qwen2.modeling_qwen2",
)
ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")


def start_server(settings: dict[str, str]) -> None:
    """Start the process that ranks are forked from, with these environment variables."""
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        CONTEXT.set_forkserver_preload(list(MODULES))
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_script(
    script: str, arguments: Sequence[str], environment: dict[str, str], output: str
) -> None:
    """Run a script as `python SCRIPT ARGUMENTS` would, with all output appended to a file."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number in (1, 2):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [script, *arguments]
    # What cpu_ranks.Peers starts again.
    sys.orig_argv = [sys.executable, *sys.argv]
    os.chdir(ROOT)
    # A script's own folder comes first; pytest's additions are not a run's.
    tests = str(ROOT / "tests")
    sys.path[:] = [str(Path(script).parent), *(p for p in sys.path if not p.startswith(tests))]
    runpy.run_path(script, run_name="__main__")


class Rank:
    """A forked rank, with the methods of subprocess.Popen that tests use."""

    def __init__(self, script: str, arguments: Sequence[str], environment: dict, output: str):
        self.process = CONTEXT.Process(
            target=run_script, args=(script, arguments, environment, output)
        )
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutError(f"rank {self.pid} still runs after {timeout} s")
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
