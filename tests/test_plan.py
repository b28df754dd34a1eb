"""Shipped configs built on the meta device: parameters, memory and work, against counts and against a real pass."""

import pytest
import torch

from iomm.config import InputError
from iomm.engine.config import CONFIGS, load_config
from iomm.engine.plan import activation_bytes, build_without_weights, describe, make_plan

PAPER = {   # generator's parameters, work of one image in TFLOP: METHOD's table for B
    "iomm-b-512": ((1.55e9, 1.65e9), (7.9, 8.2)),
    "iomm-l-512": ((2.65e9, 2.80e9), (10.5, 11.5)),
    "iomm-xl-512": ((5.7e9, 6.3e9), (48.0, 52.0)),
}
NO_SHARDS = ("data.shards=shapes",)


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("iomm-*.yaml")))
def test_shipped_configs_are_counted(name):
    plan = make_plan(load_config(name, NO_SHARDS), ranks=8)
    (fewest, most), (least, highest) = PAPER[name]
    assert fewest <= plan.parameters["generator"] <= most
    assert 28.5e6 <= plan.parameters["adapter"] <= 29.5e6
    assert least <= sum(plan.flops.values()) / 1e12 <= highest
    trained = plan.parameters["generator"] + plan.parameters["adapter"]
    assert plan.memory["masters"] == 4 * trained / 8
    assert sum(plan.memory.values()) < 141e9, "does not fit one H200"
    assert plan.images == pytest.approx(110e6, rel=0.001)


def test_the_paper_s_budget_in_gpu_hours():
    """110 M images at IOMM-B's work: 310 GPU-hours at an H200's matmul rate, half the paper's 1000 at 60 % of it."""
    plan = make_plan(load_config("iomm-b-512", NO_SHARDS), ranks=8)
    assert plan.gpu_hours(790e12) == pytest.approx(311, rel=0.02)
    assert "GPU-hours" in describe(plan, load_config("iomm-b-512"))


def test_counted_activations_are_what_a_real_pass_keeps():
    config = load_config("demo", ["precision=fp32"])
    model = build_without_weights(config)
    counted = activation_bytes(model, config, micro_batch=4)
    from iomm.generator import new_generator
    generator = new_generator(model.generator.config, 0)
    own, kept = {p.untyped_storage().data_ptr() for p in generator.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = generator(torch.randn(4, 64, 48), torch.rand(4), torch.randn(4, 16, model.generator.config.condition_dim), (8, 8))
    assert counted == pytest.approx(sum(kept.values()), rel=0.1) and out.requires_grad


def test_what_cannot_be_is_said_before_it_costs():
    with pytest.raises(InputError, match="train.global_batch must be a multiple of train.micro_batch x ranks, got 1024 and 16 x 7"):
        make_plan(load_config("iomm-b-512", NO_SHARDS), ranks=7)
    with pytest.raises(InputError, match="image size must be a positive multiple of 16 px, got 500 x 500"):
        make_plan(load_config("iomm-b-512", [*NO_SHARDS, "data.size_px=500"]), ranks=8)
    with pytest.raises(InputError, match="nowhere"):
        make_plan(load_config("iomm-b-512", ["data.shards=nowhere/*.tar"]), ranks=8)


def test_dry_run_prints_and_costs_nothing(capsys, tmp_path):
    from iomm.engine.launch import main
    run_dir = tmp_path / "run"
    assert main(["--config", "iomm-b-512", "--dry-run", "64", "data.shards=shapes", f"run.dir={run_dir}"]) == 0
    said = capsys.readouterr().out
    assert "64 GPU(s)" in said and "GPU-hours" in said and not run_dir.exists()
