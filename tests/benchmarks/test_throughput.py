"""benchmarks/throughput.py: its figures and last line, the pass without the split, and the whole command (slow)."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launches import PIXELS
from toy_models import TEXT, VISION

from benchmarks import report, throughput
from benchmarks.lib import ablations
from benchmarks.lib import harness as bench
from iomm.config import InputError
from iomm.engine import builders
from iomm.engine.config import load_config
from iomm.internvl import random_mllm

ROOT = Path(__file__).resolve().parents[2]
LAST = re.compile(r"ratio \d+\.\d\d \(counted \d+\.\d\d, spread \d+\.\d\d-\d+\.\d\d\)")


def test_ratios_are_taken_round_by_round():
    found = throughput.ratio([2.0, 40.0, 3.0, 2.4, 2.2], [2.0, 20.0, 2.0, 2.0, 2.0])
    assert found == {"median": 1.2, "low": 1.0, "high": 2.0}
    assert (
        throughput.line(found | {"counted": 1.177}) == "ratio 1.20 (counted 1.18, spread 1.00-2.00)"
    )
    assert LAST.fullmatch(throughput.line(found | {"counted": 1.177}))


def test_the_pass_without_the_split_gives_the_same_outputs_and_gradients():
    mllm = random_mllm(
        {"vision": VISION, "text": {"vocab_size": 512, **TEXT}}, torch.float64, "cpu"
    )
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, mllm.num_image_tokens, mllm.width, generator=draw, dtype=torch.float64)
    condition = mllm.condition(
        ["a"] * 3, tokens, visible=torch.rand(3 * mllm.num_image_tokens, generator=draw) < 0.4
    )
    queries = torch.randn(3, 5, mllm.width, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, mllm.width, generator=draw, dtype=torch.float64)
    split = mllm.queries(queries, condition, mllm.prefix(condition)[0])
    whole = ablations.whole_pass(mllm, queries, condition, None)
    assert (split - whole).abs().max() <= 1e-12 * whole.abs().max()
    grads = [torch.autograd.grad((out * weight).sum(), queries)[0] for out in (split, whole)]
    assert (grads[0] - grads[1]).abs().max() <= 1e-12 * grads[1].abs().max()


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["align.weight=0.5", "adapter.connector_layers=1"],
        ["adapter.kind=none", "adapter.conditions=all"],
    ],
)
def test_a_whole_copy_has_every_part_that_trains(settings):
    config = load_config(
        PIXELS, ["precision=fp32", "model.vae=pixel:4", "data.size_px=32", *settings]
    )
    model = builders.build_model(config, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    weights = dict(model.named_parameters())
    twin = bench.whole_copy(
        SimpleNamespace(
            config=config, model=model, device=torch.device("cpu"), weights=lambda: weights
        )
    )
    assert {name for name, _ in twin.named_parameters()} == set(weights)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in twin.named_parameters())
    inputs = (
        torch.rand(2, 3, 32, 32),
        torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8),
        torch.arange(2),
    )
    for ours, theirs in zip(twin(*inputs), model(*inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_switches_are_put_back(monkeypatch):
    @dataclass
    class Thing:
        value: int = 1

    thing = Thing()
    monkeypatch.delenv("IOMM_KERNELS", raising=False)
    with (
        pytest.raises(KeyError),
        ablations.swapped(thing, value=2),
        ablations.bodies("philox:reference"),
    ):
        assert thing.value == 2 and os.environ["IOMM_KERNELS"] == "philox:reference"
        raise KeyError
    assert thing.value == 1 and "IOMM_KERNELS" not in os.environ


def test_projection_is_hours_at_the_measured_rate():
    result = {"rows": {"ours": {"images_per_s": 110e6 / 3600 / 500}}}
    said = throughput.projection(result)
    assert "500 GPU-hours (paper: 1,000 on H800)" in said and "30.6" in said
    assert result["projection"]["stage_2_gpu_hours"] == pytest.approx(500 * 4.2 / 110)


@pytest.mark.parametrize(
    "given", [["--steps", "0"], ["--steps", "1.5"], ["--limit-s", "nan"], ["--limit-s", "-3"]]
)
def test_a_number_that_is_none_is_one_line(given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *given])
    with pytest.raises(SystemExit) as ended:
        throughput.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        ended.value.code == 2
        and f"argument {given[0]}: must be a" in said
        and said.endswith(f"number above 0, got {given[1]}")
    )


def test_a_mistake_is_one_line_and_2(capsys):
    def main():
        raise InputError("no such thing")

    assert (
        report.command(main) == 2
        and report.command(lambda: 1) == 1
        and capsys.readouterr().err == "iomm: no such thing\n"
    )


def test_what_fails_is_said_and_kept_and_ends_nothing(capsys):
    def work():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried a lot")

    result, saved = {}, []
    throughput.attempt("plain", work, result, lambda: saved.append(dict(result)))
    throughput.attempt(
        "parts alone", lambda: result.update(parts={}), result, lambda: saved.append(dict(result))
    )
    failed = {"plain": "OutOfMemoryError: CUDA out of memory."}
    assert saved == [{"failed": failed}, {"failed": failed, "parts": {}}]
    assert (
        capsys.readouterr().out
        == f"plain failed: {failed['plain']}; repeat with a smaller train.micro_batch\n"
    )


@pytest.mark.parametrize("gib, against, micro_batch", [(139.8, "plain", 16), (79.2, None, 4)])
def test_the_visit_of_a_gpu_is_planned(gib, against, micro_batch, monkeypatch, tmp_path):
    """iomm-b-512 on an H200 beside plain; on an H100 without it, where both do not fit."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * 2**30)
    )
    monkeypatch.setattr(bench, "draw_photographs", lambda folder, num: folder)
    args = SimpleNamespace(config="iomm-b-512", overrides=[], against="plain")
    config, _ = bench.prepare(args, "cuda", tmp_path)
    assert args.against == against and config.train.micro_batch == micro_batch
    # 64 photographs are all there is
    assert config.train.global_batch == 4 * micro_batch and config.data.heldout == 0


