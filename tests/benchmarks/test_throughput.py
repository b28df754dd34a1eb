"""Tests of benchmarks/throughput.py and its harness.

They cover its figures and last line, the pass without the prefix split, and the command (slow).
"""

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
from benchmarks.lib import ablations, harness
from iomm.config import InputError
from iomm.engine import builders
from iomm.engine.config import load_config
from iomm.internvl import random_mllm

ROOT = Path(__file__).resolve().parents[2]
LAST = re.compile(r"ratio \d+\.\d\d \(counted \d+\.\d\d, spread \d+\.\d\d-\d+\.\d\d\)")


def test_ratio_is_taken_round_by_round():
    found = throughput.ratio([2.0, 40.0, 3.0, 2.4, 2.2], [2.0, 20.0, 2.0, 2.0, 2.0])
    assert found == {"median": 1.2, "low": 1.0, "high": 2.0}
    line = throughput.ratio_line(found | {"counted": 1.177})
    assert line == "ratio 1.20 (counted 1.18, spread 1.00-2.00)"
    assert LAST.fullmatch(line)


def test_whole_pass_matches_the_prefix_split():
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
def test_unsharded_copy_has_every_trained_part(settings):
    config = load_config(
        PIXELS, ["precision=fp32", "model.vae=pixel:4", "data.size_px=32", *settings]
    )
    model = builders.build_model(config, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    weights = dict(model.named_parameters())
    copy = harness.unsharded_copy(
        SimpleNamespace(
            config=config, model=model, device=torch.device("cpu"), weights=lambda: weights
        )
    )
    assert {name for name, _ in copy.named_parameters()} == set(weights)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in copy.named_parameters())
    inputs = (
        torch.rand(2, 3, 32, 32),
        torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8),
        torch.arange(2),
    )
    for ours, theirs in zip(copy(*inputs), model(*inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_swapped_and_kernel_choice_are_restored(monkeypatch):
    @dataclass
    class Target:
        value: int = 1

    target = Target()
    monkeypatch.delenv("IOMM_KERNELS", raising=False)
    with (
        pytest.raises(KeyError),
        ablations.swapped(target, value=2),
        ablations.kernel_choice("philox:reference"),
    ):
        assert target.value == 2 and os.environ["IOMM_KERNELS"] == "philox:reference"
        raise KeyError
    assert target.value == 1 and "IOMM_KERNELS" not in os.environ


def test_projection_uses_the_measured_rate():
    result = {"rows": {"ours": {"images_per_s": 110e6 / 3600 / 500}}}
    text = throughput.projection(result)
    assert "500 GPU-hours (paper: 1,000 on H800)" in text and "30.6, or 15.3 if" in text
    assert result["projection"]["stage_2_gpu_hours"] == pytest.approx(500 * 2.1 / 110)


@pytest.mark.parametrize(
    "given", [["--steps", "0"], ["--steps", "1.5"], ["--limit-s", "nan"], ["--limit-s", "-3"]]
)
def test_invalid_number_is_a_one_line_error(given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *given])
    with pytest.raises(SystemExit) as ended:
        throughput.main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        ended.value.code == 2
        and f"argument {given[0]}: must be a" in error
        and error.endswith(f"number above 0, got {given[1]}")
    )


@pytest.mark.parametrize("spelling", ["baseline", "plain"])
def test_against_accepts_the_old_spelling(spelling, monkeypatch):
    def stop(args, device, folder):
        raise InputError(args.against)

    monkeypatch.setattr(throughput, "prepare", stop)
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--against", spelling])
    with pytest.raises(InputError, match=r"^baseline$"):
        throughput.main()


