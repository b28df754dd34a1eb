"""Fault trials of checkpoints.

Processes die at their k-th file operation, files are damaged, and removals fail. Ranks are threads,
or two processes that communicate over a pipe.
"""

import errno
import logging
import os
import random
import shutil
import threading
from multiprocessing import Pipe
from pathlib import Path
from unittest.mock import patch

import torch

from iomm.config import InputError
from iomm.engine.resilience import checkpoint_reader, checkpoint_writer


class Together:
    """Run ranks as threads of one process, with on_first() and all() but without a network."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size)
        self.values = [None] * size
        self.ranks = [self.Rank(self, rank, size) for rank in range(size)]

    class Rank:
        def __init__(self, group, rank, size):
            self.group = group
            self.rank = rank
            self.size = size
            self.first = rank == 0

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
        """Return [work(rank) of each rank], run concurrently."""
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
    """One of two ranks that are processes. The death of the other ends this one."""

    def __init__(self, rank, pipe):
        self.rank = rank
        self.size = 2
        self.first = rank == 0
        self.pipe = pipe

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
    """Return tensors of one rank with values that depend on the step."""
    base = torch.arange(numel, dtype=torch.float32) + rank * numel
    return {"master/w": base * step, "exp_avg/w": base - step, "ema/w": base / step}


FACTS = {"shapes": {"w": [6000]}, "config": "", "ema": True}


def saver(run_dir, rank, **settings):
    return checkpoint_writer.Saver(Path(run_dir) / "checkpoints", rank, **{"keep": 2, **settings})


def save_all(run_dir, step, size=2, **settings):
    """Save once on all ranks, and return the committed folder of each."""

    def work(rank):
        one = saver(run_dir, rank, **settings)
        one.save(step, pieces(rank.rank, step), FACTS)
        return one.wait()

    return Together(size).run(work)


class File:
    """A file whose write, flush and close count as operations.

    A write during which the process dies writes half of its data.
    """

    def __init__(self, file, step):
        self.file, self.step = file, step

    def write(self, part):
        self.step(
            "write",
            lambda: (self.file.write(memoryview(part)[: len(part) // 2]), self.file.flush()),
        )
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
    """Make every file operation call step(name, half) first. For forked children only."""

    def counting(name, real):
        def counted(*args, **kwargs):
            step(name)
            return real(*args, **kwargs)

        return counted

    for name in ("mkdir", "rename", "fsync", "unlink", "rmdir", "open"):
        setattr(os, name, counting(name, getattr(os, name)))

    def counted_open(path, mode="r", **kwargs):
        step("open")
        file = open(path, mode, **kwargs)  # noqa: SIM115 (the caller closes it)
        return File(file, step) if "x" in mode else file

    checkpoint_writer.open = checkpoint_reader.open = counted_open


class Messages(logging.Handler):
    """Keep the messages of all records. Use as a context to attach it to the engine's logger."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("iomm").addHandler(self)
        return self

    def __exit__(self, *_):
        logging.getLogger("iomm").removeHandler(self)


class CommitReports(logging.Handler):
    """Send "committed" for the log line of a commit and "alert" for any other line."""

    def __init__(self, pipe):
        super().__init__()
        self.pipe = pipe

    def emit(self, record):
        self.pipe.send("committed" if "committed" in record.getMessage() else "alert")


