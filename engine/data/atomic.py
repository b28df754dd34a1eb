"""Atomic writes of files and folders, and locks."""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from iomm.config import InputError

logger = logging.getLogger("iomm")

# What file systems without locks return: Lustre without -o flock, NFS without a lock daemon, where
# flock also needs a file that is open for writing, FUSE and object stores.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.ENOLCK, errno.EINVAL}


@contextmanager
def whole_file(
    path: str | os.PathLike, *, partial: str | os.PathLike | None = None, durable: bool = False
) -> Iterator[Path]:
    """Yield a path to write to, and move it to `path` when the block ends without an error.

    Readers see the old file or the new one. If the block raises, nothing changes. A killed process
    leaves at most the partial file behind.

    Args:
        path: the file to create or replace.
        partial: where to write, on the same file system. Default `.NAME.PID.partial` in the folder
            of `path`, with a hash in place of a long name.
        durable: flush the content to disk before the file takes its name.
    """
    path = Path(path)
    if partial is None:
        name = os.fsencode(path.name)
        short = path.name if len(name) <= 200 else hashlib.sha256(name).hexdigest()[:16]
        partial = path.with_name(f".{short}.{os.getpid()}.partial")
    partial = Path(partial)
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
def whole_folder(
    path: str | os.PathLike, marker: str, keep: Collection[str] = ()
) -> Iterator[Path]:
    """Yield an empty folder to write into, and move it to `path` when the block succeeds.

    An existing folder at `path` is replaced only if it is empty or contains a file named `marker`,
    which identifies it as written by this project. If the block raises, nothing changes. A killed
    process leaves at most a folder `.NAME.*` in the same parent, which is never read. `keep` names
    entries of an existing folder that the new one takes over.

    Raises:
        InputError: `path` exists and may not be replaced.
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
            for name in keep:
                if (retired / name).exists():
                    (retired / name).rename(path / name)
            shutil.rmtree(retired)
        else:
            fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def folder_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Hold the exclusive lock of an existing folder, waiting until it is free.

    The lock of a killed process is released by the kernel. On a file system without locks there is
    a warning instead of a lock.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(handle, folder)
        yield
    finally:
        os.close(handle)


def lock(
    handle: int,
    path: str | os.PathLike,
    *,
    inherited: bool = True,
    wait: bool = True,
) -> bool:
    """Lock an open file or folder exclusively, or warn where the file system has no locks.

    Args:
        handle: its descriptor; closing it releases the lock.
        path: its name in the warning.
        inherited: forked processes hold the lock as well.
        wait: wait until it is free.

    Returns:
        Whether it is locked.

    Raises:
        BlockingIOError: it is locked by another process, and `wait` is False.
    """
    function = fcntl.flock if inherited else fcntl.lockf
    try:
        function(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        # lockf may report a lock of another process as either.
        if error.errno in (errno.EACCES, errno.EAGAIN) and not wait:
            raise BlockingIOError(error.errno, error.strerror, os.fspath(path)) from None
        if error.errno not in NO_LOCKS:
            raise
        logger.warning(
            "warning: %s cannot be locked (%s): make sure that no other job writes to it",
            path,
            error.strerror,
        )
        return False
    return True


def check_replaceable(path: str | os.PathLike, marker: str) -> None:
    """Check that `path` is free to write: missing, an empty folder, or one with a file `marker`.

    Raises:
        InputError: `path` is a file, or a folder with other files in it.
    """
    path = Path(path).absolute()
    if path.exists() and not (
        path.is_dir() and (not any(path.iterdir()) or (path / marker).is_file())
    ):
        raise InputError(
            f"{path} exists and holds other files (no {marker}); choose another folder or remove it"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