@pytest.mark.parametrize("config", ["iomm-xl-512", "iomm-b-512-finetune", "demo"])
def test_plain_is_a_rival_of_what_it_computes_alone(config, tmp_path):
    args = SimpleNamespace(config=config, overrides=[], against="plain")
    with pytest.raises(InputError, match="--against plain is"):
        bench.prepare(args, "cpu", tmp_path)


SMALL = [
    "model.preset=iomm-b-quarter",
    "model.mllm=random:internvl3-quarter",
    "model.vae=random:flux-quarter",
    "data.size_px=64",
    "adapter.num_queries=16",
    "adapter.head_dim=64",
    "train.micro_batch=2",
    "precision=fp32",
]


@pytest.mark.slow
@pytest.mark.parametrize("visit", [False, True], ids=["on a CPU", "of a GPU, made small"])
def test_the_whole_command(visit, tmp_path):
    """Every figure is there, the last line reads as it must, and the report quotes it. The visit: iomm-b-512's file, compiled."""
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
        [
            sys.executable,
            "benchmarks/throughput.py",
            "--against",
            "plain",
            "--steps",
            "3",
            "--trace",
            str(tmp_path),
            *(
                ["--config", "iomm-b-512", "--limit-s", "900", "train.compile=true", *SMALL]
                if visit
                else ["--limit-s", "120", "train.micro_batch=1"]
            ),
        ],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=1500,
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert LAST.fullmatch(done.stdout.splitlines()[-1])
    path = next((copy / "benchmarks/results").glob("throughput-*-cpu-*.json"))
    result = json.loads(path.read_text())
    assert set(result["rows"]) == {
        "ours",
        "plain",
        "plain, all outputs",
        *(["plain, no compile"] if visit else []),
    }
    assert len(result["ablations"]) == 5 + visit and (tmp_path / "traces").is_dir()
    assert abs(result["loss"]["ours"] - result["loss"]["plain"]) < 1e-4
    assert all(row["s"] > 0 and row["bytes"] > 0 for row in result["parts"].values())
    if not visit:
        assert (
            1.15
            < result["ratios"]["plain"]["counted"]
            < 1.2
            < 1.3
            < result["ratios"]["plain, all outputs"]["counted"]
            < 1.35
        )
    quoted = list(report.throughput(result))
    assert len(quoted) == 4 + visit + len(result["ablations"]) and not any(
        "/photographs" in what for what, _ in quoted
    )