def save_and_die(run_dir, step, dying_rank, at, **settings):
    """Save with two processes, one of which dies at its operation number `at`.

    Returns ([number of operations of each, None if it died], whether the commit was logged).
    """
    ends, reports = Pipe(), Pipe(duplex=False)
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            ends[1 - rank].close()
            reports[0].close()
            torch.set_num_threads(1)
            done = [0]

            def count(name, half=None, rank=rank, done=done):
                done[0] += 1
                if rank == dying_rank and done[0] == at:
                    if half:
                        half()
                    os._exit(7)

            logger = logging.getLogger("iomm")
            logger.handlers = [CommitReports(reports[1])]
            logger.propagate = False
            logger.setLevel(logging.INFO)
            instrument(count)
            saver(run_dir, Piped(rank, ends[rank]), background=False, **settings).save(
                step, pieces(rank, step), FACTS
            )
            reports[1].send((rank, done[0]))
            os._exit(0)
        children.append(pid)
    for end in (*ends, reports[1]):
        end.close()
    for pid in children:
        os.waitpid(pid, 0)
    counts, committed = [None, None], False
    while reports[0].poll():
        try:
            message = reports[0].recv()
        except EOFError:
            break
        if isinstance(message, tuple):
            counts[message[0]] = message[1]
        committed |= message == "committed"
    reports[0].close()
    return counts, committed


def newest_step(run_dir):
    """Return the step of the newest intact checkpoint, or 0."""
    folder = checkpoint_reader.newest(Path(run_dir) / "checkpoints")
    return 0 if folder is None else checkpoint_reader.step_of(folder)


def hidden(run_dir):
    """Return the names of hidden files, which a save or a removal creates and must remove."""
    return [p.name for p in (Path(run_dir) / "checkpoints").iterdir() if p.name.startswith(".")]


def intact(run_dir):
    """Return the folders of all intact checkpoints."""
    return [
        p
        for p in checkpoint_reader.steps(Path(run_dir) / "checkpoints")
        if checkpoint_reader.damage(p) is None
    ]


def crash_points(folder):
    """End one rank at its k-th file operation of a save, for every k and both ranks.

    The next start must find what was committed and at least two checkpoints, remove the rest, and
    save.
    """
    start, recovered = Path(folder) / "start", 0
    for step in (2, 4):
        save_all(start, step)
    shutil.copytree(start, Path(folder) / "count")
    counts, committed = save_and_die(Path(folder) / "count", 6, dying_rank=None, at=0)
    assert committed
    for rank, count in enumerate(counts):
        for at in range(1, count + 1):
            run_dir = Path(folder) / f"{rank}-{at}"
            shutil.copytree(start, run_dir)
            _, committed = save_and_die(run_dir, 6, rank, at)
            kept = (
                newest_step(run_dir) in ((6,) if committed else (4, 6))
                and len(intact(run_dir)) >= 2
            )
            checkpoint_writer.sweep(run_dir / "checkpoints")
            saved = save_all(run_dir, 8) == [run_dir / "checkpoints/step-00000008"] * 2
            recovered += (
                kept
                and saved
                and newest_step(run_dir) == 8
                and not hidden(run_dir)
                and len(intact(run_dir)) == 2
            )
            shutil.rmtree(run_dir)
    return {
        "crash_points": sum(counts),
        "of_rank_0": counts[0],
        "of_rank_1": counts[1],
        "recovered": recovered,
    }


