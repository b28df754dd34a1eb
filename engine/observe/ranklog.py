"""One log file a rank: what each says, with the time, on disk at once; rank 0 says it on the terminal too.

    run.dir/logs/rank-00000.txt   prints, warnings and tracebacks of rank 0, of every start of the run
    run.dir/logs/rank-00001.txt   the same, and what libraries below Python (NCCL, CUDA) write to its stdout and stderr

Lines go to the kernel one by one: SIGKILL loses none. Of the other ranks the terminal shows what ends a run: lines that
begin with "iomm:", and the traceback of an error that nobody caught.
"""

import contextlib
import faulthandler
import os
import shlex
import socket
import sys
import time
import traceback
from pathlib import Path
from threading import Lock

# For another thread that is writing: a disk that hangs must not keep the watchdog from speaking.
PATIENCE_S = 1.0


class RankLog:
    """Use as a context, before the ranks have met. A folder or a disk that cannot be written costs the log, never the run."""

    def __init__(self, run_dir, rank=None):
        self.rank = int(os.environ.get("RANK", 0)) if rank is None else rank
        self.path = Path(run_dir) / "logs" / f"rank-{self.rank:05d}.txt"

    def __enter__(self):
        self.undo = contextlib.ExitStack()
        self.file = None
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.undo.enter_context(open(self.path, "ab", buffering=0))
            self.write(
                f"rank {self.rank} of {os.environ.get('WORLD_SIZE', 1)}, process {os.getpid()} on "
                f"{socket.gethostname()}: {shlex.join(sys.argv)}\n"
            )
            # A crash below Python.
            faulthandler.enable(self.file)
            self.undo.callback(faulthandler.disable)
        terminals = sys.stdout, sys.stderr
        if self.rank and self.file is not None:
            terminals = None, self.undo.enter_context(os.fdopen(os.dup(2), "w"))
            for number in (1, 2):
                self.redirect(number)
        for name, terminal in zip(("stdout", "stderr"), terminals):
            self.undo.callback(setattr, sys, name, getattr(sys, name))
            setattr(sys, name, Tee(terminal, self.write, only_ends=self.rank != 0))
        return self

    def redirect(self, number):
        """The file descriptor writes into the file, until undone."""
        before = os.dup(number)
        os.dup2(self.file.fileno(), number)
        self.undo.callback(lambda: (os.dup2(before, number), os.close(before)))

    def write(self, text):
        if self.file is not None:
            with contextlib.suppress(OSError, ValueError):
                stamp = time.strftime("%Y-%m-%d %H:%M:%S ")
                self.file.write(
                    "".join(stamp + line for line in text.splitlines(keepends=True)).encode(
                        errors="replace"
                    )
                )

    def __exit__(self, kind, error, _):
        # Who caught it, or Python itself, says it on the terminal.
        if error is not None:
            self.write("".join(traceback.format_exception(error)))
        self.undo.close()


class Tee:
    """A text stream to a terminal, or none, and in whole lines to write(text). Never raises what writing raises."""

    def __init__(self, terminal, write, only_ends=False):
        self.terminal, self.line, self.only_ends = terminal, write, only_ends
        self.rest, self.ends, self.lock = "", False, Lock()

    def write(self, text):
        # print() writes its end by itself
        self.ends = text.startswith("iomm: ") or (self.ends and text == "\n")
        if self.terminal is not None and (self.ends or not self.only_ends):
            with contextlib.suppress(OSError, ValueError):
                self.terminal.write(text)
        held = self.lock.acquire(timeout=PATIENCE_S)
        whole, newline, self.rest = (self.rest + text).rpartition("\n")
        # A progress bar draws over itself.
        self.rest = self.rest.rpartition("\r")[2]
        if newline:
            self.line("".join(line.rpartition("\r")[2] + "\n" for line in whole.split("\n")))
        if held:
            self.lock.release()
        return len(text)

    def flush(self):
        if self.terminal is not None:
            with contextlib.suppress(OSError, ValueError):
                self.terminal.flush()

    # isatty, fileno, encoding ...
    def __getattr__(self, name):
        return getattr(self.terminal if self.terminal is not None else sys.__stdout__, name)
