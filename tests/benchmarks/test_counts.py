"""Tests that the committed counts of work, steps and graph breaks match this checkout."""

import json

import pytest
import torch

from benchmarks.lib import counts
from iomm.engine.dry_run import build_without_weights
from iomm.flops import flops_per_image
from iomm.internvl import prompt_tokenizer

COMMITTED = json.loads(counts.FILE.read_text())
AGAIN = "if the change is intended, run python benchmarks/lib/counts.py --write and commit the file"


@pytest.mark.parametrize("name", ["demo-cpu", pytest.param("iomm-b-512", marks=pytest.mark.slow)])
def test_work_matches_committed_counts(name):
    assert counts.work(name) == COMMITTED["work"][name], AGAIN


def test_work_resolves_short_names_of_frozen_parts():
    """model.mllm=shapes is a folder of this checkout that only builders.mllm_name resolves."""
    found = counts.work("demo")
    assert found["baseline, all outputs"]["ratio"] > found["baseline"]["ratio"] > 1


def test_step_counts_match_committed_counts():
    if torch.__version__.partition("+")[0] != COMMITTED["step"]["torch"]:
        pytest.skip(f"the counts of a step are valid for torch {COMMITTED['step']['torch']} only")
    assert counts.step_counts() == COMMITTED["step"]["demo-cpu"], AGAIN


def test_generator_blocks_have_no_graph_breaks():
    assert counts.graph_breaks() == COMMITTED["step"]["graph_breaks"] == 0


def test_part_flops_sum_to_the_flops_of_mfu():
    config = counts.counted("demo-cpu")
    model = build_without_weights(config)
    model.frozen[0].tokenizer = prompt_tokenizer()
    parts = counts.part_flops(model, config.data.size_px)
    assert sum(parts.values()) == pytest.approx(
        flops_per_image(model, config.data.size_px), rel=1e-9
    )


def test_step_flops_match_the_formulas():
    """Within 2 %.

    These two images show a few tokens less than the mask ratio implies, and the SDPA backend
    computes gradients of the prefix that are not used.
    """
    work = COMMITTED["work"]["demo-cpu"]["flops"]
    assert COMMITTED["step"]["demo-cpu"]["flops"] == pytest.approx(2 * sum(work.values()), rel=0.02)


def test_demo_cpu_has_the_proportions_of_iomm_b():
    small, real = (COMMITTED["work"][name] for name in ("demo-cpu", "iomm-b-512"))
    for row in ("baseline", "baseline, all outputs"):
        assert small[row]["ratio"] == pytest.approx(real[row]["ratio"], rel=0.02)
    shares = [
        {part: flops / sum(work["flops"].values()) for part, flops in work["flops"].items()}
        for work in (small, real)
    ]
    assert all(abs(shares[0][part] - share) < 0.03 for part, share in shares[1].items())


def test_count_handles_views_writes_and_new_tensors():
    x, y = torch.ones(4, 8), torch.ones(8, 2)
    with counts.Count() as count:
        # Views are not counted.
        x.view(8, 4).t()
        # Reads 128 + 64 bytes and writes 32.
        x @ y
        # Reads and writes 128 bytes each.
        x.add_(1)
    assert (count.calls, count.tensors) == (2, 1) and count.bytes == 128 + 64 + 32 + 128 + 128
    (value, gradient, first, second), step = torch.ones(4, 10), torch.ones(())
    for expected, work in (
        (
            # 4 bytes are the step.
            7 * 40 + 4,
            lambda: torch._fused_adamw_(
                [value],
                [gradient],
                [first],
                [second],
                [],
                [step],
                lr=0.1,
                beta1=0.9,
                beta2=0.99,
                weight_decay=0.0,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            ),
        ),
        (3 * 40, lambda: torch._foreach_lerp_([value], [first], 0.5)),
        (2 * 40, lambda: value.copy_(first)),
    ):
        with counts.Count() as count:
            work()
        assert count.bytes == expected
