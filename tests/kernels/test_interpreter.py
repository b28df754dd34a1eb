"""Tests of the Triton backends without a GPU, in a subprocess with Triton's interpreter."""

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


def run_interpreted(files, marks):
    if reason := triton_support.why_not():
        pytest.skip(reason)
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
    result = subprocess.run(
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
    assert result.returncode == 0 and " passed" in result.stdout, (
        result.stdout[-6000:] + result.stderr[-2000:]
    )
    assert " skipped" not in result.stdout, result.stdout[-6000:]


@pytest.mark.skipif(triton_support.INTERPRETED, reason="already running in the interpreter")
def test_backends_pass_in_interpreter():
    """Run all files in one process, because each start takes 4 s."""
    run_interpreted(FILES, "not slow")


@pytest.mark.slow
@pytest.mark.skipif(triton_support.INTERPRETED, reason="already running in the interpreter")
@pytest.mark.parametrize(
    "file", [file for file in FILES if "mark.slow" in (TESTS / file).read_text()]
)
def test_slow_backend_tests_pass_in_interpreter(file):
    run_interpreted([file], "slow")
