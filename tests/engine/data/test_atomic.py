"""Atomic writes of files: a file appears complete or not at all."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from iomm.engine.data.atomic import folder_lock, lock, whole_file
from iomm.engine.data.index import build
from iomm.engine.resilience.checkpoint_writer import lock_run_dir
from iomm.engine.shapes.dataset import write_dataset


@pytest.mark.parametrize("durable", [False, True])
def test_file_appears_only_when_complete(tmp_path, durable):
    path = tmp_path / "a.json"
    for text in ("old", "new"):
        with whole_file(path, durable=durable) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text and os.listdir(tmp_path) == ["a.json"]


def test_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk"), whole_file(path) as partial:
        partial.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_kill_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    code = (
        "import os\n"
        "from iomm.engine.data.atomic import whole_file\n"
        f"with whole_file({str(path)!r}) as partial:\n"
        "    partial.write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    with whole_file(path, partial=tmp_path / "partial") as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and not (tmp_path / "partial").exists()


@pytest.mark.parametrize("number", ["ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EBADF", "ENOLCK"])
def test_a_file_system_without_locks_costs_a_warning(number, tmp_path, monkeypatch, caplog):
    def refuse(handle, operation):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, refuse)
    with folder_lock(tmp_path):
        pass
    lock_run_dir(tmp_path)
    dataset = write_dataset(tmp_path / "shapes", num_images=2, size_px=32)
    build(dataset, tmp_path / "index", progress=False, workers=1)
    assert len(caplog.messages) == 4
    assert all("cannot be locked" in message for message in caplog.messages)


def test_other_errors_of_a_lock_are_raised(tmp_path, monkeypatch):
    def fail(handle, operation):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="broken"), folder_lock(tmp_path):
        pass


def test_a_held_lock_is_no_missing_lock(tmp_path):
    with open(tmp_path / "a", "w") as one, open(tmp_path / "a", "w") as other:
        assert lock(one.fileno(), "a")
        with pytest.raises(BlockingIOError):
            lock(other.fileno(), "a", wait=False)
