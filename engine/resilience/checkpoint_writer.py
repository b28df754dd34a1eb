"""Write checkpoints in the background, verify them by hash and commit them by one rename.

    checkpoints/step-00000100/rank-00000-of-00002.safetensors
        "master/<parameter>", "exp_avg/...", "ema/...": pieces of parameters
        "start/<parameter>": index of the piece's first value in the flattened parameter
    checkpoints/step-00000100/MANIFEST.json
        facts of the run, size and SHA-256 of every file

A run resumes from the newest folder whose manifest and files verify. There is no pointer file that
could become stale. Files are safetensors and JSON only.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import struct
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iomm.config import InputError
from iomm.engine.data.atomic import lock
from iomm.engine.resilience.checkpoint_reader import (
    damage,
    folder_name,
    read_manifest,
    seal,
    sha256,
    step_of,
    steps,
)
from iomm.engine.resilience.rank_group import RankGroup

logger = logging.getLogger("iomm")

FORMAT = 2
DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}


class WrittenFile(NamedTuple):
    """The outcome of writing one rank's file. `error` is None on success."""

    name: str
    num_bytes: int
    sha256: str
    error: str | None


class Saver:
    """Write the checkpoints of one run, on all ranks together.

    save() copies the tensors and returns. A thread writes, reads back and commits them. A save that
    fails (on a full disk, for example) leaves older checkpoints untouched and logs one line on rank
    0, and training continues.

    Attributes:
        folder: The checkpoint that the last save committed, or None if it failed.
        stall_s: Seconds that the last save() took.
        write_s: Seconds from the start of the last save to its commit.
        bytes: Size of the last checkpoint.
    """

    def __init__(
        self,
        root: Path | str,
        ranks: RankGroup,
        *,
        keep: int,
        keep_every_steps: int = 0,
        background: bool = True,
    ) -> None:
        """Prepare to save into a folder.

        Args:
            root: The folder of all checkpoints of the run.
            ranks: All ranks, with a process group that nothing else uses (Ranks.with_own_group).
                Otherwise its collectives could be matched with those of training.
            keep: Number of newest checkpoints to keep.
            keep_every_steps: Also keep the checkpoints of every so many steps. 0 keeps none.
            background: Let save() return before the checkpoint is committed.
        """
        self.root = Path(root)
        self.ranks = ranks
        self.keep = keep
        self.keep_every_steps = keep_every_steps
        self.background = background
        self.thread: threading.Thread | None = None
        self.copies: dict[str, Tensor] = {}
        self.error: BaseException | None = None
        self.folder: Path | None = None
        self.stall_s = 0.0
        self.write_s = 0.0
        self.bytes = 0

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Save the tensors' present values, which may be overwritten after this call.

        Waits for the previous save first.
        """
        started = time.perf_counter()
        self.wait()
        copied = self.copy_to_host(tensors)
        facts = {"format": FORMAT, "step": step, "world_size": self.ranks.size, **facts}
        self.thread = threading.Thread(
            target=self.write_and_commit, args=(facts, copied), name="checkpoint", daemon=True
        )
        self.thread.start()
        if not self.background:
            self.wait()
        self.stall_s = time.perf_counter() - started

    @property
    def would_block(self) -> bool:
        """Return whether save() would wait for a disk, for its own write or the previous one."""
        return not self.background or (self.thread is not None and self.thread.is_alive())

    def wait(self) -> Path | None:
        """Wait for the last save to finish, and return its folder, or None if it failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.folder

    def copy_to_host(self, tensors: dict[str, Tensor]) -> torch.cuda.Event | None:
        """Copy the tensors into buffers that are reused by later saves.

        The buffers of GPU tensors are pinned and the copy runs during training. Returns the event
        after which they are filled, or None without a GPU.
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
        # Recorded on the training stream, on which the kernels of later steps run after the copy.
        return torch.cuda.current_stream().record_event()

    def write_and_commit(self, facts: dict[str, Any], copied: torch.cuda.Event | None) -> None:
        """Write and commit the copies, in a thread.

        Disk errors are logged in one line. Any other exception is raised by the next wait().
        """
        try:
            started = time.perf_counter()
            if copied is not None:
                copied.synchronize()
            self.folder = None
            folder = self.ranks.on_first(lambda: make_staging_folder(self.root, facts["step"]))
            if folder is None:
                return
            outcome = write_piece(Path(folder), self.ranks.rank, self.ranks.size, self.copies)
            # A rank reaches this point only after it has read its file back.
            outcomes = self.ranks.all(outcome)
            final = self.ranks.on_first(lambda: commit(self.root, Path(folder), facts, outcomes))
            self.folder = Path(final) if final else None
            self.write_s = time.perf_counter() - started
            self.bytes = sum(file.num_bytes for file in outcomes)
            if final and self.ranks.first:
                logger.info("checkpoint of step %d committed", facts["step"])
                retain(self.root, self.folder, self.keep, self.keep_every_steps)
        except BaseException as error:
            self.error = error


def make_staging_folder(root: Path, step: int) -> str | None:
    """Create the folder that a checkpoint is written to before it is committed.

    Returns its path. On failure, logs the reason and returns None.
    """
    try:
        if not root.is_dir():
            root.mkdir(parents=True)
            sync(root.parent)
        folder = root / f".tmp-{step}-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        return str(folder)
    except OSError as error:
        log_failure(step, error)
        return None


def write_piece(folder: Path, rank: int, size: int, tensors: dict[str, Tensor]) -> WrittenFile:
    """Write one rank's file and verify it by reading it back from the disk."""
    name = f"rank-{rank:05d}-of-{size:05d}.safetensors"
    try:
        length, digest = write_safetensors(folder / name, tensors)
        if sha256(folder / name, from_disk=True) != digest:
            raise OSError(f"{name} reads back differently from what was written")
        return WrittenFile(name, length, digest, None)
    except OSError as error:
        return WrittenFile(name, 0, "", str(error))


