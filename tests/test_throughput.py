"""benchmarks/throughput.py: its figures and last line, the pass without the split, and the whole command (slow)."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_mllm import TEXT, VISION

from benchmarks import ablations, report, throughput
from iomm.internvl import random_mllm

ROOT = Path(__file__).resolve().parent.parent
LAST = re.compile(r"ratio \d+\.\d\d \(counted \d+\.\d\d, spread \d+\.\d\d-\d+\.\d\d\)")


def test_ratios_are_taken_round_by_round():
    found = throughput.ratio([2.0, 40.0, 3.0, 2.4, 2.2], [2.0, 20.0, 2.0, 2.0, 2.0])
    assert found == {"median": 1.2, "low": 1.0, "high": 2.0}
    assert throughput.line(found | {"counted": 1.177}) == "ratio 1.20 (counted 1.18, spread 1.00-2.00)"
    assert LAST.fullmatch(throughput.line(found | {"counted": 1.177}))


def test_the_pass_without_the_split_gives_the_same_outputs_and_gradients():
    mllm = random_mllm({"vision": VISION, "text": {"vocab_size": 512, **TEXT}}, torch.float64, "cpu")
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, mllm.num_image_tokens, mllm.width, generator=draw, dtype=torch.float64)
    condition = mllm.condition(["a"] * 3, tokens, visible=torch.rand(3 * mllm.num_image_tokens, generator=draw) < 0.4)
    queries = torch.randn(3, 5, mllm.width, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, mllm.width, generator=draw, dtype=torch.float64)
    split = mllm.queries(queries, condition, mllm.prefix(condition)[0])
    whole = ablations.whole_pass(mllm, queries, condition, None)
    assert (split - whole).abs().max() <= 1e-12 * whole.abs().max()
    grads = [torch.autograd.grad((out * weight).sum(), queries)[0] for out in (split, whole)]
    assert (grads[0] - grads[1]).abs().max() <= 1e-12 * grads[1].abs().max()


def test_switches_are_put_back(monkeypatch):
    @dataclass
    class Thing:
        value: int = 1
    thing = Thing()
    monkeypatch.delenv("IOMM_KERNELS", raising=False)
    with pytest.raises(KeyError), ablations.swapped(thing, value=2), ablations.bodies("philox:reference"):
        assert thing.value == 2 and os.environ["IOMM_KERNELS"] == "philox:reference"
        raise KeyError
    assert thing.value == 1 and "IOMM_KERNELS" not in os.environ


def test_projection_is_hours_at_the_measured_rate():
    result = {"rows": {"ours": {"images_per_s": 110e6 / 3600 / 500}}}
    said = throughput.projection(result)
    assert "500 GPU-hours (paper: 1,000 on H800)" in said and "30.6" in said
    assert result["projection"]["stage_2_gpu_hours"] == pytest.approx(500 * 4.2 / 110)


@pytest.mark.slow
def test_the_whole_command_on_one_image_a_step(tmp_path):
    """Every figure is there, the last line reads as it must, and the report quotes it."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("iomm", "kernels", "csrc", "engine"):
        (copy / name).symlink_to(ROOT / name)
    (copy / "benchmarks").mkdir()
    for path in (ROOT / "benchmarks").glob("*.*"):
        (copy / "benchmarks" / path.name).write_text(path.read_text())
    done = subprocess.run(
        [sys.executable, "benchmarks/throughput.py", "--against", "plain", "--steps", "3", "--limit-s", "120", "train.micro_batch=1",
         "--trace", str(tmp_path)], cwd=copy, capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert LAST.fullmatch(done.stdout.splitlines()[-1])
    path = next((copy / "benchmarks/results").glob("throughput-*-cpu-*.json"))
    result = json.loads(path.read_text())
    assert set(result["rows"]) == {"ours", "plain", "plain, all outputs"} and len(result["ablations"]) == 5
    assert abs(result["loss"]["ours"] - result["loss"]["plain"]) < 1e-4
    assert all(row["s"] > 0 and row["bytes"] > 0 for row in result["parts"].values())
    assert 1.15 < result["ratios"]["plain"]["counted"] < 1.2 < 1.3 < result["ratios"]["plain, all outputs"]["counted"] < 1.35
    assert len(list(report.throughput(result))) == 4 + len(result["ablations"])
