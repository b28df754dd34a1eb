"""Tests of benchmarks/ops.py: its checks, its cases, and its error without a GPU."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "ops.py"


@pytest.fixture(scope="module")
def ops():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("ops_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_cpu_backends_are_within_their_error_budget(ops):
    for dtype in (torch.float32, torch.bfloat16):
        for case in ops.cases("cpu", dtype):
            for name, backend in case.backends.items():
                assert ops.check(case, backend, "cpu", dtype) <= 1, (case.op, name, dtype)


def test_wrong_backend_exceeds_the_error_budget(ops):
    case = next(case for case in ops.cases("cpu", torch.float32) if case.op == "norm_modulate")
    right = case.backends["torch"]
    assert ops.check(case, lambda *x: right(*x) * 1.001, "cpu", torch.float32) > 1
    assert ops.check(case, lambda *x: right(*x) * float("nan"), "cpu", torch.float32) > 1


def test_gpu_cases_have_targets(ops):
    rows = list(ops.cases("cuda", torch.bfloat16))
    assert {case.op for case in rows} >= {
        "masked_attention",
        "norm_modulate",
        "qk_norm_rope",
        "noisy_tokens",
        "image_patches",
        "visible_tokens",
        "adamw",
        "attend",
        "wide_attention",
    }
    assert all(case.targets or "joint" in case.name for case in rows)
    assert len({(case.op, case.name) for case in rows}) == len(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_option_without_a_gpu_is_an_error():
    done = subprocess.run([sys.executable, str(SCRIPT), "--gpu"], capture_output=True, text=True)
    assert done.returncode and "no GPU here" in done.stderr


@pytest.mark.slow
def test_ops_benchmark_runs_on_this_cpu(tmp_path):
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("iomm", "kernels", "csrc", "engine"):
        (copy / name).symlink_to(ROOT / name)
    shutil.copytree(
        ROOT / "benchmarks",
        copy / "benchmarks",
        ignore=shutil.ignore_patterns("results", "figures"),
    )
    done = subprocess.run(
        [sys.executable, "benchmarks/ops.py"],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    written = list((copy / "benchmarks" / "results").glob("ops-cpu-*.json"))
    rows = json.loads(written[0].read_text())["rows"]
    assert len(rows) > 10 and all(row["ms"] > 0 for row in rows)
