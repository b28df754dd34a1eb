"""Scripts run from their own checkout, and no file in their folder hides an installed module."""

import os
import subprocess
import sys
from pathlib import Path

from iomm.checkout import enter

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import iomm
from iomm.checkout import enter
root = enter(__file__)
import sys
import kernels_of_another_package
assert kernels_of_another_package.MARK == "installed", "hidden by a file in the script's folder"
print(root, sys.path[0])
"""


def run(script, cwd, *path):
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
    )


def checkout(folder):
    """Return a script in a folder like a checkout, with a file that would hide a module."""
    (folder / "scripts" / "deep").mkdir(parents=True)
    (folder / "iomm").symlink_to(ROOT / "iomm")
    script = folder / "scripts" / "deep" / "script.py"
    script.write_text(SCRIPT)
    script.with_name("kernels_of_another_package.py").write_text("MARK = 'in the script folder'\n")
    return script


def test_root_replaces_the_script_folder_on_sys_path(tmp_path):
    script, installed = checkout(tmp_path / "here"), tmp_path / "installed"
    installed.mkdir()
    (installed / "kernels_of_another_package.py").write_text("MARK = 'installed'\n")
    for cwd in (tmp_path, script.parent):
        done = run(script, cwd, tmp_path / "here", installed)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(tmp_path / "here")] * 2


def test_iomm_of_another_checkout_is_refused(tmp_path):
    script = checkout(tmp_path / "here")
    (tmp_path / "here" / "iomm").unlink()
    (tmp_path / "here" / "iomm").mkdir()
    (tmp_path / "here" / "iomm" / "__init__.py").touch()
    done = run(script, tmp_path, ROOT)
    assert (
        done.returncode == 1
        and "pip install -e ." in done.stderr
        and str(ROOT / "iomm") in done.stderr
    )


def test_import_leaves_sys_path_unchanged(monkeypatch):
    monkeypatch.setattr(sys, "path", ["/somewhere", *sys.path])
    assert enter(ROOT / "benchmarks" / "report.py") == ROOT and sys.path[0] == "/somewhere"
