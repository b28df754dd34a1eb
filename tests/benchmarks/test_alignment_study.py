"""benchmarks/studies/alignment.py: differences to the cell without alignment, seed by seed."""

from benchmarks.studies.alignment import CELLS, rows


def test_differences_are_taken_seed_by_seed():
    """Seeds that differ by 1 and an effect of -0.1 +-0.01: Student's t with 2 degrees of freedom, 4.303 x 0.01 / sqrt(3)."""
    runs = {
        "no alignment": {"0": {"mean": 1.0}, "1": {"mean": 2.0}, "2": {"mean": 3.0}},
        "weight 1, block 2": {"0": {"mean": 0.89}, "1": {"mean": 1.9}, "2": {"mean": 2.91}},
    }
    assert rows(runs) == {
        "no alignment": "held-out loss 2.0000",
        "weight 1, block 2": "held-out loss 1.9000, -0.1000 against none (95 % interval -0.1248 to -0.0752)",
    }


def test_cells_without_all_seeds_are_left_out_and_one_seed_has_no_interval():
    runs = {
        "no alignment": {"0": {"mean": 1.0}},
        "weight 1, block 2": {"0": {"mean": 0.9}},
        "weight 0.5, block 2": {},
    }
    assert rows(runs) == {
        "no alignment": "held-out loss 1.0000",
        "weight 1, block 2": "held-out loss 0.9000, -0.1000 against none",
    }


def test_weight_and_block_of_the_demo_are_a_cell():
    from iomm.engine.config import load_config

    align = load_config("demo").align
    assert (align.weight, align.block) in CELLS.values()
