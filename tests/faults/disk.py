"""Ranks without processes, and a disk that ends the process or fails at its k-th operation."""

import os
import threading
from multiprocessing import Pipe

import torch

from iomm.config import InputError
from iomm.engine import checkpoint


class Together:
    """Ranks as threads of one process: what on_first and all mean, without a network."""

    def __init__(self, size):
        self.barrier, self.values, self.result = threading.Barrier(size), [None] * size, None
        self.ranks = [self.Rank(self, rank, size) for rank in range(size)]

    class Rank:
        def __init__(self, group, rank, size):
            self.group, self.rank, self.size, self.first = group, rank, size, rank == 0

        def all(self, value):
            self.group.values[self.rank] = value
            self.group.barrier.wait(20)
            values = list(self.group.values)
            self.group.barrier.wait(20)
            return values

        def on_first(self, work):
            outcome = (None, None)
            if self.first:
                try:
                    outcome = (work(), None)
                except InputError as error:
                    outcome = (None, str(error))
            result, error = self.all(outcome)[0]
            if error is not None:
                raise InputError(error)
            return result

    def run(self, work):
        """[work(rank) of each], all at once."""
        results = [None] * len(self.ranks)

        def call(rank):
            results[rank.rank] = work(rank)
        threads = [threading.Thread(target=call, args=(rank,)) for rank in self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class Piped:
    """One of two ranks that are processes; the death of the other ends this one."""

    def __init__(self, rank, pipe):
        self.rank, self.size, self.first, self.pipe = rank, 2, rank == 0, pipe

    def all(self, value):
        try:
            self.pipe.send(value)
            other = self.pipe.recv()
        except (EOFError, OSError):
            os._exit(9)
        return [value, other] if self.first else [other, value]

    def on_first(self, work):
        return self.all(work() if self.first else None)[0]


def pieces(rank, step, numel=3000):
    """Tensors of one rank that tell the step they are of."""
    base = torch.arange(numel, dtype=torch.float32) + rank * numel
    return {"master/w": base * step, "exp_avg/w": base - step, "ema/w": base / step}


FACTS = {"shapes": {"w": [6000]}, "config": "", "ema": True}


def saver(run_dir, rank, **settings):
    return checkpoint.Saver(run_dir / "checkpoints", rank, **{"keep": 2, **settings})


def save_all(run_dir, step, size=2, **settings):
    """One save by all ranks -> what each says was committed."""
    def work(rank):
        one = saver(run_dir, rank, **settings)
        one.save(step, pieces(rank.rank, step), FACTS)
        return one.wait()
    return Together(size).run(work)


class File:
    """A file whose write, flush and close are operations too; a write that does not come to its end does half."""

    def __init__(self, file, step):
        self.file, self.step = file, step

    def write(self, part):
        self.step("write", lambda: (self.file.write(memoryview(part)[:len(part) // 2]), self.file.flush()))
        return self.file.write(part)

    def flush(self):
        self.step("flush")
        self.file.flush()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.step("close")
        self.file.close()


def instrument(step):
    """From now on every file operation of this process calls step(name, half) first. For forked children."""
    for name in ("mkdir", "rename", "fsync", "unlink", "rmdir", "open"):
        def counted(*args, real=getattr(os, name), name=name, **kwargs):
            step(name)
            return real(*args, **kwargs)
        setattr(os, name, counted)

    def counted_open(path, mode="r", **kwargs):
        step("open")
        file = open(path, mode, **kwargs)
        return File(file, step) if "x" in mode else file
    checkpoint.open = counted_open


def save_and_die(run_dir, step, dying_rank, at):
    """Two processes save; one of them ends at its operation number `at` -> ([operations each did], commit announced?)."""
    ends, tell = Pipe(), Pipe(duplex=False)
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            ends[1 - rank].close()
            tell[0].close()
            torch.set_num_threads(1)
            done = [0]

            def count(name, half=None, rank=rank, done=done):
                done[0] += 1
                if rank == dying_rank and done[0] == at:
                    if half:
                        half()
                    os._exit(7)
            announce = print

            def say(*args, announce=announce, **kwargs):
                tell[1].send("committed" if "committed" in args[0] else "alert")
            checkpoint.print = say
            instrument(count)
            saver(run_dir, Piped(rank, ends[rank]), background=False).save(step, pieces(rank, step), FACTS)
            tell[1].send((rank, done[0]))
            os._exit(0)
        children.append(pid)
    for end in (*ends, tell[1]):
        end.close()
    for pid in children:
        os.waitpid(pid, 0)
    counts, committed = [None, None], False
    while tell[0].poll():
        try:
            message = tell[0].recv()
        except EOFError:
            break
        if isinstance(message, tuple):
            counts[message[0]] = message[1]
        committed |= message == "committed"
    tell[0].close()
    return counts, committed
