"""The CUDA code path of the engine, run on a pretended device (helpers/pretended_cuda.cpp).

The engine itself starts, trains and saves; only the device, NCCL and DALI are replaced. Where the
host waits for the device is recorded in host_waits.json:

    python tests/rehearsal/rehearse.py zero-3          # prints every wait with its lines
    python tests/rehearsal/rehearse.py --record        # rewrites the file after a change

Not seen: times, and the kernels of cuBLAS, cuDNN, NCCL, Triton and DALI.
"""

import json
import math
import subprocess
import sys

import pretended_cuda_build
import pytest
from launches import environment
from rehearse import CASES, COUNTED, HOST_WAITS, RECORDED, ROOT, host_waits

LIMIT_S = 900
pytestmark = pytest.mark.skipif(
    bool(pretended_cuda_build.why_not()), reason=str(pretended_cuda_build.why_not())
)


def rehearse(folder, *cases):
    """Return {case: reports of its ranks} of one process that forks a process per rank."""
    arguments = ["--report", folder / "report", *cases]
    with open(folder / "output.txt", "w") as output:
        code = subprocess.run(
            [sys.executable, ROOT / "tests/rehearsal/rehearse.py", *arguments],
            env={**environment(), "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
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
            "run `python tests/rehearsal/rehearse.py --record` if the change is intended"
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
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.slow])
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
