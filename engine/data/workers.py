"""Processes that validate shards, one per core, with limits on memory and time.

Image decoders are C code that reads untrusted input. A decoder that crashes, hangs or exhausts its
memory takes down its process and not the build. The sample that it was reading is rejected, and a
new process resumes after it. Processes are spawned and not forked, because a training process may
hold threads and a GPU. They exchange JSON and raw records, never pickles.
"""

import contextlib
import fcntl
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import iomm
from iomm.config import InputError
from iomm.engine.data.archive import LeftOut
from iomm.engine.data.validate import RECORD, Chunk, Rules, validate_shard

# Address space that a worker may add, plus 8 bytes per pixel of the largest image allowed.
MEMORY_BYTES = 512 << 20
# A photograph takes 0.01 s, the largest image allowed 1 s, a slow disk several seconds.
SAMPLE_LIMIT_S = 30.0
IDLE = -1
# The end of a process's stderr that is read, and the part of its last line that is reported.
MESSAGE_BYTES = 1 << 16
MESSAGE_CHARS = 300


class ShardResult(NamedTuple):
    """The result for a whole shard."""

    # Place of the shard in the list of paths.
    number: int
    # RECORD array of the good samples.
    records: np.ndarray
    # {shard, key, reason, detail} of each rejected sample.
    rejected: list[dict[str, str]]
    # Counts of remarks on the good samples.
    notes: dict[str, int]
    # See archive.LeftOut.
    left_out: dict[str, list]
    # The files of a folder, None for a tar.
    files: list[str] | None


