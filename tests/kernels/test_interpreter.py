"""The Triton bodies without a GPU: their tests, run anew in a Python that interprets Triton on CPU tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from iomm.kernels.triton_ops import support as triton_support

TESTS = Path(__file__).resolve().parent
FILES = sorted(
    path.name
    for path in TESTS.glob("test_*.py")
    if path.name != "test_interpreter.py" and "@needs_triton" in path.read_text()
)


def interpreted(files, marks):
    if why := triton_support.why_not():
        pytest.skip(why)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "triton",
        "-m",
        marks,
    ]
    done = subprocess.run(
        [*command, *(str(TESTS / file) for file in files)],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0 and " passed" in done.stdout, (
        done.stdout[-6000:] + done.stderr[-2000:]
    )
    assert " skipped" not in done.stdout, done.stdout[-6000:]


@pytest.mark.skipif(triton_support.INTERPRETED, reason="this is the interpreter already")
def test_bodies_are_right():
    """All files in one Python: each start costs 4 s."""
    interpreted(FILES, "not slow")


@pytest.mark.slow
@pytest.mark.skipif(triton_support.INTERPRETED, reason="this is the interpreter already")
@pytest.mark.parametrize(
    "file", [file for file in FILES if "mark.slow" in (TESTS / file).read_text()]
)
def test_long_sequences_are_right(file):
    interpreted([file], "slow")
