"""Tests of benchmarks/studies/ablation.py: its cells and their README rows."""

import pytest

from benchmarks.studies.ablation import CELLS, cells, rows, step_flops


def by_seed(*losses):
    """Return results of heldout_loss, of 10, 20, ... s."""
    return {str(n): {"mean": loss, "training_s": 10 * (n + 1)} for n, loss in enumerate(losses)}


def test_alignment_differences_are_per_seed():
    """Seeds differ by 1, the effect is -0.1 +-0.01.

    Student's t with 2 degrees of freedom: 4.303 x 0.01 / sqrt(3).
    """
    runs = {
        "no alignment": by_seed(1.0, 2.0, 3.0),
        "weight 1, block 2": by_seed(0.89, 1.9, 2.91),
    }
    assert rows(runs) == {
        "no alignment": "held-out loss 2.0000; 20 s",
        "weight 1, block 2": (
            "held-out loss 1.9000, -0.1000 against no alignment "
            "(95 % interval -0.1248 to -0.0752); 20 s"
        ),
    }


def test_alignment_rows_skip_incomplete_cells():
    runs = {
        "no alignment": by_seed(1.0),
        "weight 1, block 2": by_seed(0.9),
        "weight 0.5, block 2": {},
    }
    assert rows(runs) == {
        "no alignment": "held-out loss 1.0000; 10 s",
        "weight 1, block 2": "held-out loss 0.9000, -0.1000 against no alignment; 10 s",
    }


def test_alignment_cells_include_the_demo():
    from iomm.engine.config import load_config

    align = load_config("demo").align
    settings = [f"align.weight={align.weight}", f"align.block={align.block}"]
    assert settings in CELLS["alignment"].values()


@pytest.mark.parametrize("ablation, takes_more", [("routing", True), ("noise", False)])
def test_same_work_cells_take_other_steps(ablation, takes_more):
    plain, *_, other = cells(ablation, 1000).values()
    assert plain[1] == 1000 and (other[1] > 1000) == takes_more
    work = [step_flops(settings) * steps for settings, steps in (plain, other)]
    assert abs(work[1] / work[0] - 1) < 1 / 1000
