"""Ranks on a CPU that rank 0 starts itself (train.cpu_ranks).

Used when DeepSpeed's launcher or the user started only one process. With the demo config, two ranks
of one thread train 1.6 times as fast as one rank of two threads, because the two threads wait for
each other after every small matrix product. launch.py imports this module before torch, so it must
not load torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Self

from iomm.config import InputError
from iomm.engine.cores import num_cores

if TYPE_CHECKING:
    from types import TracebackType

    from iomm.engine.config import TrainSection

# From linux/prctl.h.
PR_SET_PDEATHSIG = 1
# Environment variable with the process id of the rank 0 that started this rank.
RANK_0 = "IOMM_RANK_0"
# Fewest images per rank and step with cpu_ranks 0. In micro-batches of 4, forward and backward of
# the demo take 1.8 times the CPU time per image that they take in micro-batches of 16.
LEAST_IMAGES = 4
POLL_S = 0.25
# Time between a peer's death and rank 0's exit. Longer than the watchdog's, which names the rank.
GRACE_S = 5.0
# Time that peers get to exit after a successful run.
LEAVE_S = 10.0
# Time that peers get after a failed run, to write the reason into their logs.
FAILED_S = 2.0


def die_with_rank_0() -> None:
    """Make the kernel kill this process when the rank 0 that started it ends, for any reason.

    Does nothing in a process that rank 0 did not start.
    """
    parent = os.environ.pop(RANK_0, None)
    if parent is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Rank 0 ended before the call above.
    if os.getppid() != int(parent):
        signal.raise_signal(signal.SIGKILL)


def num_ranks(train: TrainSection, device_type: str) -> int:
    """Return the number of ranks of this job, including this process.

    It is the largest number up to train.cpu_ranks that divides train.global_batch (into whole
    micro-batches, if train.micro_batch is set). With cpu_ranks 0 the limit is one rank per core
    with at least LEAST_IMAGES images each. On a GPU, or in a process that was launched with others,
    train.cpu_ranks is ignored and the number is 1.
    """
    if device_type != "cpu" or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return 1
    most = train.cpu_ranks or min(num_cores(), train.global_batch // LEAST_IMAGES)
    images = train.micro_batch if train.number_given else 1
    return max([n for n in range(1, most + 1) if train.global_batch % (n * images) == 0], default=1)


def num_threads(train: TrainSection, local_ranks: int) -> int:
    """Return the number of torch threads of each of the `local_ranks` ranks on this machine."""
    return train.threads or max(1, num_cores() // local_ranks)


class Peers:
    """Start ranks 1 ... size - 1 with this process's command line, and end them on exit.

    Use as a context on rank 0, entered before the ranks join. Peers are ordinary ranks: the
    watchdog covers them, and a stop signal that reaches any rank stops all. Until the watchdog
    runs, a peer that fails ends this process with exit code 70.
    """

    def __init__(self, size: int, threads: int) -> None:
        """`threads` is the number of torch threads per rank, set before a peer loads torch."""
        self.size = size
        self.threads = threads
        self.over = threading.Event()
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        """Start the peers.

        Raises:
            InputError: A peer cannot be started.
        """
        if self.size == 1:
            return self
        # All ranks are on this machine, so they need no port that another run could use, and not
        # the store that torchrun serves for the one rank that it started.
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE=str(self.size),
            LOCAL_SIZE=str(self.size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
        for rank in range(1, self.size):
            own = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": str(self.threads),
                RANK_0: str(os.getpid()),
            }
            try:
                # orig_argv also holds Python's own options, such as deepspeed's -u.
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *sys.orig_argv[1:]], env={**os.environ, **own}
                    )
                )
            except OSError as error:
                # Peers that were already started end with this process.
                raise InputError(
                    f"train.cpu_ranks: rank {rank} cannot be started: {error.strerror}. "
                    "Set a lower number"
                ) from None
        threading.Thread(target=self.watch, name="peers", daemon=True).start()
        return self

    def watch(self) -> None:
        """End this process when a peer has failed.

        Runs in a thread, because joining the ranks blocks for up to train.timeout_s.
        """
        # Imported here, when torch is already loaded.
        from iomm.engine.resilience.preemption import REQUEUE
        from iomm.engine.resilience.watchdog import DEAD

        while not self.over.wait(POLL_S):
            failed = [
                rank
                for rank, process in enumerate(self.processes, 1)
                if process.poll() not in (None, 0, REQUEUE)
            ]
            if failed and not self.over.wait(GRACE_S):
                # Not through logging: another thread may hold a handler's lock.
                print(
                    f"iomm: rank {failed[0]} ended with exit code "
                    f"{self.processes[failed[0] - 1].returncode}; see its log, then restart with "
                    "--resume auto",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(DEAD)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        self.over.set()
        until = time.monotonic() + (LEAVE_S if error is None else FAILED_S)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()


def free_port() -> int:
    """Return an unused TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
