"""CPU ranks that rank 0 starts itself, where DeepSpeed's launcher, or the user, started only one (train.cpu_ranks).

With the demo config two ranks of one thread train 1.6 times as fast as one rank of two threads, which wait for each other
after every small matrix product. launch.py imports this module before torch, so it must not load torch.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from iomm.config import InputError

# Of linux/prctl.h
PR_SET_PDEATHSIG = 1
# Process id of the rank 0 that started this rank.
RANK_0 = "IOMM_RANK_0"
# Fewest images per rank and step with cpu_ranks 0. Forward and backward of the demo take 1.8 times the CPU time per image in
# micro-batches of 4 that they take in micro-batches of 16.
LEAST_IMAGES = 4
POLL_S = 0.25
# Between a peer's death and rank 0's; longer than the watchdog's, which names the rank.
GRACE_S = 5.0
# Time for peers to exit after a good run.
LEAVE_S = 10.0
# And after a failed one, to write the reason into their logs.
FAILED_S = 2.0


def die_with_rank_0() -> None:
    """Have the kernel kill this process when the rank 0 that started it ends, however it ends. Does nothing in other ranks."""
    parent = os.environ.pop(RANK_0, None)
    if parent is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # rank 0 ended before the line above
    if os.getppid() != int(parent):
        signal.raise_signal(signal.SIGKILL)


def num_ranks(train, device_type: str) -> int:
    """Return the number of ranks of this job, counting this process.

    It is the largest up to train.cpu_ranks that divides train.global_batch (into whole micro-batches, if train.micro_batch is
    set). 0 stands for one rank per core with at least LEAST_IMAGES images each. On a GPU, or in a process that was launched
    with others, train.cpu_ranks is ignored and the number is 1.
    """
    if device_type != "cpu" or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return 1
    most = train.cpu_ranks or min(num_cores(), train.global_batch // LEAST_IMAGES)
    images = train.micro_batch or 1
    return max([n for n in range(1, most + 1) if train.global_batch % (n * images) == 0], default=1)


def num_threads(train, local_ranks: int) -> int:
    """Return the number of torch threads of each of the `local_ranks` ranks on this machine."""
    return train.threads or max(1, num_cores() // local_ranks)


def num_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0))


class Peers:
    """Starts ranks 1 ... size - 1 with this process's command line on entry; on exit none of them is left.

    Use as a context on rank 0, entered before the ranks join. Peers are ordinary ranks: the watchdog covers them, and a
    request to stop that reaches any rank stops all. While the watchdog does not run yet, a peer that fails ends this process
    with exit code 70. Raises InputError when a peer cannot be started.
    """

    def __init__(self, size: int, threads: int):
        """threads: torch threads per rank, set in a peer's environment before it loads torch."""
        self.size, self.threads, self.over = size, threads, threading.Event()
        self.processes = []

    def __enter__(self):
        if self.size == 1:
            return self
        if "RANK" not in os.environ:
            os.environ.update(
                RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
            )
        os.environ.update(WORLD_SIZE=str(self.size), LOCAL_SIZE=str(self.size))
        for rank in range(1, self.size):
            own = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": str(self.threads),
                RANK_0: str(os.getpid()),
            }
            try:
                # orig_argv has Python's own options too, such as deepspeed's -u.
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *sys.orig_argv[1:]], env={**os.environ, **own}
                    )
                )
            except OSError as error:
                # peers already started end with this process
                raise InputError(
                    f"train.cpu_ranks: rank {rank} cannot be started: {error.strerror}; lower it"
                ) from None
        threading.Thread(target=self.look, name="peers", daemon=True).start()
        return self

    def look(self):
        """End this process when a peer has failed. Runs in a thread: joining the ranks blocks for up to train.timeout_s."""
        # now: torch is loaded
        from iomm.engine.resilience.preemption import REQUEUE
        from iomm.engine.resilience.watchdog import DEAD

        while not self.over.wait(POLL_S):
            failed = [
                rank
                for rank, process in enumerate(self.processes, 1)
                if process.poll() not in (None, 0, REQUEUE)
            ]
            if failed and not self.over.wait(GRACE_S):
                print(
                    f"iomm: rank {failed[0]} ended with exit code {self.processes[failed[0] - 1].returncode}, see its log; "
                    "start again with --resume auto",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(DEAD)

    def __exit__(self, kind, error, _):
        self.over.set()
        until = time.monotonic() + (LEAVE_S if error is None else FAILED_S)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
