"""Checkpoints: written beside and behind training, verified by hash, committed by one rename. Only safetensors and JSON.

    checkpoints/step-00000100/rank-00000-of-00002.safetensors   "master/<parameter>", "exp_avg/...", "ema/..." : pieces;
                                                                "start/<parameter>": where in the flat parameter they begin
    checkpoints/step-00000100/MANIFEST.json                     facts of the run, size and SHA-256 of every file

The newest folder whose manifest and files verify is the one to resume from; there is no pointer file to go stale.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import struct
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

import torch

from iomm.config import InputError
from iomm.engine.resilience.checkpoint_reader import (
    damage,
    folder_name,
    read_manifest,
    seal,
    sha256,
    step_of,
    steps,
)

FORMAT = 2
DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}


class Saver:
    """Writes the checkpoints of one run, all ranks together. save() copies and returns; a thread writes, reads back, commits.

    `ranks` must have a process group of its own (Ranks.with_own_group): its collectives meet those of training otherwise. A save
    that fails (disk full, say) leaves the older checkpoints alone, prints one line on rank 0, and training goes on.
    """

    def __init__(self, root, ranks, *, keep, keep_every_steps=0, background=True):
        self.root, self.ranks, self.keep, self.permanent = Path(root), ranks, keep, keep_every_steps
        self.background, self.thread, self.copies, self.error = background, None, {}, None
        # What the last save committed, or None when it failed.
        self.folder = None
        self.stall_s = self.write_s = self.bytes = 0

    def save(self, step, tensors, facts):
        """Stores the tensors as they are now, whatever becomes of them after this call. Waits for the save before."""
        started = time.perf_counter()
        self.wait()
        copied = self.copy(tensors)
        facts = {"format": FORMAT, "step": step, "world_size": self.ranks.size, **facts}
        self.thread = threading.Thread(
            target=self.write, args=(facts, copied), name="checkpoint", daemon=True
        )
        self.thread.start()
        if not self.background:
            self.wait()
        self.stall_s = time.perf_counter() - started

    @property
    def waits(self):
        """Whether save() would wait for a disk: for its own work, or for the save before."""
        return not self.background or (self.thread is not None and self.thread.is_alive())

    def wait(self):
        """Returns the folder of the last save once it is committed, or None if it could not be."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.folder

    def copy(self, tensors):
        """Fills buffers that live as long as the run; pinned, so that a GPU copies while training goes on. Returns the
        event after which they are filled, or None.
        """
        if set(self.copies) != set(tensors):
            self.copies = {
                key: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
                for key, t in tensors.items()
            }
        for key, t in tensors.items():
            self.copies[key].copy_(t.detach(), non_blocking=True)
        if not any(t.is_cuda for t in tensors.values()):
            return None
        # On the training stream: a later step's kernels come after the copy, whenever that is done.
        return torch.cuda.current_stream().record_event()

    def write(self, facts, copied):
        """The thread. What can go wrong with a disk ends here, as one line; anything else reaches the next wait()."""
        try:
            started = time.perf_counter()
            if copied is not None:
                copied.synchronize()
            self.folder = None
            folder = self.ranks.on_first(lambda: begin(self.root, facts["step"]))
            if folder is None:
                return
            outcome = write_piece(Path(folder), self.ranks.rank, self.ranks.size, self.copies)
            # No rank comes here before it has read back what it wrote.
            outcomes = self.ranks.all(outcome)
            final = self.ranks.on_first(lambda: commit(self.root, Path(folder), facts, outcomes))
            self.folder = Path(final) if final else None
            self.write_s, self.bytes = (
                time.perf_counter() - started,
                sum(size for _, size, _, _ in outcomes),
            )
            if final and self.ranks.first:
                print(f"checkpoint of step {facts['step']} committed", flush=True)
                retain(self.root, self.folder, self.keep, self.permanent)
        except BaseException as error:
            self.error = error


def begin(root, step):
    """Makes the folder that nobody looks at, or says why not and returns None."""
    try:
        if not root.is_dir():
            root.mkdir(parents=True)
            sync(root.parent)
        folder = root / f".tmp-{step}-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        return str(folder)
    except OSError as error:
        alert(step, error)


def write_piece(folder, rank, size, tensors):
    """Writes one rank's file -> (name, bytes, SHA-256, what went wrong or None)."""
    name = f"rank-{rank:05d}-of-{size:05d}.safetensors"
    try:
        length, digest = write_safetensors(folder / name, tensors)
        if sha256(folder / name, from_disk=True) != digest:
            raise OSError(f"{name} reads back differently from what was written")
        return name, length, digest, None
    except OSError as error:
        return name, 0, "", str(error)


