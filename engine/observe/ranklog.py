"""Logging of one rank: handlers for the logger "iomm", and a log file per rank.

    run.dir/logs/rank-00000.txt   log lines, prints, warnings and tracebacks of rank 0, appended by
                                  every start of the run
    run.dir/logs/rank-00001.txt   the same for rank 1, and what libraries below Python (NCCL, CUDA)
                                  write to its stdout and stderr

Every line has a time stamp and reaches the kernel at once, so SIGKILL loses none. Rank 0 logs to
the terminal as well. The terminal shows only what ends the run from the other ranks: lines that
begin with "iomm:", and the traceback of an uncaught error.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import shlex
import socket
import sys
import time
import traceback
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

if TYPE_CHECKING:
    import io
    from collections.abc import Callable
    from types import TracebackType

# A handler drops a record when another thread has been writing for this long: a hanging disk must
# not keep the watchdog from reporting.
LOCK_TIMEOUT_S = 1.0


class BoundedHandler(logging.Handler):
    """A handler that neither raises on a failed write nor waits long for another thread."""

    def handle(self, record: logging.LogRecord) -> bool:
        """Emit one record, or drop it if the lock is not free within LOCK_TIMEOUT_S."""
        if not self.filter(record):
            return False
        try:
            # A captured warning ends with a newline, other records do not.
            self.write(self.format(record).removesuffix("\n") + "\n", record.created)
        except (OSError, ValueError):
            # A full disk or a closed terminal; logging would print a traceback for every line.
            pass
        except Exception:
            self.handleError(record)
        return True

    def write(self, text: str, created: float) -> None:
        """Write complete lines under the lock. created: their time, seconds since the epoch."""
        if self.lock.acquire(timeout=LOCK_TIMEOUT_S):
            try:
                self.write_locked(text, created)
            finally:
                self.lock.release()

    def write_locked(self, text: str, created: float) -> None:
        raise NotImplementedError


class FileHandler(BoundedHandler):
    """Writes records to an unbuffered binary file, each line with its time."""

    def __init__(self, file: io.FileIO) -> None:
        super().__init__()
        self.file = file

    def write_locked(self, text: str, created: float) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S ", time.localtime(created))
        lines = "".join(stamp + line for line in text.splitlines(keepends=True))
        self.file.write(lines.encode(errors="replace"))


class ConsoleHandler(BoundedHandler):
    """Writes records to a terminal, above the progress bar if there is one."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream

    def write_locked(self, text: str, created: float) -> None:
        # Clears bars on sys.stdout and sys.stderr and redraws them afterwards, as tqdm.write does.
        with tqdm.external_write_mode():
            self.stream.write(text)
            self.stream.flush()


class MirroredStream:
    """A text stream that passes text to a terminal, if any, and complete lines to the rank's file.

    It replaces sys.stdout and sys.stderr, for code that prints. write() never raises what the
    terminal or the file raise.
    """

    def __init__(
        self,
        terminal: TextIO | None,
        write_lines: Callable[[str], object],
        only_fatal: bool = False,
    ) -> None:
        """only_fatal: show only lines that begin with "iomm: " on the terminal."""
        self.terminal, self.write_lines, self.only_fatal = terminal, write_lines, only_fatal
        self.partial_line, self.is_fatal, self.lock = "", False, Lock()

    def write(self, text: str) -> int:
        # print() writes the end of the line in a separate call.
        self.is_fatal = text.startswith("iomm: ") or (self.is_fatal and text == "\n")
        if self.terminal is not None and (self.is_fatal or not self.only_fatal):
            with contextlib.suppress(OSError, ValueError):
                self.terminal.write(text)
        # Released before the file is written: a hanging disk would block all threads that print.
        locked = self.lock.acquire(timeout=LOCK_TIMEOUT_S)
        complete, newline, partial = (self.partial_line + text).rpartition("\n")
        # Only the last state of a progress bar is kept.
        self.partial_line = partial.rpartition("\r")[2]
        if locked:
            self.lock.release()
        if newline:
            lines = [line.rpartition("\r")[2] + "\n" for line in complete.split("\n")]
            self.write_lines("".join(lines))
        return len(text)

    def flush(self) -> None:
        if self.terminal is not None:
            with contextlib.suppress(OSError, ValueError):
                self.terminal.flush()

    # isatty, fileno, encoding ...
    def __getattr__(self, name: str) -> Any:
        return getattr(self.terminal if self.terminal is not None else sys.__stdout__, name)