def damages(folder, num_flips, seed=0):
    """Damage every file of the newer of two checkpoints.

    Files have single bits flipped, are truncated, have a hole, are missing, are of another step, or
    are a link. In a last case there is an extra file. `detected` counts damage that is logged
    before any file is opened as tensors, by one process or by two ranks that each hash a share.
    `fell_back` counts cases in which the older checkpoint is found.
    """
    for step in (2, 4):
        save_all(folder, step)
    root, rng = Path(folder) / "checkpoints", random.Random(seed)
    before, newest = root / "step-00000002", root / "step-00000004"
    count = {"cases": 0, "of_them_single_bits": 0, "detected": 0, "fell_back": 0}

    def check(together=True):
        with Messages() as log:
            if together:
                found = Together(2).run(lambda rank: checkpoint_reader.newest(root, rank))
            else:
                found = [checkpoint_reader.newest(root)] * 2
        count["cases"] += 1
        count["detected"] += len(log.messages) == 1 and newest.name in log.messages[0]
        count["fell_back"] += found == [before] * 2

    with patch.object(
        checkpoint_reader,
        "safe_open",
        side_effect=AssertionError("opened before all files are verified"),
    ):
        for file in sorted(newest.iterdir()):
            whole = file.read_bytes()
            for trial in range(num_flips):
                raw, bit = bytearray(whole), rng.randrange(8 * len(whole))
                raw[bit // 8] ^= 1 << bit % 8
                file.write_bytes(raw)
                check(together=trial % 30 == 0)
                count["of_them_single_bits"] += 1
            for cut in (0, len(whole) // 2, len(whole) - 1):
                file.write_bytes(whole[:cut])
                check()
            hole = min(4096, len(whole) // 2)
            file.write_bytes(whole[:100] + bytes(hole) + whole[100 + hole :])
            check()
            file.unlink()
            check()
            shutil.copy(before / file.name, file)
            check()
            file.unlink()
            file.symlink_to(before / file.name)
            check()
            file.unlink()
            file.write_bytes(whole)
        extra = newest / "rank-00002-of-00003.safetensors"
        extra.write_bytes(b"")
        check()
        extra.unlink()
    assert Together(2).run(lambda rank: checkpoint_reader.newest(root, rank)) == [newest] * 2
    return count


def retention(folder, num_saves, keep=3, permanent=10, seed=1):
    """Save often while removals fail, keeping 3 checkpoints and every tenth.

    A fifth of the removals and a tenth of the renames to trash are refused, and a tenth of the
    saves is killed. `sound_after_each` counts the saves after which all of this holds:

    - All checkpoints verify, and there are at least min(2, number of saves that were not killed). -
    The newest is of this save or, if it was killed, not older than before. - The disk holds no more
    than `keep`, the permanent ones, those whose removal was refused, and one for each kill in a
    row.
    """
    rng = random.Random(seed)
    failing, count = [True], [0]
    sound = most = killed = row = last = 0
    root, settings = Path(folder) / "checkpoints", {"keep": keep, "keep_every_steps": permanent}
    remove, rename, refused = shutil.rmtree, os.rename, set()

    def removing(path):
        if ".trash" in path.name and failing[0] and rng.random() < 0.2:
            refused.add(path.name)
            count[0] += 1
        else:
            remove(path, ignore_errors=True)

    def renaming(source, target):
        if ".trash" in str(target) and failing[0] and rng.random() < 0.1:
            refused.add(Path(source).name)
            count[0] += 1
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(source))
        rename(source, target)

    with patch.object(checkpoint_writer, "remove", removing), patch.object(os, "rename", renaming):
        for step in range(1, num_saves + 1):
            row = row + 1 if rng.random() < 0.1 else 0
            if row:
                dying = rng.randrange(2)
                counts, _ = save_and_die(
                    folder, step, dying, rng.randrange(1, (28, 11)[dying]), **settings
                )
                killed += None in counts
                # As the next start does.
                checkpoint_writer.sweep(root)
            else:
                save_all(folder, step, **settings)
            good = intact(folder)
            ordinary = [
                p.name
                for p in checkpoint_reader.steps(root)
                if checkpoint_reader.step_of(p) % permanent
            ]
            before, last = last, newest_step(folder)
            spare = {*ordinary[:-keep], *hidden(folder)}
            sound += (
                len(good) == len(checkpoint_reader.steps(root)) >= min(2, step - killed)
                and (before <= last if row else last == step)
                and len(spare - refused) <= row
            )
            most = max(most, len(ordinary) + len(hidden(folder)))
        failing[0] = False
        save_all(folder, num_saves + 1, **settings)
    steps = [checkpoint_reader.step_of(p) for p in intact(folder)]
    sound += len([s for s in steps if s % permanent]) == keep and not hidden(folder)
    return {
        "saves": num_saves + 1,
        "killed": killed,
        "refused": count[0],
        "sound_after_each": sound,
        "most_on_disk_beside_permanent_ones": most,
        "permanent_kept": len([s for s in steps if not s % permanent]),
    }
