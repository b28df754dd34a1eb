"""Every rank's words are in its file the moment they are said; the terminal shows rank 0, and what ends a run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from iomm.engine.observe.ranklog import RankLog, Tee

WORK = """
import ctypes, os, signal, sys, threading, warnings
from iomm.engine.observe.ranklog import RankLog
with RankLog(sys.argv[1], rank=int(sys.argv[2])):
    print("printed")
    print("on stderr", file=sys.stderr)
    warnings.warn("a warning")
    ctypes.CDLL(None).puts(b"below Python")
    ctypes.CDLL(None).fflush(None)
    sys.stderr.write("\\rbar 1/2\\rbar 2/2")
    print("iomm: rank 0 died; start again", file=sys.stderr, flush=True)
    if sys.argv[3] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[3] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if sys.argv[3] == "exit":
        os._exit(70)
    raise KeyError("nobody caught this")
"""


def work(run_dir, rank, end):
    # -u: as DeepSpeed starts its ranks; a killed process would keep what is buffered for a terminal that is a pipe
    done = subprocess.run(
        [sys.executable, "-u", "-c", WORK, str(run_dir), str(rank), end],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "WORLD_SIZE": "2"},
    )
    return done, (Path(run_dir) / f"logs/rank-0000{rank}.txt").read_text() if (
        Path(run_dir) / "logs"
    ).is_dir() else ""


@pytest.mark.parametrize("end", ["kill", "crash", "exit", "raise"])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_word_is_in_the_file_whatever_ends_the_rank(tmp_path, rank, end):
    done, said = work(tmp_path, rank, end)
    for words in ("printed", "on stderr", "a warning", "iomm: rank 0 died"):
        assert words in said
    assert re.match(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d rank {rank} of 2, process \d+ on ", said)
    assert "bar 1/2" not in said and ("below Python" in said) == (rank == 1)
    assert ("KeyError: 'nobody caught this'" in said) == (end == "raise")
    assert ("Segmentation fault" in said) == (end == "crash")
    terminal = done.stdout + done.stderr
    assert terminal.count("iomm: rank 0 died") == 1
    assert terminal.count("KeyError: 'nobody caught this'") == (end == "raise")
    for words in ("printed", "on stderr", "a warning", "below Python"):
        assert (words in terminal) == (rank == 0), words


def test_a_second_start_is_appended(tmp_path):
    for _ in range(2):
        _, said = work(tmp_path, 1, "exit")
    assert said.count("rank 1 of 2, process") == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_no_log_is_no_reason_to_stop(tmp_path, rank):
    (tmp_path / "logs").write_text("a file stands where the folder should")
    done, _ = work(tmp_path, rank, "exit")
    assert done.returncode == 70 and "iomm: rank 0 died" in done.stderr


def test_a_terminal_that_is_gone_and_a_disk_that_is_full_stop_nobody(tmp_path):
    class Gone:
        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise ValueError("I/O operation on closed file")

    lines = []
    tee = Tee(Gone(), lines.append)
    print("still here", file=tee, flush=True)
    assert lines == ["still here\n"] and tee.encoding == "utf-8"
    before = sys.stdout, sys.stderr
    with RankLog(tmp_path, rank=0) as log:
        log.file.close()
        print("said to nobody")
    assert (sys.stdout, sys.stderr) == before