@pytest.mark.parametrize("spelling", ["baseline", "plain"])
def test_report_reads_both_spellings_of_the_baseline(spelling):
    ratio = {"median": 1.2, "low": 1.1, "high": 1.3, "counted": 1.18}
    result = {
        "config": "demo-cpu",
        "changed": [],
        "precision": "fp32",
        "images_a_step": 16,
        "rows": {"ours": {"s": 1.0, "images_per_s": 16.0}},
        "of_matmul_rate": 0.9,
        "mfu": None,
        "peak_memory_gib": 2.0,
        "ratios": {spelling: ratio, f"{spelling}, all outputs": ratio},
    }
    assert [what for what, _ in report.throughput(result)][1:] == [
        "step of the PyTorch baseline / our step, `demo-cpu`, fp32",
        "step of the PyTorch baseline (all outputs) / our step, `demo-cpu`, fp32",
    ]


def test_input_error_is_one_line_and_exit_code_2(capsys):
    def main():
        raise InputError("no such thing")

    assert (
        report.command(main) == 2
        and report.command(lambda: 1) == 1
        and capsys.readouterr().err == "iomm: no such thing\n"
    )


def test_attempt_reports_failures_and_does_not_raise(capsys):
    def work():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried a lot")

    result, saved = {}, []
    throughput.attempt("baseline", work, result, lambda: saved.append(dict(result)))
    throughput.attempt(
        "parts alone", lambda: result.update(parts={}), result, lambda: saved.append(dict(result))
    )
    failed = {"baseline": "OutOfMemoryError: CUDA out of memory."}
    assert saved == [{"failed": failed}, {"failed": failed, "parts": {}}]
    assert (
        capsys.readouterr().out
        == f"baseline failed: {failed['baseline']}; repeat with a smaller train.micro_batch\n"
    )


@pytest.mark.parametrize("gib, against, micro_batch", [(139.8, "baseline", 16), (79.2, None, 8)])
def test_prepare_fits_the_micro_batch_to_gpu_memory(
    gib, against, micro_batch, monkeypatch, tmp_path
):
    """iomm-b-512 and the baseline fit on an H200; on an H100 only our run fits."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * 2**30)
    )
    monkeypatch.setattr(harness, "draw_photographs", lambda folder, num: folder)
    args = SimpleNamespace(config="iomm-b-512", overrides=[], against="baseline")
    config, _ = harness.prepare(args, "cuda", tmp_path)
    assert args.against == against and config.train.micro_batch == micro_batch
    # There are only 64 photographs.
    assert config.train.global_batch == 4 * micro_batch and config.data.heldout == 0


@pytest.mark.parametrize("config", ["iomm-xl-512", "iomm-b-512-finetune", "demo"])
def test_prepare_rejects_configs_without_a_baseline(config, tmp_path):
    args = SimpleNamespace(config=config, overrides=[], against="baseline")
    with pytest.raises(InputError, match="--against baseline implements"):
        harness.prepare(args, "cpu", tmp_path)


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
@pytest.mark.parametrize("gpu_config", [False, True], ids=["demo-cpu", "iomm-b-512 made small"])
def test_throughput_command_end_to_end(gpu_config, tmp_path):
    """Every figure exists, the last line has its format, and the report quotes the result.

    Runs the default on a CPU, and the GPU's config iomm-b-512 made small and compiled.
    """
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
            "baseline",
            "--steps",
            "3",
            "--trace",
            str(tmp_path),
            *(
                ["--config", "iomm-b-512", "--limit-s", "900", "train.compile=true", *SMALL]
                if gpu_config
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
        "baseline",
        "baseline, all outputs",
        *(["baseline, no compile"] if gpu_config else []),
    }
    assert len(result["ablations"]) == 6 + gpu_config and (tmp_path / "traces").is_dir()
    assert abs(result["loss"]["ours"] - result["loss"]["baseline"]) < 1e-4
    assert all(row["s"] > 0 and row["bytes"] > 0 for row in result["parts"].values())
    if not gpu_config:
        assert (
            1.15
            < result["ratios"]["baseline"]["counted"]
            < 1.2
            < 1.3
            < result["ratios"]["baseline, all outputs"]["counted"]
            < 1.35
        )
    quoted = list(report.throughput(result))
    assert len(quoted) == 4 + gpu_config + len(result["ablations"]) and not any(
        "/photographs" in what for what, _ in quoted
    )
