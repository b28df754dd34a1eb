"""Tests of benchmarks/budget.py.

Its FLOPs are compared with FlopCounterMode, its links with arithmetic, its step with a measurement.
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.traffic import Message, Traffic
from iomm.generator import empty_generator

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = "iomm-b-512", pytest.param("iomm-l-512", marks=pytest.mark.slow), "iomm-xl-512"


@pytest.fixture(scope="module")
def budget():
    spec = importlib.util.spec_from_file_location("budget", ROOT / "benchmarks/budget.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counted(work):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_budget_flops_match_the_flop_counter(budget, name):
    """Forward and backward of the generator, ViT and VAE, on the meta device.

    The decoder's two passes do not run there. tests/iomm/test_model.py counts them at a small size,
    and tests/iomm/test_flops.py counts the literal pass at the real one.
    """
    config, model, flops = budget.inputs(name)
    mllm, vae = model.frozen
    rows, columns = vae.grid(config.data.size_px, config.data.size_px)
    generator = empty_generator(model.generator.config, device="meta")
    noisy = torch.empty(1, rows * columns, vae.token_dim, device="meta", requires_grad=True)
    condition = torch.empty(
        1, config.adapter.num_queries, mllm.width, device="meta", requires_grad=True
    )
    found = counted(
        lambda: (
            generator(noisy, torch.empty(1, device="meta"), condition, (rows, columns))
            .sum()
            .backward()
        )
    )
    assert flops["generator"] == pytest.approx(found, rel=0.01)
    pixels = torch.empty(1, 3, mllm.vit_px, mllm.vit_px, device="meta")
    assert flops["ViT"] == pytest.approx(counted(lambda: mllm.image_tokens(pixels)), rel=0.01)
    pixels = torch.empty(1, 3, config.data.size_px, config.data.size_px, device="meta")
    assert flops["VAE"] == pytest.approx(counted(lambda: vae.encode(pixels)), rel=0.01)


def test_link_seconds_match_arithmetic(budget):
    """A large message costs its bytes over the slowest link, a small one its hops.

    A message to oneself costs nothing.
    """
    share = budget.assumed("share of link rates")
    for gpu, ranks, rate in (
        ("H800", 8, 200e9),
        ("H800", 64, 200e9),
        ("H200", 8, 450e9),
        ("H200", 64, 400e9),
    ):
        message = Message(kind="all_gather", size_bytes=64 << 30, group=ranks)
        assert budget.link_s(message, budget.MACHINES[gpu]) == pytest.approx(
            message.sent_bytes() / rate / share, rel=0.01
        )
    small = [
        budget.link_s(Message(kind="all_gather", size_bytes=512, group=n), budget.MACHINES["H200"])
        for n in (1, 8, 64, 512)
    ]
    assert (
        small[0] == 0
        and small == sorted(small)
        and small[3] == pytest.approx((6.6 + 448 * 1.08 + 63 * 2.7) * 1e-6, rel=0.01)
    )


def test_step_seconds_sum_to_the_step(budget):
    run = budget.estimate("iomm-b-512", "H800", 64)
    parts = sum(
        run[key]
        for key in ("compute_s", "exposed_s", "host_s", "after_s", "update_s", "checkpoint_s")
    )
    assert parts == pytest.approx(run["step_s"]) and min(run["exposed_s"], run["host_s"]) >= -1e-9
    assert run["gpu_hours"] == pytest.approx(107422 * run["step_s"] * 64 / 3600)


def test_readmes_quote_the_present_budget(budget):
    rows = [
        line
        for line in (ROOT / "benchmarks/README.md").read_text().splitlines()
        if line.startswith("| `iomm-b-512` ")
    ]
    found = [
        f"{budget.estimate('iomm-b-512', gpu, ranks)['gpu_hours']:,.0f}"
        for gpu in ("H200", "H800")
        for ranks in (8, 64, 512)
    ]
    assert [row.strip("| ").split(" | ")[1:] for row in rows] == [found]
    assert f"stage 1 takes {found[3]} GPU-hours on 8 H800" in (ROOT / "README.md").read_text()


def test_budget_writes_only_to_out(budget, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budget, "CONFIGS", ("iomm-b-512",))
    monkeypatch.setattr(budget, "GPUS", (1, 8))
    # Their rows are tested in the slow lane.
    monkeypatch.setattr(budget, "TUNED_MODELS", ())
    budget.main([])
    assert "Limits of scaling" in capsys.readouterr().out and not list(tmp_path.iterdir())
    budget.main(["--out", str(tmp_path / "here")])
    results = json.loads((tmp_path / "here" / "budget.json").read_text())["results"]
    saved = results["iomm-b-512"]["H800"]["as configured"]
    assert saved[1]["step_s"] == budget.estimate("iomm-b-512", "H800", 8)["step_s"]
    assert (tmp_path / "here" / "budget.png").stat().st_size > 10_000


def test_estimate_respects_gpu_memory(budget):
    """IOMM-XL does not fit on one H800, and 32 images per pass do not on 8.

    An explicit micro_batch is not checked.
    """
    assert budget.estimate("iomm-xl-512", "H800", 1) is None
    run = budget.estimate("iomm-xl-512", "H800", 8)
    assert run["micro_batch"] == 16 and run["memory_gib"] < 0.92 * 79.1
    assert budget.estimate("iomm-xl-512", "H800", 8, micro_batch=32)["memory_gib"] > 79.1
    # A number in the config is a limit, and what does not fit is still reduced.
    config = budget.inputs("iomm-b-512").config
    fixed = replace(config, train=replace(config.train, micro_batch=4))
    assert budget.sizes_of(fixed, 1024, 8) == [1, 2, 4]
    assert budget.sizes_of(config, 1024, 8)[-1] == 128


def test_parts_sum_to_a_micro_batch(budget):
    """And hold what earlier budgets lacked: milliseconds of IOMM-B on one H200 with 16 images.

    With PyTorch's backends.
    """
    machine = budget.MACHINES["H200"]
    before = budget.Levers(**budget.PYTORCH)
    parts = budget.micro_batch_parts("iomm-b-512", 16, machine, before)
    seconds = budget.micro_batch_s("iomm-b-512", 16, machine, before)
    assert sum(seconds) == pytest.approx(sum(map(sum, parts.values())))
    ms = {part: 1e3 * sum(columns) for part, columns in parts.items()}
    assert ms["gradient copies"] == pytest.approx(34 * 1.6204e9 / 3.44e12 * 1e3, rel=0.001)
    # 34 GFLOP an image.
    assert ms["VAE mid attention"] == pytest.approx(16 * 4 * 4096**2 * 512 / 85e12 * 1e3)
    # 7.36 and 2.28 GB an image are generated (LOG.md, 2026-11-30).
    assert ms["generator rows"] == pytest.approx(16 * 7.36e9 / 3.44e12 * 1e3, rel=0.01)
    assert ms["VAE rows"] == pytest.approx(16 * 2.28e9 / 3.44e12 * 1e3, rel=0.02)
    # No lever makes a part slower, but fp8 casts its operands.
    levers = budget.Levers(frozen_fp8=True, draws=2)
    faster = budget.micro_batch_parts("iomm-b-512", 16, machine, levers)
    assert all(sum(faster[part]) <= sum(columns) for part, columns in parts.items())
    changed = {part for part, columns in parts.items() if sum(faster[part]) < sum(columns)}
    assert changed == {
        *("VAE convolutions", "VAE rows", "VAE mid attention", "ViT", "MLLM products"),
        *("MLLM attention", "generator rows"),
    }
    parts = budget.micro_batch_parts("iomm-b-512", 16, machine)
    fp8 = budget.micro_batch_parts("iomm-b-512", 16, machine, budget.Levers(fp8=True))
    assert sum(fp8["generator products"]) < sum(parts["generator products"])
    assert sum(fp8["generator rows"]) > sum(parts["generator rows"])
    latents = budget.micro_batch_parts("iomm-b-512", 16, machine, budget.Levers(latents=True))
    assert sum(sum(c) for p, c in latents.items() if p.startswith("VAE")) == 0


def test_readme_has_the_parts_and_levers(budget):
    """benchmarks/README.md quotes what the command prints."""
    text = (ROOT / "benchmarks/README.md").read_text()
    machine = budget.MACHINES["H200"]
    columns = [budget.micro_batch_parts("iomm-b-512", size, machine) for size in (16, 32)]
    for part in columns[0]:
        values = " | ".join(f"{1e3 * sum(column[part]):.1f}" for column in columns)
        assert f"| {part} | {values} |" in text
    for what, rate in budget.lever_rows("iomm-b-512", "H200"):
        assert f"| {what} | {rate:.1f} |" in text
    for goal in budget.goals("iomm-b-512", "H200"):
        assert f"- {goal}\n" in text


def test_message_costs_only_exposed_time(budget):
    """Two modules of a second each, forward only.

    The second one's weights arrive while the first computes, or the second has to wait for them.
    """
    traffic = Traffic(visits=[(False, 1), (False, 1)], first=[], later=[], step=[])
    rate = budget.assumed("share of link rates") * 200e9
    for seconds, expected in ((0.5, 2.0), (1.5, 2.5)):
        message = Message(
            kind="all_gather", size_bytes=int(seconds * rate * 8 / 7), group=8, issued=0, needed=1
        )
        assert budget.pass_s(
            traffic, [message], (0.0, 2.0, 0.0, 0.0), budget.MACHINES["H800"]
        ) == pytest.approx(expected, rel=1e-3)
    late = Message(
        kind="all_gather", size_bytes=int(0.5 * rate * 8 / 7), group=8, issued=1, needed=1
    )
    assert budget.pass_s(
        traffic, [late], (0.0, 2.0, 0.0, 0.0), budget.MACHINES["H800"]
    ) == pytest.approx(2.5, rel=1e-3)


def test_estimate_of_one_gpu_matches_the_measurement(budget):
    """Within 15 %, with the rates of the measuring machine.

    Skipped until benchmarks/throughput.py has been run on a GPU.
    """
    files = sorted((ROOT / "benchmarks/results").glob("throughput-iomm-b-512-cuda-*.json"))
    if not files:
        pytest.skip(
            "no benchmarks/results/throughput-iomm-b-512-cuda-*.json: benchmarks/throughput.py has "
            "not been run on a GPU yet"
        )
    measured = json.loads(files[-1].read_text())
    gpu = next((kind for kind in budget.MACHINES if kind in measured["machine"]["device"]), None)
    assert gpu, f"MACHINES has no {measured['machine']['device']}"
    run = budget.estimate(
        "iomm-b-512",
        gpu,
        1,
        batch=measured["images_a_step"],
        micro_batch=measured["images_a_pass"],
        matmul=measured["matmul_flop_per_s"],
        copy=measured["copy_bytes_per_s"],
    )
    assert run["images_per_s"] == pytest.approx(measured["rows"]["ours"]["images_per_s"], rel=0.15)


@pytest.mark.slow
def test_engine_readme_has_the_rows_of_fine_tuning(budget):
    """engine/README.md quotes what the command prints for Qwen-Image and Z-Image."""
    text = (ROOT / "engine/README.md").read_text()
    for name in budget.TUNED_MODELS:
        for row in budget.fine_tuning_rows(name):
            assert row in text.splitlines(), row


@pytest.mark.slow
def test_parts_of_lora_hold_all_flops_and_hidden_gathers(budget):
    """The generator's seconds, times their rates, are its FLOPs; gathers cost no time."""
    name, machine = "qwen-image-512-lora", budget.MACHINES["H200"]
    unrecomputed = f"{name} train.recompute=0"
    parts = budget.micro_batch_parts(unrecomputed, 6, machine)
    rate = machine["matmul"] * budget.assumed("share of the matmul rate, transformer products")
    masked = budget.assumed("memory-efficient attention, FLOP/s")
    _, forward, _, backward = parts["generator products"]
    _, once, _, again = parts["generator attention"]
    flops = (forward + backward) * rate + (once + again / 2.5 * 2) * masked
    # The budget takes the mean length of a condition, the count the mean over lengths.
    assert flops / 6 == pytest.approx(budget.inputs(name).flops["generator"], rel=0.002)
    whole, sharded = (
        budget.estimate(name + settings, "H200", 8) for settings in budget.SHARDING[:2]
    )
    assert sharded["step_s"] == pytest.approx(whole["step_s"], rel=0.001)
    assert sharded["memory_gib"] < whole["memory_gib"] - 31
    sent = sharded["sent_bytes"]["all_gather"] - whole["sent_bytes"]["all_gather"]
    # 118 gathers of a block, an eighth of which is kept. The last block is smaller.
    assert sent == pytest.approx(118 * 679.67e6 * 7 / 8, rel=0.005)
