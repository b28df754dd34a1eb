"""The frozen base of LoRA, sharded over the ranks of a node (helpers/base_shard_ranks.py).

Three ranks on two hosts: 0 and 2 share one, 1 is by itself. test_lora_ranks.py has whole runs.
"""

import json

import pytest
from base_shard_ranks import CASES
from launches import ROOT, finish, start_ranks

from iomm.engine.parallel.base_shards import ALIGNMENT, gathers


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Return the reports of the ranks."""
    folder = tmp_path_factory.mktemp("shards")
    script, output = ROOT / "tests/helpers/base_shard_ranks.py", folder / "output.txt"
    codes = finish(start_ranks(3, script, str(folder), output=str(output)))
    assert not any(codes), output.read_text()[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_whole_base_to_the_bit(reports, name):
    for report in reports:
        assert all(report[name]["equal"])
        ours, whole = report[name]["checksums"]
        assert ours == whole


@pytest.mark.parametrize("name", CASES)
def test_a_missing_gather_is_found(reports, name):
    """It is planted in a block's second gather, in the backward pass or in the next step."""
    assert all(not all(report[name]["faulty_equal"]) for report in reports)


@pytest.mark.parametrize("name", CASES)
def test_each_rank_of_a_node_keeps_an_equal_part(reports, name):
    for rank, report in enumerate(reports):
        case = report[name]
        assert case["ranks_of_nodes"] == [2, 1]
        num_ranks = 1 if rank == 1 else 2
        for part, weights in zip(case["parts"], case["weights"], strict=True):
            assert part % ALIGNMENT == 0
            # At most 23 tensors in a block, each padded, and then the parts.
            assert weights <= num_ranks * part <= weights + 25 * ALIGNMENT
        assert case["most_bytes"] <= 2 * num_ranks * max(case["parts"])


@pytest.mark.parametrize("name", CASES)
def test_gathers_are_those_that_are_counted(reports, name):
    """They are counted before a run, for the dry run and benchmarks/lib/traffic.py."""
    for rank, report in enumerate(reports):
        case = report[name]
        num_ranks = 1 if rank == 1 else 2
        counted = [num_ranks * case["parts"][block] for _, block in case["gathers"]]
        assert case["gathered_bytes"] == counted


def test_every_block_is_gathered_once_in_each_direction():
    """But for the first and the last one, which are kept from one to the other."""
    found = gathers(4)
    assert found == [(0, 1), (1, 2), (2, 3), (4, 2), (5, 1), (6, 0)]
    # Blocks 0 and 1 have no backward pass. The one before the last is still gathered for nothing.
    late = gathers(4, first=2)
    assert late == [(0, 0), (1, 2), (2, 3), (4, 2), (5, 1)]
