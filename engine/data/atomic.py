"""Files and folders that appear whole or not at all, and a lock on a folder."""

import fcntl
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from iomm.config import InputError


@contextmanager
def whole_file(path, *, partial=None, durable=False):
    """Yield a path to write to; what was written takes the place of `path` when the block ends without an error.

    Readers see the old file or the new one. If the block raises, nothing changes. A killed process leaves at most
    `partial` behind, by default `.NAME.PID.partial` in the same folder; it must be on the same file system. durable: the
    content is on the disk before the name is.
    """
    path = Path(path)
    partial = (
        path.with_name(f".{path.name}.{os.getpid()}.partial") if partial is None else Path(partial)
    )
    try:
        yield partial
        if durable:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path, marker):
    """Yields an empty folder beside `path` to write into; it takes the place of `path` when the block ends well.

    A folder already at `path` is replaced only if it is empty or holds a file called `marker`, by which it is known to
    be one of ours; anything else raises InputError. If the block raises, nothing changes. A killed process leaves at
    most a folder `.NAME.*` behind, which nobody reads.
    """
    path = Path(path).absolute()
    check_replaceable(path, marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield fresh
        fresh.chmod(0o777 & ~_umask())
        for file in fresh.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if path.exists():
            retired = fresh.with_name(f"{fresh.name}.old")
            path.rename(retired)
            fresh.rename(path)
            shutil.rmtree(retired)
        else:
            fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def folder_lock(folder):
    """Holds an existing folder's lock; others who ask for it wait. A killed process lets go of it."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def check_replaceable(path, marker):
    """Raises InputError if `path` exists and is neither an empty folder nor one with a file called `marker`."""
    path = Path(path).absolute()
    if path.exists() and not (
        path.is_dir() and (not any(path.iterdir()) or (path / marker).is_file())
    ):
        raise InputError(
            f"{path} exists and holds something else (it has no {marker}): give another folder or remove it"
        )


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