class RankLog:
    """Installs the handlers of this rank. Use as a context, entered before the ranks join.

    A folder or disk that cannot be written costs the log, never the run. On exit everything is as
    it was before.
    """

    def __init__(self, run_dir: Path | str, rank: int | None = None) -> None:
        """rank: default $RANK, or 0 where it is not set."""
        self.rank = int(os.environ.get("RANK", 0)) if rank is None else rank
        self.path = Path(run_dir) / "logs" / f"rank-{self.rank:05d}.txt"

    def __enter__(self) -> RankLog:
        self.undo = contextlib.ExitStack()
        self.file, self.handler = None, None
        with contextlib.suppress(OSError):
            self.open_file()
        for name, terminal in (("iomm", sys.stdout), ("py.warnings", sys.stderr)):
            logger = logging.getLogger(name)
            self.undo.callback(restore, logger, logger.level, logger.propagate)
            logger.setLevel(logging.INFO)
            # Handlers of the root logger would show every line twice.
            logger.propagate = False
            # The terminal first: it must show a line even if the disk hangs.
            if not self.rank:
                self.add(logger, ConsoleHandler(terminal))
            if self.handler is not None:
                self.add(logger, self.handler)
        logging.captureWarnings(True)
        self.undo.callback(logging.captureWarnings, False)
        self.mirror_streams()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        # On the terminal the error is reported by the caller that catches it, or by Python.
        if error is not None:
            self.write("".join(traceback.format_exception(error)))
        self.undo.close()

    def open_file(self) -> None:
        """Open the rank's file, write its first line and let crashes below Python write to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.undo.enter_context(self.path.open("ab", buffering=0))
        self.handler = FileHandler(self.file)
        self.write(
            f"rank {self.rank} of {os.environ.get('WORLD_SIZE', 1)}, process {os.getpid()} on "
            f"{socket.gethostname()}: {shlex.join(sys.argv)}\n"
        )
        faulthandler.enable(self.file)
        self.undo.callback(faulthandler.disable)

    def add(self, logger: logging.Logger, handler: logging.Handler) -> None:
        """Add a handler to a logger until exit."""
        logger.addHandler(handler)
        self.undo.callback(logger.removeHandler, handler)

    def mirror_streams(self) -> None:
        """Copy prints into the file. Ranks above 0 also redirect file descriptors 1 and 2."""
        terminals = sys.stdout, sys.stderr
        if self.rank and self.file is not None:
            terminals = None, self.undo.enter_context(os.fdopen(os.dup(2), "w"))
            for descriptor in (1, 2):
                self.redirect(descriptor)
        for name, terminal in zip(("stdout", "stderr"), terminals, strict=True):
            self.undo.callback(setattr, sys, name, getattr(sys, name))
            setattr(sys, name, MirroredStream(terminal, self.write, only_fatal=self.rank != 0))

    def redirect(self, descriptor: int) -> None:
        """Let a file descriptor write into the rank's file until exit."""
        original = os.dup(descriptor)
        os.dup2(self.file.fileno(), descriptor)
        self.undo.callback(lambda: (os.dup2(original, descriptor), os.close(original)))

    def write(self, text: str) -> None:
        """Write complete lines to the rank's file, if it could be opened. Never raises OSError."""
        if self.handler is not None:
            with contextlib.suppress(OSError, ValueError):
                self.handler.write(text, time.time())


def restore(logger: logging.Logger, level: int, propagate: bool) -> None:
    """Set a logger's level and propagation back."""
    logger.setLevel(level)
    logger.propagate = propagate