def commit(root, folder, facts, outcomes):
    """Seals the folder and renames it to its final name -> that name, or None with one line said. Work for rank 0."""
    final, trash = root / folder_name(facts["step"]), None
    try:
        failed = [f"{name}: {error}" for name, _, _, error in outcomes if error]
        if failed:
            raise OSError("; ".join(failed))
        files = {name: {"bytes": size, "sha256": digest} for name, size, digest, _ in outcomes}
        with open(folder / "MANIFEST.json", "xb") as file:
            file.write(seal({**facts, "files": files}))
            file.flush()
            os.fsync(file.fileno())
        sync(folder)
        if final.exists():
            # A run repeats itself, and it is there already.
            if not damage(final) and read_manifest(final)["files"] == files:
                remove(folder)
                return str(final)
            trash = to_trash(final)
        # The only commit point.
        os.rename(folder, final)
        sync(root)
        if trash is not None:
            remove(trash)
        return str(final)
    except OSError as error:
        if trash is not None and not final.exists():
            with suppress(OSError):
                os.rename(trash, final)
        remove(folder)
        alert(facts["step"], error)


def retain(root, newest, keep, permanent):
    """Removes all but the `keep` newest and those of every `permanent` steps; nothing, unless the newest reads back."""
    try:
        # Its files were read back before the commit.
        read_manifest(newest)
        ordinary = [p for p in steps(root) if not permanent or step_of(p) % permanent]
        # A removal that failed before.
        for trash in root.glob(".trash-*"):
            remove(trash)
        refused = []
        for old in ordinary[:-keep]:
            try:
                discard(old)
            except OSError as error:
                # one that stays does not make the others stay
                refused.append(str(error))
        if refused:
            raise OSError("; ".join(refused))
    except (OSError, InputError) as error:
        print(f"older checkpoints not removed: {error}; training goes on", flush=True)


def alert(step, error):
    print(f"checkpoint of step {step} not written: {error}; training goes on", flush=True)


def take(run_dir, patience_s=10.0):
    """Makes this process the only one that trains in run_dir, and sweeps what a killed one left.

    The kernel drops the lock with the process, however that ends: it cannot go stale. Ranks of a launcher that was
    killed need a moment to notice, hence the patience. Raises InputError when the other one stays.
    """
    handle = os.open(Path(run_dir) / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    until = time.monotonic() + patience_s
    while True:
        try:
            # Not flock: that lives on in forked workers.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > until:
                owner = os.pread(handle, 200, 0).decode(errors="replace")
                os.close(handle)
                raise InputError(
                    f"{run_dir} is being trained by {owner or 'another process'}: stop that, or choose "
                    "another run.dir"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            # a file system without locks
            print(
                f"{run_dir} could not be locked ({error}): see to it that one job alone trains there",
                flush=True,
            )
            break
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    sweep(Path(run_dir) / "checkpoints")


def sweep(root):
    """Removes what a killed save or a killed removal left. At the start only: later on it would be somebody's."""
    for pattern in (".tmp-*", ".trash-*"):
        for left in root.glob(pattern):
            remove(left)


def set_aside(root, step):
    """Renames the checkpoints of later steps to abandoned-step-..., which is none: from `step` on the run goes another way, and
    they would be taken for its newest. Work for rank 0; raises InputError.
    """
    later = [folder for folder in steps(root) if step_of(folder) > step]
    for folder in reversed(later):
        aside = folder.with_name(f"abandoned-{folder.name}")
        try:
            os.rename(folder, aside if not aside.exists() else f"{aside}-{uuid.uuid4().hex[:8]}")
        except OSError as error:
            raise InputError(
                f"{folder}, of a step after {step}, cannot be set aside: {error.strerror}"
            ) from error
    if later:
        sync(Path(root))
        print(
            f"checkpoints of steps {', '.join(str(step_of(folder)) for folder in later)} set aside as {root}/abandoned-step-*: "
            f"the run goes on from step {step}",
            flush=True,
        )


def discard(folder):
    remove(to_trash(folder))


def to_trash(folder):
    trash = folder.with_name(f".trash-{folder.name}-{uuid.uuid4().hex[:8]}")
    os.rename(folder, trash)
    return trash


def remove(folder):
    shutil.rmtree(folder, ignore_errors=True)


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_safetensors(path, tensors):
    """Writes and fsyncs a new file -> (bytes, SHA-256 of what was meant to be written).

    safetensors' own writer holds a second copy of everything, hashes nothing, and renames over whatever has the name.
    """
    header, offset = {}, 0
    for key, t in tensors.items():
        header[key] = {
            "dtype": DTYPES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.nbytes],
        }
        offset += t.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for part in (
            struct.pack("<Q", len(head)),
            head,
            *(t.reshape(-1).view(torch.uint8).numpy() for t in tensors.values()),
        ):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), digest.hexdigest()