def commit(
    root: Path, folder: Path, facts: dict[str, Any], outcomes: list[WrittenFile]
) -> str | None:
    """Write the manifest and rename the staging folder to its final name. Call it on rank 0.

    Args:
        root: The folder of all checkpoints.
        folder: The staging folder.
        facts: The manifest without its files.
        outcomes: The files of all ranks.

    Returns:
        The final path. On failure, logs the reason and returns None.
    """
    final, trash = root / folder_name(facts["step"]), None
    try:
        failed = [f"{file.name}: {file.error}" for file in outcomes if file.error]
        if failed:
            raise OSError("; ".join(failed))
        files = {file.name: {"bytes": file.num_bytes, "sha256": file.sha256} for file in outcomes}
        with open(folder / "MANIFEST.json", "xb") as file:
            file.write(seal({**facts, "files": files}))
            file.flush()
            os.fsync(file.fileno())
        sync(folder)
        if final.exists():
            # The run repeated the step with the same result, and the checkpoint already exists.
            if not damage(final) and read_manifest(final)["files"] == files:
                remove(folder)
                return str(final)
            trash = to_trash(final)
        # This rename is the only commit point.
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
        log_failure(facts["step"], error)
        return None


def retain(root: Path, newest: Path, keep: int, keep_every_steps: int) -> None:
    """Remove old checkpoints, unless the newest cannot be read back.

    Args:
        root: The folder of all checkpoints.
        newest: The newest checkpoint.
        keep: Number of newest checkpoints to keep.
        keep_every_steps: Also keep the checkpoints of every so many steps. 0 keeps none.
    """
    try:
        # The other files were read back before the commit.
        read_manifest(newest)
        ordinary = [p for p in steps(root) if not keep_every_steps or step_of(p) % keep_every_steps]
        # Left by removals that failed earlier.
        for trash in root.glob(".trash-*"):
            remove(trash)
        refused = []
        for old in ordinary[:-keep]:
            try:
                discard(old)
            except OSError as error:
                # The other checkpoints are still removed.
                refused.append(str(error))
        if refused:
            raise OSError("; ".join(refused))
    except (OSError, InputError) as error:
        logger.warning("old checkpoints not removed: %s. Training continues", error)


def log_failure(step: int, error: OSError) -> None:
    """Log that a checkpoint was not written."""
    logger.error("checkpoint of step %d not written: %s. Training continues", step, error)


def lock_run_dir(run_dir: Path | str, timeout_s: float = 10.0) -> None:
    """Lock run_dir for training by this process, and remove what a killed process left in it.

    The kernel releases the lock when the process ends for any reason, so it cannot become stale.
    Ranks whose launcher was killed need a moment to exit, hence the timeout.

    Raises:
        InputError: Another process still holds the lock after timeout_s.
    """
    handle = os.open(Path(run_dir) / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    until = time.monotonic() + timeout_s
    while True:
        try:
            lock(handle, run_dir, inherited=False, wait=False)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                owner = os.pread(handle, 200, 0).decode(errors="replace")
                os.close(handle)
                raise InputError(
                    f"{run_dir} is in use by {owner or 'another process'}: stop it, or choose "
                    "another run.dir"
                ) from None
            time.sleep(0.1)
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    sweep(Path(run_dir) / "checkpoints")


def sweep(root: Path) -> None:
    """Remove what a killed save or a killed removal left.

    Call it only at the start, before this process writes such folders itself.
    """
    for pattern in (".tmp-*", ".trash-*"):
        for left in root.glob(pattern):
            remove(left)


def set_aside(root: Path | str, step: int) -> None:
    """Rename the checkpoints of later steps to abandoned-step-... Call it on rank 0.

    A run that resumes at `step` diverges from them, and --resume auto must not take them for its
    newest checkpoint.

    Raises:
        InputError: A checkpoint cannot be renamed.
    """
    later = [folder for folder in steps(root) if step_of(folder) > step]
    for folder in reversed(later):
        aside = folder.with_name(f"abandoned-{folder.name}")
        try:
            os.rename(folder, aside if not aside.exists() else f"{aside}-{uuid.uuid4().hex[:8]}")
        except OSError as error:
            raise InputError(
                f"{folder} is of a step after {step} and cannot be renamed: {error.strerror}"
            ) from error
    if later:
        sync(Path(root))
        logger.info(
            "checkpoints of steps %s renamed to %s/abandoned-step-*; the run continues at step %d",
            ", ".join(str(step_of(folder)) for folder in later),
            root,
            step,
        )


def discard(folder: Path) -> None:
    """Remove a checkpoint.

    It is renamed first, because an interrupted removal would otherwise leave a damaged one.
    """
    remove(to_trash(folder))


def to_trash(folder: Path) -> Path:
    """Rename a checkpoint to a hidden name, and return the new path."""
    trash = folder.with_name(f".trash-{folder.name}-{uuid.uuid4().hex[:8]}")
    os.rename(folder, trash)
    return trash


def remove(folder: Path) -> None:
    """Remove a folder as far as possible."""
    shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a folder's entries to the disk, which makes renames in it durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Write and fsync a new file, and return (its size in bytes, SHA-256).

    The hash is computed from the data in memory.     safetensors' own writer holds a second copy of
    all data, computes no hash, and replaces an existing file.
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
