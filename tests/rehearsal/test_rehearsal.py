"""The CUDA code path of the engine, run on a pretended device (helpers/pretended_cuda.cpp).

The engine itself starts, trains and saves; only the device, NCCL and DALI are replaced. Where the
host waits for the device is recorded in host_waits.json:

    python tests/rehearsal/rehearse.py zero-3          # prints every wait with its lines
    python tests/rehearsal/rehearse.py --record        # rewrites the file after a change

Not seen: times, and the kernels of cuBLAS, cuDNN, NCCL, Triton and DALI.
"""

import importlib.util
import json
import math
import subprocess
import sys

import full_size
import pretended_cuda_build
import pytest
from launches import environment
from rehearse import CASES, COUNTED, FULL_SIZE, HOST_WAITS, RECORDED, ROOT, host_waits

LIMIT_S = 900
# A micro-batch of IOMM-XL is ten thousands of calls, and compiling it takes minutes.
FULL_SIZE_LIMIT_S = 3600
pytestmark = pytest.mark.skipif(
    bool(pretended_cuda_build.why_not()), reason=str(pretended_cuda_build.why_not())
)


def rehearse(folder, *cases, limit_s=LIMIT_S):
    """Return {case: reports of its ranks} of one process that forks a process per rank."""
    arguments = ["--report", folder / "report", *cases]
    with open(folder / "output.txt", "w") as output:
        code = subprocess.run(
            [sys.executable, ROOT / "tests/rehearsal/rehearse.py", *arguments],
            env={**environment(), "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
        ).returncode
    assert code == 0, (folder / "output.txt").read_text()[-4000:]
    return json.loads((folder / "report").read_text())


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Return the reports of all cases that are not slow, and of the planted faults."""
    return rehearse(tmp_path_factory.mktemp("rehearsal"))


def reports_of(rehearsed, case):
    for report in rehearsed[case]:
        assert "failed" not in report, report["failed"]
    return rehearsed[case]


def losses_of(rehearsed, case):
    return [report["losses"] for report in reports_of(rehearsed, case)]


def test_a_run_trains_to_its_end_and_saves(rehearsed):
    [report] = reports_of(rehearsed, "zero-3")
    assert report["code"] == 0 and len(report["losses"]) == 3


def test_compiled_blocks_have_whole_graphs_and_the_same_loss(rehearsed):
    [report] = reports_of(rehearsed, "compiled")
    assert report["graphs"] > 0 and report["breaks"] == {}
    # Encoded images, as in zero-0; ZeRO changes nothing before the first update.
    [[loss, _]] = losses_of(rehearsed, "zero-0")
    assert report["losses"] == [loss]


@pytest.mark.parametrize("case", RECORDED)
def test_accesses_are_ordered_between_streams(rehearsed, case):
    for report in reports_of(rehearsed, case):
        # A micro-batch has more than a thousand calls.
        assert report["calls"] > 4000 and report["races"] == {}


@pytest.mark.parametrize("case", RECORDED)
def test_host_waits_are_the_recorded_ones(rehearsed, case):
    assert_recorded_waits(rehearsed, case)


def assert_recorded_waits(rehearsed, case):
    recorded = json.loads(HOST_WAITS.read_text())
    found = host_waits(reports_of(rehearsed, case)[0])
    same_libraries = all(recorded[name] == rehearsed[name] for name in ("torch", "deepspeed"))

    def comparable(waits):
        # Another version of DeepSpeed may wait elsewhere.
        return {
            wait: number
            for wait, number in waits.items()
            if same_libraries or not wait.startswith("deepspeed/")
        }

    for name in ("micro-batch", "step"):
        assert comparable(found[name]) == comparable(recorded[case][name]), (
            f"run `python tests/rehearsal/rehearse.py --record {case}` if the change is intended"
        )


def test_an_added_read_of_a_value_is_found(rehearsed):
    [report] = reports_of(rehearsed, "zero-0")
    clean, planted = (host_waits(report, step)["micro-batch"] for step in (COUNTED, 3))
    added = {wait: n - clean.get(wait, 0) for wait, n in planted.items() if n != clean.get(wait)}
    assert added == {"engine/loop.py:train_step: aten::_local_scalar_dense": 1}


def test_a_tensor_on_another_device_is_refused(rehearsed):
    [report] = reports_of(rehearsed, "zero-0")
    assert "two devices, cuda:0 and cpu" in report["error"]
    # In an op whose kernel does not check its arguments itself.
    [report] = reports_of(rehearsed, "mixed devices")
    assert report["error"] == "aten::mm got tensors on cuda:0 and on cpu"


def test_gradients_of_an_op_that_only_cuda_has(rehearsed):
    assert reports_of(rehearsed, "rms norm") == [{"passed": True}]


def test_a_missing_wait_between_streams_is_found(rehearsed):
    assert reports_of(rehearsed, "prefetcher") == [{"races": []}]
    [report] = reports_of(rehearsed, "prefetcher without wait_stream")
    [race] = report["races"]
    assert race.startswith("aten::pow on stream 0") and "is not ordered after aten::add" in race


def test_a_block_freed_too_early_is_found(rehearsed):
    [report] = reports_of(rehearsed, "prefetcher without record_stream")
    race, *_ = report["races"]
    assert "may get memory that aten::pow on stream 0" in race


def test_waits_are_told_from_calls_that_return_at_once(rehearsed):
    [report] = reports_of(rehearsed, "waits")
    assert report == {
        "free": [],
        "waits": [
            "copy host to device with pageable memory",
            "copy device to host",
            "copy of Python values to the device",
            "aten::index by a mask",
            "aten::repeat_interleave without output_size",
            "copy device to host",
            "event.synchronize()",
            "torch.cuda.synchronize()",
        ],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [name for name, case in CASES.items() if case.slow and not case.config]
)
def test_variants(case, tmp_path):
    [report] = reports_of(rehearse(tmp_path, case), case)
    assert report["code"] == (None if CASES[case].last_step else 0)
    assert all(math.isfinite(loss) for loss in report["losses"]) and report["losses"]
    assert report["races"] == {} and report["breaks"] == {}
    assert report["calls"] > 10000 or not CASES[case].watched


@pytest.mark.slow
def test_overlap_and_evaluation_do_not_change_losses(tmp_path):
    cases = ("zero-3", "overlap", "evaluation")
    found = rehearse(tmp_path, *cases)
    expected, *others = (losses_of(found, case) for case in cases)
    assert others == [expected] * len(others)


def rehearse_full_size(folder, case):
    """Return the report of a published config, and what benchmarks/lib/counts.json has of it.

    The latter is None if it was recorded with other versions.
    """
    if CASES[case].compiled and importlib.util.find_spec("triton") is None:
        pytest.skip("no triton, which compiles what Inductor generates")
    rehearsed = rehearse(folder, case, limit_s=FULL_SIZE_LIMIT_S)
    recorded = json.loads(full_size.COUNTS.read_text())["full size"]
    libraries = ["torch", "deepspeed", *(["triton"] if CASES[case].compiled else [])]
    same = all(recorded["versions"].get(name) == rehearsed[name] for name in libraries)
    return rehearsed, recorded if same else None


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL_SIZE)
def test_full_size(case, tmp_path):
    rehearsed, recorded = rehearse_full_size(tmp_path, case)
    [report] = reports_of(rehearsed, case)
    assert all(map(math.isfinite, report["losses"]))
    assert len(report["losses"]) == CASES[case].last_step
    assert report["races"] == {} and report["breaks"] == {}
    if CASES[case].watched:
        assert report["calls"] > 10000
        assert_recorded_waits(rehearsed, case)
    seen = report["full_size"]
    counts = full_size.counts(seen)
    if CASES[case].compiled:
        assert counts["compiled"]["spilling kernels"] == 0
        # The condition of the second micro-batch has other lengths.
        first, second = seen["graphs"]
        assert first == second > 0
    if recorded is None:
        pytest.skip("the counts were recorded with other versions of torch, DeepSpeed or Triton")
    assert counts == recorded[case], (
        f"run `python tests/rehearsal/rehearse.py --record {case}` if the change is intended"
    )


@pytest.mark.slow
def test_activations_kept_in_vain_are_found(tmp_path):
    """DeepSpeed's own linear keeps the inputs of frozen layers, see engine/parallel/zero.py."""
    rehearsed, recorded = rehearse_full_size(tmp_path, "full-b-planted")
    [report] = reports_of(rehearsed, "full-b-planted")
    if recorded is None:
        pytest.skip("the counts were recorded with other versions of torch or DeepSpeed")
    seen, clean = full_size.counts(report["full_size"])["bytes"], recorded["full-b"]["bytes"]
    assert seen["kept for the backward pass"] - clean["kept for the backward pass"] > 3 * 2**30
    assert seen["peak"] > clean["peak"]


@pytest.mark.slow
def test_spills_and_graph_breaks_are_found(tmp_path):
    pytest.importorskip("triton")
    case = "spill and break"
    [report] = reports_of(rehearse(tmp_path, case), case)
    assert report["breaks"] > 0 and report["launches"] >= len(report["stacks"]) > 0
    assert any(min(stacks) > 0 for stacks in report["stacks"].values())
