"""Processes that judge shards: as many as there are cores, each in limits of memory and time.

Image decoders are C code that reads what strangers wrote. A decoder that crashes, hangs or grows takes its process
down, not the build: the sample that it was at is rejected, and a new process goes on behind it. Processes are started
anew (no fork: a training process may hold threads and a GPU) and speak JSON and raw records, no pickles.
"""

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
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

import numpy as np

import iomm
from iomm.config import InputError
from iomm.engine.data.validate import RECORD, Rules, judge_shard

# Address space a worker may add, beside 8 bytes a pixel of the largest image allowed.
MEMORY_BYTES = 512 << 20
# A photograph takes 0.01 s, the largest image allowed 1 s, a slow disk some seconds.
SAMPLE_LIMIT_S = 30.0
IDLE = -1


def judge_shards(paths, rules, num_workers, progress=lambda num_samples: None):
    """Yields (number of the path, records, rejected, notes, files) of each shard, in the order in which they get done.

    Where there are fewer shards than workers, each is judged in parts. `progress` is told of samples as they are
    judged. Closing the generator ends the processes.
    """
    num_parts = max(1, num_workers // max(1, len(paths)))
    shards = [
        _Shard(number, str(path), part, num_parts)
        for number, path in enumerate(paths)
        for part in range(num_parts)
    ]
    waiting, workers, done = deque(shards), [], defaultdict(list)
    try:
        for _ in range(min(num_workers, len(shards))):
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
                        if "num_judged" in message
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
                    yield shard.number, *_joined(done.pop(shard.number)), message["files"]
            for i, worker in enumerate(workers):
                if worker.stuck():
                    workers[i] = worker.replaced("timeout")
                if not workers[i].shard and waiting:
                    workers[i].take(waiting.popleft())
    finally:
        for worker in workers:
            worker.end()


class _Shard:
    """A shard, or a part of one, on its way: how far it is, what was found, which samples not to look at again."""

    def __init__(self, number, path, part, num_parts):
        self.number, self.path, self.part, self.num_parts = number, path, part, num_parts
        self.num_judged, self.poison, self.was_listed_in_vain = 0, {}, False
        # of (num_judged, records, rejected, notes)
        self.chunks = []

    def add(self, message, records):
        self.num_judged = message["num_judged"]
        self.chunks.append((self.num_judged, records, message["rejected"], message["notes"]))

    def task(self):
        """What a worker is told."""
        return {
            "path": self.path,
            "start": self.num_judged,
            "part": self.part,
            "num_parts": self.num_parts,
            "poison": list(self.poison.items()),
        }


def _joined(parts):
    """(records, rejected, notes) of a whole shard."""
    parts = sorted(parts, key=lambda shard: shard.part)
    chunks = sorted(
        (chunk for shard in parts for chunk in shard.chunks), key=lambda chunk: chunk[0]
    )
    notes = Counter()
    for chunk in chunks:
        notes.update(chunk[3])
    return (
        np.concatenate([chunk[1] for chunk in chunks]),
        [line for chunk in chunks for line in chunk[2]],
        dict(notes),
    )


class _Worker:
    """A process and the shard that it is at. `at` is memory shared with it: sample number and since when."""

    def __init__(self, rules):
        self.rules, self.shard = rules, None
        self.connection, theirs = Pipe()
        memory = os.memfd_create("iomm-index")
        os.truncate(memory, mmap.PAGESIZE)
        self.at = np.frombuffer(mmap.mmap(memory, mmap.PAGESIZE), dtype=np.float64, count=2)
        root = str(Path(iomm.__file__).resolve().parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                __name__,
                str(theirs.fileno()),
                str(memory),
                json.dumps(asdict(rules)),
            ],
            pass_fds=(theirs.fileno(), memory),
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        os.close(memory)

    def take(self, shard):
        self.shard = shard
        self.at[:] = IDLE, time.monotonic()
        try:
            self.connection.send_bytes(json.dumps(shard.task()).encode())
        except OSError:
            # It is dead: the next wait says so.
            pass

    def stuck(self):
        number, since_s = self.at
        return (
            self.shard is not None and number >= 0 and time.monotonic() > since_s + SAMPLE_LIMIT_S
        )

    def replaced(self, reason):
        """Ends this process; a new one goes on with its shard, and does not look at the sample that ended this one. A
        shard that ends two processes before its first sample raises InputError.
        """
        number, shard = int(self.at[0]), self.shard
        # One that crashed is about to be gone: its own exit code says more.
        ended_by = self.end(grace_s=0.2)
        detail = (
            f"took over {SAMPLE_LIMIT_S:.0f} s"
            if reason == "timeout"
            else f"the decoder's process ended: {ended_by}"
        )
        if number >= 0:
            shard.poison[number] = reason, detail
        elif shard.was_listed_in_vain:
            raise InputError(f"{shard.path} cannot be listed ({detail}): take it out")
        else:
            shard.was_listed_in_vain = True
        fresh = _Worker(self.rules)
        fresh.take(shard)
        return fresh

    def end(self, grace_s=0.0):
        """Ends the process; says how it ended."""
        self.connection.close()
        try:
            code = self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def main(connection, memory, rules):
    """The worker process: takes shards until the parent is gone."""
    # Ctrl-C is the parent's: it ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # damaged EXIF and the like: no reason to reject
    warnings.simplefilter("ignore")
    rules = Rules(**json.loads(rules))
    connection = Connection(int(connection))
    at = np.frombuffer(mmap.mmap(int(memory), mmap.PAGESIZE), dtype=np.float64, count=2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(
        resource.RLIMIT_AS, (used + MEMORY_BYTES + 8 * rules.max_pixels, resource.RLIM_INFINITY)
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def begin(number):
        at[:] = number, time.monotonic()

    while True:
        try:
            task = json.loads(connection.recv_bytes())
        except EOFError:
            return
        chunks = judge_shard(
            task.pop("path"), rules, poison=dict(task.pop("poison")), begin=begin, **task
        )
        while True:
            try:
                num_judged, records, rejected, notes = next(chunks)
            except StopIteration as done:
                at[0] = IDLE
                connection.send_bytes(json.dumps({"files": done.value}).encode())
                break
            message = {"num_judged": num_judged, "rejected": rejected, "notes": notes}
            connection.send_bytes(json.dumps(message).encode())
            connection.send_bytes(records.tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
