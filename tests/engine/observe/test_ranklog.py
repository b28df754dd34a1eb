"""Every line of a rank is in its file at once; the terminal shows rank 0 and what ends the run."""

import io
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from tqdm import tqdm

from iomm.engine.observe import ranklog
from iomm.engine.observe.ranklog import MirroredStream, RankLog

WORK = """
import ctypes, logging, os, signal, sys, warnings
from iomm.engine.observe.ranklog import RankLog
with RankLog(sys.argv[1], rank=int(sys.argv[2])):
    print("printed")
    print("on stderr", file=sys.stderr)
    warnings.warn("a warning")
    logging.getLogger("iomm").info("logged\\nin two lines")
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
    raise KeyError("uncaught error")
"""


def work(run_dir, rank, end):
    # -u: as DeepSpeed starts its ranks. A killed process would lose what is buffered for a pipe.
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
def test_file_has_every_line_however_the_rank_ends(tmp_path, rank, end):
    done, output = work(tmp_path, rank, end)
    for fragment in ("printed", "on stderr", "a warning", "iomm: rank 0 died"):
        assert fragment in output
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert re.match(rf"{stamp}rank {rank} of 2, process \d+ on ", output)
    assert re.search(rf"^{stamp}logged\n{stamp}in two lines$", output, re.MULTILINE)
    assert re.search(rf"^{stamp}.*UserWarning: a warning$", output, re.MULTILINE)
    assert "bar 1/2" not in output and ("below Python" in output) == (rank == 1)
    assert ("KeyError: 'uncaught error'" in output) == (end == "raise")
    assert ("Segmentation fault" in output) == (end == "crash")
    terminal = done.stdout + done.stderr
    assert terminal.count("iomm: rank 0 died") == 1
    assert terminal.count("KeyError: 'uncaught error'") == (end == "raise")
    for fragment in ("printed", "on stderr", "a warning", "below Python", "logged\nin two lines"):
        assert (fragment in terminal) == (rank == 0), fragment
    assert ("logged" in done.stdout) == (rank == 0)


def test_log_lines_appear_above_the_progress_bar(tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with RankLog(tmp_path, rank=0), tqdm(total=2) as bar:
        logging.getLogger("iomm").info("a line")
        bar.update(2)
    assert re.search(r"0/2.*\r +\ra line\n\r *0%.*\r100%", terminal.getvalue())
    text = (tmp_path / "logs/rank-00000.txt").read_text()
    assert text.count("a line\n") == 1 and "0/2" not in text and "2/2" in text


def test_second_start_appends_to_the_file(tmp_path):
    for _ in range(2):
        _, output = work(tmp_path, 1, "exit")
    assert output.count("rank 1 of 2, process") == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_run_continues_without_a_log_folder(tmp_path, rank):
    (tmp_path / "logs").write_text("a file in place of the folder")
    done, _ = work(tmp_path, rank, "exit")
    assert done.returncode == 70 and "iomm: rank 0 died" in done.stderr
    assert ("logged" in done.stdout) == (rank == 0) and "Traceback" not in done.stderr


def test_closed_terminal_and_full_disk_raise_nothing(tmp_path, monkeypatch, capsys):
    class Gone:
        encoding = "utf-8"

        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise ValueError("I/O operation on closed file")

    lines = []
    stream = MirroredStream(Gone(), lines.append)
    print("still here", file=stream, flush=True)
    assert lines == ["still here\n"] and stream.encoding == "utf-8"
    before = sys.stdout, sys.stderr
    with RankLog(tmp_path, rank=0) as log:
        log.file.close()
        print("lost")
        logging.getLogger("iomm").info("on the terminal only")
        warnings.warn("shown", stacklevel=1)
    assert (sys.stdout, sys.stderr) == before
    output = capsys.readouterr()
    assert "on the terminal only" in output.out and "Traceback" not in output.err
    monkeypatch.setattr(sys, "stdout", Gone())
    with RankLog(tmp_path, rank=0):
        logging.getLogger("iomm").info("in the file only")
    assert "in the file only" in (tmp_path / "logs/rank-00000.txt").read_text()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_everything_is_undone_on_exit(tmp_path, rank):
    def state():
        loggers = [logging.getLogger(name) for name in ("iomm", "py.warnings")]
        return (
            sys.stdout,
            sys.stderr,
            warnings.showwarning,
            [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers],
        )

    before = state()
    for _ in range(2):
        with RankLog(tmp_path, rank=rank):
            logging.getLogger("iomm").info("a line")
            assert state() != before
        assert state() == before
    text = (tmp_path / f"logs/rank-0000{rank}.txt").read_text()
    assert text.count("a line") == 2


def test_hanging_disk_does_not_block_other_threads(tmp_path, monkeypatch, capsys):
    """While a thread hangs in a write, another one can print and log, as the watchdog does."""
    monkeypatch.setattr(ranklog, "LOCK_TIMEOUT_S", 0.05)
    hanging, released = threading.Event(), threading.Event()

    class Hanging:
        def write(self, data):
            hanging.set()
            released.wait(30)

    with RankLog(tmp_path, rank=0) as log:
        log.handler.file = Hanging()
        writer = threading.Thread(target=print, args=("stuck",))
        writer.start()
        assert hanging.wait(10)

        def report():
            print("iomm: no progress", file=sys.stderr)
            logging.getLogger("iomm").error("rank 1 hangs")

        watchdog = threading.Thread(target=report)
        watchdog.start()
        watchdog.join(10)
        finished = not watchdog.is_alive()
        released.set()
        writer.join()
    output = capsys.readouterr()
    assert finished and "iomm: no progress" in output.err and "rank 1 hangs" in output.out
