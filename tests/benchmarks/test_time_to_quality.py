"""Tests of benchmarks/studies/time_to_quality.py.

They cover the arithmetic on curves, the equality of both sides (start, samples, function), and the
command.
"""

import json
import math
import os
from dataclasses import replace
from itertools import tee
from unittest import mock

import pytest
import torch

from benchmarks import report
from benchmarks.studies import time_to_quality
from benchmarks.studies.time_to_quality import VARIANTS, crossing, loss_targets, ratios, summarise
from iomm.config import InputError
from iomm.engine import launch
from iomm.engine.config import load_config
from iomm.engine.parallel import ranks as group

# Steps of eight 16 px images.
TINY = """
model: {preset: demo, mllm: shapes, vae: "pixel:2"}
mask: {ratio: 0.5}
adapter: {num_queries: 8, head_dim: 32}
data: {num_images: 48, heldout: 8, size_px: 16}
train: {global_batch: 8, steps: 2}
optim: {kind: muon, lr: 6e-3, warmup_steps: 20}
ema: {decay: 0.997}
zero: {stage: 0}
precision: fp32
"""


@pytest.fixture
def tiny(tmp_path):
    """Path of a config."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture
def one_rank(monkeypatch):
    """Ranks of a group of one in this process; its settings are removed afterwards."""
    # prepare_process changes malloc for the rest of the process.
    monkeypatch.setattr(launch, "prepare_process", lambda config, ranks: None)
    with mock.patch.dict(os.environ):
        try:
            yield group.start(60)
        finally:
            group.stop()


def test_crossing_is_interpolated_between_two_points():
    assert crossing([0, 10, 20], [1.0, 0.5, 0.3], 0.4, falling=True) == pytest.approx(15)
    assert crossing([0, 10, 20], [0.0, 0.2, 0.6], 0.3, falling=False) == pytest.approx(12.5)


def test_crossing_uses_the_best_value_so_far():
    # From 0.6 at 10 s, not from the worse 0.8 at 20 s. Later points do not matter.
    times, losses = [0, 10, 20, 30, 40], [1.0, 0.6, 0.8, 0.4, 0.9]
    assert crossing(times, losses, 0.5, falling=True) == pytest.approx(25)
    assert crossing(times, losses, 0.6, falling=True) == 10


def test_crossing_at_the_start_and_without_a_crossing():
    assert crossing([0, 10], [0.5, 0.4], 0.7, falling=True) == 0
    assert crossing([0, 10], [0.5, 0.4], 0.3, falling=True) is None
    assert crossing([0, 10], [0.0, 0.2], 0.5, falling=False) is None


def test_ratios_are_taken_seed_by_seed():
    found = ratios([20.0, 30.0, 44.0], [10.0, 10.0, 40.0], limits=[60.0] * 3)
    assert found["seeds"] == pytest.approx([2.0, 3.0, 1.1]) and not found["at_least"]
    assert (found["median"], found["low"], found["high"]) == pytest.approx((2.0, 1.1, 3.0))


def test_ratio_is_a_bound_if_a_seed_never_reaches():
    # The baseline trained for 60 s without reaching the target: at least six times longer.
    found = ratios([20.0, None], [10.0, 10.0], limits=[60.0, 60.0])
    assert found["at_least"] and found["seeds"] == pytest.approx([2.0, 6.0])
    assert ratios([20.0, 20.0], [10.0, None], limits=[60.0, 60.0]) is None
    # A quality that is reached at the start has no ratio.
    assert ratios([0.0], [0.0], limits=[60.0]) is None


def curve(seconds, losses, scores, steps_per_s=2):
    return {
        "s": seconds,
        "cpu_s": [2 * s for s in seconds],
        "steps": [steps_per_s * s for s in seconds],
        "loss": losses,
        "score": scores,
    }


def synthetic_runs(done=(True, True), baseline="baseline"):
    """Return a result of two seeds and two variants; `ours+latents` encodes for 10 s and 20 s."""
    slow = curve([0, 20, 40], [1.0, 0.6, 0.4], [0.0, 0.1, 0.3])
    runs = [
        {
            "encoding_s": {"ours+latents": 10.0},
            "curves": {
                baseline: slow,
                "ours+latents": curve(
                    [0, 10, 20, 40], [1.0, 0.6, 0.4, 0.3], [0.0, 0.1, 0.3, 0.6], steps_per_s=4
                ),
            },
        },
        {
            "encoding_s": {"ours+latents": 20.0},
            "curves": {
                baseline: slow,
                "ours+latents": curve([0, 20, 40], [1.0, 0.4, 0.2], [0.0, 0.2, 0.4], steps_per_s=4),
            },
        },
    ]
    for run, is_done in zip(runs, done, strict=True):
        run["done"] = is_done
    return {
        "config": "demo",
        "overrides": [],
        "precision": "fp32",
        "runs": runs,
        "losses_given": [],
        "scores_given": [0.3, 0.9],
    }


def test_loss_targets_are_reached_by_every_seed():
    curves = [
        curve([0, 20, 40], [1.0, 0.6, 0.4], None),
        curve([0, 20, 40], [1.0, 0.8, 0.50001], None),
    ]
    assert loss_targets(curves, (0.5, 1.0)) == [0.8, 0.5001]
    for target in (0.8, 0.5001):
        assert all(crossing(c["s"], c["loss"], target, falling=True) is not None for c in curves)


def test_summary_of_synthetic_runs():
    result = synthetic_runs()
    summarise(result)
    assert result["targets"] == {"loss": [0.8, 0.6, 0.4], "score": [0.3, 0.9]}
    rows = {(row["what"], row["target"], row["variant"]): row for row in result["reached"]}
    # No variant reached a score of 0.9.
    assert len(rows) == 8 and ("score", 0.9, "baseline") not in rows
    baseline, ours = rows["loss", 0.4, "baseline"], rows["loss", 0.4, "ours+latents"]
    assert baseline["s"] == [40, 40] and baseline["cpu_s"] == [80, 80] and "ratio" not in baseline
    assert ours["s"] == pytest.approx([20, 20]) and ours["s_encoded"] == pytest.approx([30, 40])
    assert ours["ratio"]["seeds"] == pytest.approx([2, 2])
    assert ours["ratio_steps"]["seeds"] == pytest.approx([1, 1])
    assert ours["ratio_encoded"]["seeds"] == pytest.approx([40 / 30, 1])
    json.dumps(result)


def test_unfinished_seed_counts_only_if_none_is_done():
    result = synthetic_runs(done=(True, False))
    summarise(result)
    assert all(len(row["s"]) == 1 for row in result["reached"])
    result = synthetic_runs(done=(False, False))
    summarise(result)
    assert all(len(row["s"]) == 2 for row in result["reached"])


@pytest.mark.parametrize("spelling", ["baseline", "plain"])
def test_report_has_a_row_per_quality(spelling):
    result = synthetic_runs(baseline=spelling)
    summarise(result)
    what = (
        "training time to a {} of {}, `demo` (fp32, 2 seed(s)); "
        "ratios: baseline's time over the variant's"
    )
    rows = dict(report.time_to_quality(result))
    assert rows[what.format("held-out velocity loss", 0.4)] == (
        "baseline 40 s; ours+latents 20 s, 2.00 x (2.00 to 2.00), 1.00 x in steps, 1.17 x "
        "including the encoding"
    )
    # The baseline never reached these scores in its 40 s. The other variant reached 0.31 after
    # 20.7 s and 31 s, and 0.5 in one seed.
    result["scores_given"] = [0.31, 0.5]
    summarise(result)
    rows = dict(report.time_to_quality(result))
    assert rows[what.format("strict score", 0.31)] == (
        "baseline reached it in 0 of 2 seeds; ours+latents 26 s, at least 1.61 x (1.29 to 1.94), "
        "0.81 x in steps, 1.04 x including the encoding"
    )
    assert rows[what.format("strict score", 0.5)] == (
        "baseline reached it in 0 of 2 seeds; ours+latents reached it in 1 of 2 seeds"
    )


def reversed_batches(batches):
    """Yield the batches with their samples reversed; their losses differ by rounding only."""
    for batch in batches:
        yield replace(
            batch,
            n_B=batch.n_B.flip(0),
            entry_B=batch.entry_B.flip(0),
            captions=batch.captions[::-1],
            pixels_BCHW=batch.pixels_BCHW.flip(0),
            vit_pixels_BHWC=batch.vit_pixels_BHWC.flip(0),
            has_image=batch.has_image[::-1],
        )


def distance(weights, others):
    """Return the norm of the difference without the bias of the adapter's keys.

    That bias cancels in the softmax, so both sides train it on rounding errors only.
    """
    return (
        sum(
            (weights[name].double() - others[name].double()).square().sum().item()
            for name in weights
            if name != "adapter.to_k.bias"
        )
        ** 0.5
    )


def test_ours_and_baseline_train_equally(one_rank, tiny, tmp_path):
    """Both sides start equally, see the same samples and have the same losses.

    Losses and averaged weights of four steps of Muon agree as closely as two runs of the baseline,
    one of which sums its batches in reverse order.
    """
    config = load_config(tiny, [f"run.dir={tmp_path / 'run'}", "train.steps=4"])
    ours, baseline, again = (
        time_to_quality.start(VARIANTS[name], config, one_rank)
        for name in ("ours", "baseline", "baseline")
    )
    start, theirs = (
        {name: tensor.clone() for name, tensor in trained.averaged().items()}
        for trained in (ours, baseline)
    )
    assert start.keys() == theirs.keys()
    assert all(torch.equal(start[name], theirs[name]) for name in start)
    losses, samples = [], []
    for trained in (ours, baseline, again):
        trained.batches, seen = tee(trained.batches)
        if trained is again:
            trained.batches = reversed_batches(trained.batches)
        losses.append(torch.tensor([trained.step() for _ in range(4)], dtype=torch.float64))
        samples.append(
            [
                (b.n_B.tolist(), b.entry_B.tolist(), b.pixels_BCHW)
                for b in (next(seen) for _ in range(4))
            ]
        )
    for mine, its in zip(*samples[:2], strict=True):
        assert mine[:2] == its[:2] and torch.equal(mine[2], its[2])
    error, rounding = (losses[0] - losses[1]).abs(), (losses[2] - losses[1]).abs().max()
    apart = [distance(trained.averaged(), baseline.averaged()) for trained in (ours, again)]
    print(
        f"losses {error.max():.1e}, reversed {rounding:.1e}; weights {apart[0]:.1e}, reversed "
        f"{apart[1]:.1e}"
    )
    # Each side rounds its own mean once more.
    assert (error <= 2 * rounding + 2 * torch.finfo(torch.float32).eps * losses[1]).all()
    assert apart[0] <= 2 * apart[1] < 1e-3 * distance(baseline.averaged(), start)


@pytest.mark.parametrize(
    "setting, words",
    [
        ("adapter.kind=metaquery", "adapter.kind is metaquery, expected rqa"),
        ("mask.mode=zero", "mask.mode is zero, expected drop"),
        ("model.preset=iomm-xl", "no FLUX blocks"),
        ("data.shards=photographs", "data.shards is photographs, expected shapes"),
    ],
)
def test_config_without_a_baseline_is_rejected(setting, words, tiny):
    with pytest.raises(InputError, match=words):
        time_to_quality.main(["--config", tiny, setting])


def test_stage_2_needs_init_and_variants_are_checked(tiny, capsys):
    with pytest.raises(InputError, match=r"add run\.init=RUN"):
        time_to_quality.main(["--stage", "finetune", "--config", tiny])
    with pytest.raises(SystemExit):
        time_to_quality.main(["--variants", "plain,fast"])
    assert "'fast' is none of baseline, literal, ours" in capsys.readouterr().err
    assert time_to_quality.listed(time_to_quality.variant_name)("plain,ours,baseline") == [
        "baseline",
        "ours",
    ]


def test_command_with_a_variant_that_is_left_out(one_rank, tiny, monkeypatch, tmp_path, capsys):
    """Two turns of one step each: every figure exists, and each turn writes the result."""
    real, written = time_to_quality.variant_config, []

    def variant_config(variant, *given):
        if variant.encoded == "disk":
            raise InputError("no room")
        return real(variant, *given)

    def write(path, content):
        written.append(json.loads(json.dumps(content)))
        path.write_text(json.dumps(content))

    monkeypatch.setattr(time_to_quality, "variant_config", variant_config)
    monkeypatch.setattr(time_to_quality, "write", write)
    # Use the group of the fixture, which also ends it.
    monkeypatch.setattr(group, "start", lambda timeout_s: one_rank)
    monkeypatch.setattr(group, "stop", lambda: None)
    assert (
        time_to_quality.main(
            [
                "--config",
                tiny,
                "--seeds",
                "1",
                "--slice",
                "1e-3",
                "--variants",
                "plain,ours+cache,everything",
                "--per-kind",
                "1",
                "--draw-steps",
                "1",
                "--results",
                str(tmp_path),
                "optim.schedule=cosine",
            ]
        )
        == 0
    )
    points = [
        sum(len(curve["s"]) for curve in result["runs"][0]["curves"].values()) for result in written
    ]
    assert points == [3, 4, 5, 6, 6]
    result = json.loads(next(tmp_path.glob("time-to-quality-tiny-*-cpu-*.json")).read_text())
    (run,) = result["runs"]
    assert (
        run["done"]
        and list(run["encoding_s"]) == ["everything"]
        and run["encoding_s"]["everything"] > 0
    )
    assert result["left_out"] == {"ours+cache": "no room"} and result["steps"] == 2
    for found in run["curves"].values():
        assert found["steps"] == [0, 1, 2] and 0 == found["s"][0] < found["s"][1] < found["s"][2]
        assert all(0 < loss < math.inf for loss in found["loss"]) and all(
            0 <= x <= 1 for x in found["score"]
        )
    assert list(run["curves"]) == ["baseline", "everything"]
    baseline, ours = run["curves"].values()
    assert baseline["loss"][0] == ours["loss"][0] and baseline["score"][0] == ours["score"][0]
    assert len(list(report.time_to_quality(result))) == len(result["reached"]) / 2 >= 1
    output = capsys.readouterr().out
    assert "ours+cache is skipped: no room\n" in output
    assert "loss on one batch with the weights of baseline" in output
    assert len(list(tmp_path.glob("*.png"))) == 1