def validate_shards(
    paths: list[Path],
    rules: Rules,
    num_workers: int,
    progress: Callable[[int], None] = lambda num_samples: None,
) -> Iterator[ShardResult]:
    """Yield the result for each shard, in the order in which they complete.

    If there are fewer shards than workers, each shard is validated in parts. Closing the generator
    ends the processes.

    Args:
        paths: the shards.
        rules: rules for good samples.
        num_workers: number of processes.
        progress: called with the number of samples that were validated since the last call.

    Raises:
        InputError: a shard ended two processes before its first sample.
    """
    num_parts = max(1, num_workers // max(1, len(paths)))
    parts = [
        _ShardPart(number, str(path), part, num_parts)
        for number, path in enumerate(paths)
        for part in range(num_parts)
    ]
    waiting = deque(parts)
    workers = []
    done = defaultdict(list)
    try:
        for _ in range(min(num_workers, len(parts))):
            workers.append(_Worker(rules))
            workers[-1].take(waiting.popleft())
        while any(worker.shard for worker in workers):
            for ready in wait(
                [worker.connection for worker in workers if worker.shard], timeout=1.0
            ):
                worker = next(worker for worker in workers if worker.connection is ready)
                shard = worker.shard
                try:
                    message = json.loads(ready.recv_bytes())
                    records = (
                        np.frombuffer(ready.recv_bytes(), dtype=RECORD)
                        if "num_validated" in message
                        else None
                    )
                except (EOFError, OSError):
                    workers[workers.index(worker)] = worker.replaced("crash")
                    continue
                if records is not None:
                    progress(len(records) + len(message["rejected"]))
                    shard.add(message, records)
                    continue
                worker.shard = None
                done[shard.number].append(shard)
                if len(done[shard.number]) == num_parts:
                    yield ShardResult(
                        shard.number, *_joined(done.pop(shard.number)), message["files"]
                    )
            for i, worker in enumerate(workers):
                if worker.is_stuck():
                    workers[i] = worker.replaced("timeout")
                if not workers[i].shard and waiting:
                    workers[i].take(waiting.popleft())
    finally:
        for worker in workers:
            worker.end()


class _ShardPart:
    """Progress of a shard, or of a part of one: what was found so far, and samples to skip."""

    def __init__(self, number: int, path: str, part: int, num_parts: int) -> None:
        self.number = number
        self.path = path
        self.part = part
        self.num_parts = num_parts
        self.num_validated = 0
        # {number of a sample that ended a process: (reason, detail)}.
        self.known_bad: dict[int, tuple[str, str]] = {}
        self.failed_before_first_sample = False
        self.chunks: list[Chunk] = []

    def add(self, message: dict[str, Any], records: np.ndarray) -> None:
        self.num_validated = message["num_validated"]
        self.chunks.append(
            Chunk(
                self.num_validated,
                records,
                message["rejected"],
                message["notes"],
                message["left_out"],
            )
        )

    def task(self) -> dict[str, Any]:
        """Return the message to a worker."""
        return {
            "path": self.path,
            "start": self.num_validated,
            "part": self.part,
            "num_parts": self.num_parts,
            "known_bad": list(self.known_bad.items()),
        }


def _joined(
    parts: list[_ShardPart],
) -> tuple[np.ndarray, list[dict[str, str]], dict[str, int], dict[str, list]]:
    """Return (records, rejected, notes, left_out) of a whole shard."""
    parts = sorted(parts, key=lambda part: part.part)
    chunks = sorted(
        (chunk for part in parts for chunk in part.chunks), key=lambda chunk: chunk.num_validated
    )
    notes, left_out, rejected, is_unreadable = Counter(), LeftOut(), [], False
    for chunk in chunks:
        notes.update(chunk.notes)
        left_out.update_from(chunk.left_out)
        for line in chunk.rejected:
            # Each part of a shard that cannot be read reports it.
            if not line["key"] and line["reason"] == "unreadable":
                if is_unreadable:
                    continue
                is_unreadable = True
            rejected.append(line)
    records = np.concatenate([chunk.records for chunk in chunks])
    return records, rejected, dict(notes), dict(left_out)


class _Worker:
    """A process and the shard that it validates.

    `at` is memory shared with the process: the number of its current sample and the time at which
    it started that sample.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.shard: _ShardPart | None = None
        # What end() returns.
        self.ended: tuple[str, str] | None = None
        self.connection, theirs = Pipe()
        memory = os.memfd_create("iomm-index")
        os.truncate(memory, mmap.PAGESIZE)
        self.at = np.frombuffer(mmap.mmap(memory, mmap.PAGESIZE), dtype=np.float64, count=2)
        root = str(Path(iomm.__file__).resolve().parent.parent)
        # An empty entry, as of PYTHONPATH=$PYTHONPATH:/x, is the current folder.
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        path = os.pathsep.join([root, *filter(None, given)])
        # What the process writes to stderr while it reads its current sample.
        self.stderr = os.memfd_create("iomm-index-stderr")
        fcntl.fcntl(self.stderr, fcntl.F_SETFL, os.O_APPEND)
        self.process = subprocess.Popen(
            [
                sys.executable,
                # Without it, -m would import modules from the user's current folder.
                "-P",
                "-m",
                __name__,
                str(theirs.fileno()),
                str(memory),
                json.dumps(asdict(rules)),
            ],
            pass_fds=(theirs.fileno(), memory),
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            stderr=self.stderr,
        )
        theirs.close()
        os.close(memory)

    def take(self, shard: _ShardPart) -> None:
        """Send a shard to the process."""
        self.shard = shard
        self.at[:] = IDLE, time.monotonic()
        # If the process has died, the next wait on its connection reports it.
        with contextlib.suppress(OSError):
            self.connection.send_bytes(json.dumps(shard.task()).encode())

    def is_stuck(self) -> bool:
        number, since_s = self.at
        return (
            self.shard is not None and number >= 0 and time.monotonic() > since_s + SAMPLE_LIMIT_S
        )

    def replaced(self, reason: str) -> "_Worker":
        """End this process and return a new one that resumes its shard.

        The sample that this process was reading is rejected as `reason`, "crash" or "timeout".

        Raises:
            InputError: the shard has ended two processes before its first sample.
        """
        number = int(self.at[0])
        shard = self.shard
        # A process that crashed exits within the grace period, and its exit code is informative.
        ended_by, message = self.end(grace_s=0.2)
        detail = (
            f"took over {SAMPLE_LIMIT_S:.0f} s"
            if reason == "timeout"
            else f"the decoder's process ended with {ended_by}{message and f': {message}'}"
        )
        if number >= 0:
            shard.known_bad[number] = reason, detail
        elif shard.failed_before_first_sample:
            raise InputError(f"{shard.path} cannot be listed ({detail}); exclude it from the data")
        else:
            shard.failed_before_first_sample = True
        fresh = _Worker(self.rules)
        fresh.take(shard)
        return fresh

    def end(self, grace_s: float = 0.0) -> tuple[str, str]:
        """End the process, and kill it after grace_s.

        Returns:
            Its signal or exit code, and the last line that it wrote to stderr.
        """
        self.connection.close()
        if self.ended is not None:
            return self.ended
        try:
            code = self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        size = os.fstat(self.stderr).st_size
        tail = os.pread(self.stderr, MESSAGE_BYTES, max(0, size - MESSAGE_BYTES))
        os.close(self.stderr)
        lines = tail.decode(errors="replace").split("\n")
        message = next((line.strip() for line in reversed(lines) if line.strip()), "")
        ended_by = f"signal {-code}" if code < 0 else f"exit code {code}"
        self.ended = ended_by, message[-MESSAGE_CHARS:]
        return self.ended


def main(connection: str, memory: str, rules: str) -> None:
    """Validate shards in a worker process until the parent closes the connection.

    The arguments are the file descriptors of the connection and of the shared memory, and the rules
    as JSON.
    """
    # Ctrl-C is handled by the parent, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Pillow warns of damaged EXIF data and the like, which are no reason to reject an image.
    warnings.simplefilter("ignore")
    rules = Rules(**json.loads(rules))
    connection = Connection(int(connection))
    at = np.frombuffer(mmap.mmap(int(memory), mmap.PAGESIZE), dtype=np.float64, count=2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(
        resource.RLIMIT_AS, (used + MEMORY_BYTES + 8 * rules.max_pixels, resource.RLIM_INFINITY)
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def begin(number: int) -> None:
        os.ftruncate(2, 0)
        at[:] = number, time.monotonic()

    while True:
        try:
            task = json.loads(connection.recv_bytes())
        except EOFError:
            return
        chunks = validate_shard(
            task.pop("path"), rules, known_bad=dict(task.pop("known_bad")), begin=begin, **task
        )
        while True:
            try:
                num_validated, records, rejected, notes, left_out = next(chunks)
            except StopIteration as done:
                at[0] = IDLE
                connection.send_bytes(json.dumps({"files": done.value}).encode())
                break
            message = {
                "num_validated": num_validated,
                "rejected": rejected,
                "notes": notes,
                "left_out": left_out,
            }
            connection.send_bytes(json.dumps(message).encode())
            connection.send_bytes(records.tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
