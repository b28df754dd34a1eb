"""Atomic writes of files: a file appears complete or not at all."""

import os
import signal
import subprocess
import sys

import pytest

from iomm.engine.data.atomic import whole_file


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
