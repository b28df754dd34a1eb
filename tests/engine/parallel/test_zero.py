"""ZeRO stages 0 to 3 on one and two ranks.

Losses and norms are equal, steps are applied on all ranks or none, and checkpoints convert between
stages.
"""

import importlib
import json
from pathlib import Path

import pytest
import torch
import zero_ranks
from launches import finish, start_ranks
from zero_ranks import CUT, KINDS, STAGES

from iomm.config import InputError
from iomm.engine.config import load_config, parse
from iomm.engine.dry_run import make_plan
from iomm.engine.parallel import ranks as group
from iomm.engine.parallel import zero
from iomm.engine.resilience.checkpoint_reader import Reader

SLOTS = {
    "adamw": ("master", "ema", "exp_avg", "exp_avg_sq"),
    "muon": ("master", "ema", "exp_avg", "exp_avg_sq", "momentum_buffer"),
}
RUNS = [(kind, precision) for kind in KINDS for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Return {(number of ranks, rank): report of tests/helpers/zero_ranks.py}.

    Jobs of one and of two ranks run at the same time.
    """
    folder, started = tmp_path_factory.mktemp("zero"), {}
    for size in (1, 2):
        (folder / str(size)).mkdir()
        output = folder / f"{size}.txt"
        processes = start_ranks(size, zero_ranks.__file__, str(folder), output=output)
        started |= {(size, rank): process for rank, process in enumerate(processes)}
    codes = finish(started.values())
    assert not any(codes), "\n".join(
        path.read_text()[-4000:] for path in sorted(folder.glob("*.txt"))
    )
    return {
        (size, rank): json.loads((folder / f"{size}-rank{rank}.json").read_text())
        for size, rank in started
    }


def test_every_stage_matches_plain_pytorch(reports):
    """Losses and norms equal those of torch's AdamW on whole batches, in fp32.

    ZeRO runs accumulate and clip, on one rank and on two.
    """
    for report in reports.values():
        for stage in STAGES:
            for ours, theirs in zip(
                report["runs"][f"adamw-fp32-{stage}"], reports[1, 0]["baseline"], strict=True
            ):
                assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("kind, precision", RUNS)
def test_stages_and_world_sizes_train_the_same(kind, precision, reports):
    """Losses and norms are equal up to fp32 rounding.

    This includes bf16, since accumulation and, in this test, sums over ranks are fp32.
    """
    golden = reports[1, 0]["runs"][f"{kind}-{precision}-3"]
    for report in reports.values():
        for stage in STAGES:
            for ours, theirs in zip(
                report["runs"][f"{kind}-{precision}-{stage}"], golden, strict=True
            ):
                assert ours == pytest.approx(theirs, rel=1e-6)


def test_hierarchical_partitioning_changes_no_loss(reports):
    for rank in range(2):
        runs = reports[2, rank]["runs"]
        assert runs["adamw-bf16-3-hpz"] == runs["adamw-bf16-3"]


def test_several_masters_per_group_change_no_loss(reports):
    for report in reports.values():
        for name in CUT:
            for ours, theirs in zip(
                report["runs"][name], report["runs"][name.removesuffix("-cut")], strict=True
            ):
                assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("rank", [0, 2])
def test_more_ranks_than_gpus_are_rejected_on_all_ranks(rank, monkeypatch):
    """Rank 0, which prints the error, raises it too. With enough GPUs, each rank gets its own."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(InputError, match=r"^4 ranks on a machine with 2 visible GPU\(s\)"):
        group.take_device()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert group.take_device() == (1, torch.device("cuda", 1)) and taken == [1]


def test_muon_updates_are_bitwise_equal_at_every_stage(reports):
    """Muon's first step of two ranks is equal bit by bit, as gradients are.

    Each rank has one micro-batch and there is no clipping. (AdamW's kernel rounds the last values
    of a flat shard differently from the others.)
    """
    folder = Path(reports[2, 0]["converted"][0][0]).parent.parent.parent
    readers = [Reader(folder / f"2/muon-fp32-{stage}/step-00000001") for stage in STAGES]
    matrices = [
        name for name in readers[0].manifest["shapes"] if has(readers[0], "momentum_buffer", name)
    ]
    assert sorted(matrices) == [
        f"blocks.{i}.{name}.weight" for i in range(2) for name in ("back", "fused")
    ]
    for name in matrices:
        for slot in ("master", "ema", "momentum_buffer"):
            whole = [reader.full(slot, name) for reader in readers]
            assert all(torch.equal(whole[0], other) for other in whole[1:]), (slot, name)


def test_nonfinite_values_skip_the_step_on_all_ranks(reports):
    """The loss, a gradient, a master or a moment of the last rank is not finite."""
    for report in reports.values():
        for name, found in report["nonfinite"].items():
            for what, (applied, changed) in found.items():
                assert applied == changed == (what == "nothing"), (name, what)


def test_resume_is_bitwise_at_every_stage(reports):
    for report in reports.values():
        assert all(
            same_losses and same_state for same_losses, same_state in report["again"].values()
        ), report["again"]


def has(reader, slot, name):
    return any(f"{slot}/{name}" in reader.file(rank)[1] for rank in range(len(reader.names)))


def test_checkpoints_convert_between_stages_and_world_sizes(reports):
    """Checkpoints are loaded at another stage or world size and saved there.

    Every slot stays equal bit by bit, and so do the step count and the next loss.
    """
    losses = {}
    for report in reports.values():
        assert len(report["converted"]) == 2 * 4 * 5
        for source, saved, loss in report["converted"]:
            before, after = Reader(source), Reader(saved)
            assert before.manifest["optimizer_step"] == after.manifest["optimizer_step"] == 4
            for slot in SLOTS["muon"]:
                for name in before.manifest["shapes"]:
                    assert has(before, slot, name) == has(after, slot, name)
                    if has(before, slot, name):
                        same = torch.equal(before.full(slot, name), after.full(slot, name))
                        assert same, (saved, slot, name)
            losses.setdefault(source, []).append(loss)
    for source, found in losses.items():
        assert len(found) >= 4 and found == pytest.approx(found[:1] * len(found), rel=1e-6), source


def test_every_zero_key_reaches_deepspeed():
    config = parse(
        "",
        overrides=[
            "zero.stage=2",
            "zero.reduce_precision=fp32",
            "zero.overlap_comm=true",
            "optim.clip=0.25",
            "zero.reduce_bucket_size=11",
            "zero.allgather_bucket_size=12",
            "zero.prefetch_bucket_size=13",
            "zero.param_persistence_threshold=14",
            "zero.max_live_parameters=15",
        ],
    )
    made = zero.deepspeed_config(config, torch.device("cpu"), 4, 2)
    assert made["communication_data_type"] == "fp32" and made["data_types"] == {
        "grad_accum_dtype": "fp32"
    }
    # DeepSpeed reads the section with this function.
    timers = pytest.importorskip("deepspeed.utils.config").get_timers_config
    assert not timers(made).enabled and timers({}).enabled
    assert (
        made["gradient_clipping"],
        made["train_micro_batch_size_per_gpu"],
        made["gradient_accumulation_steps"],
    ) == (0.25, 4, 2)
    assert made["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 11,
        "allgather_bucket_size": 12,
        "stage3_prefetch_bucket_size": 13,
        "stage3_param_persistence_threshold": 14,
        "stage3_max_live_parameters": 15,
        "stage3_max_reuse_distance": 30,
        "zero_hpz_partition_size": 1,
        "memory_efficient_linear": False,
    }
    config = parse("", overrides=["zero.hpz_partition_size=8"])
    for device, overlaps in (("cpu", False), ("cuda", True)):
        made = zero.deepspeed_config(config, torch.device(device), 1, 1)["zero_optimization"]
        assert made["zero_hpz_partition_size"] == 8 and made["overlap_comm"] is overlaps
    assert zero.reduce_dtype(parse("")) == torch.bfloat16
    assert zero.reduce_dtype(parse("", overrides=["precision=fp32"])) == torch.float32


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["zero.stage=4"], "zero.stage must be one of"),
        (["zero.reduce_precision=fp16"], "zero.reduce_precision must be one of bf16"),
        (["zero.reduce_bucket_size=0"], "zero.reduce_bucket_size must be >= 1, got 0"),
        (["zero.allgather_bucket_size=7"], "zero.allgather_bucket_size must be even, got 7"),
        (["zero.max_live_parameters=-1"], "zero.max_live_parameters must be >= 0, got -1"),
        (
            ["zero.stage=2", "zero.hpz_partition_size=8"],
            "zero.hpz_partition_size needs zero.stage 3, got stage 2",
        ),
        (["optim.adamw=fused"], "optim.adamw must be one of torch, apex; got 'fused'"),
    ],
)
def test_invalid_keys_are_named(overrides, message):
    with pytest.raises(InputError, match=message):
        parse("", overrides=overrides)


@pytest.mark.parametrize(
    "stage, weights, gradients, state", [(0, 1, 1, 1), (1, 1, 1, 8), (2, 1, 8, 8), (3, 8, 8, 8)]
)
def test_planned_memory_depends_on_the_stage(stage, weights, gradients, state):
    """Each part is split over 1 or 8 ranks. Only stage 3 gathers blocks, up to the limit."""
    plan = make_plan(
        load_config(
            "iomm-b-512", ["data.shards=shapes", f"zero.stage={stage}", "train.compile=false"]
        ),
        ranks=8,
    )
    trained = sum(plan.parameters[name] for name in ("generator", "adapter"))
    assert (
        plan.memory["working weights"] == 2 * trained / weights
        and plan.memory["gradients"] == 4 * trained / gradients
    )
    assert plan.memory["masters"] == 4 * trained / state and plan.memory["gathered blocks"] == (
        2e9 if stage == 3 else 0
    )


def test_hpz_partition_size_must_divide_the_ranks():
    config = load_config("iomm-b-512", ["data.shards=shapes", "zero.hpz_partition_size=8"])
    message = (
        "zero.hpz_partition_size must divide the number of ranks, got 8 and 4: "
        "give the number of GPUs of one machine"
    )
    with pytest.raises(InputError, match=message):
        make_plan(config, ranks=4)
    with pytest.raises(InputError, match=message):
        config.zero.check_ranks(4)


def test_frozen_linears_keep_no_inputs(monkeypatch):
    """DeepSpeed's linear, which a GPU run uses without compilation, is for trained weights only.

    A frozen linear keeps its weight and nothing else. Outputs and gradients stay the same.
    """

    def run(trained):
        kept, generator = [], torch.Generator().manual_seed(0)
        weight = torch.randn(5, 7, generator=generator).requires_grad_(trained)
        x = torch.randn(3, 4, 7, generator=generator, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor
        ):
            y = torch.nn.functional.linear(x, weight)
        y.square().sum().backward()
        return x.data_ptr() in kept, y, x.grad

    keeps, y, gradient = run(trained=False)
    of_deepspeed = importlib.import_module("deepspeed.runtime.zero.linear").zero3_linear_wrap
    monkeypatch.setattr(torch.nn.functional, "linear", of_deepspeed)
    assert not keeps and run(trained=False)[0]
    zero.spare_frozen_linears()
    keeps, again, gradient_again = run(trained=False)
    assert not keeps and run(trained=True)[0]
    torch.testing.assert_close((again, gradient_again), (y, gradient), rtol=0, atol=0)
