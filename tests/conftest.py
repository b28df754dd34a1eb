"""What all tests share: how many threads they take, which files come first, and poisoned outputs for kernel tests."""

import os

import pytest
import torch

# Threads of two workers on two cores spend a fifth of the time waiting for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    # Of what the tests start.
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
# The files that take longest, so that no worker is left alone with one at the end; the second goes with the third.
FIRST = (
    "test_run.py",
    "test_interpreter.py",
    "test_profiling.py",
    "test_demo.py",
    "test_bad_samples.py",
    "test_checkpoint.py",
    "test_failures.py",
    "test_zero.py",
    "test_build.py",
    "test_resume_positions.py",
    "test_traffic.py",
    "test_shapes.py",
    "test_counts.py",
    "test_optim.py",
)
# Torch remembers once which functions make tensors: before any of them is poisoned below.
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(scope="module")
def mllm_folder(tmp_path_factory):
    """A folder with a random MLLM three layers deep and 64 wide."""
    # Imported here, for kernel tests need not wait for transformers.
    from toy_models import TEXT, VISION

    from iomm.engine.shapes.mllm import create_mllm
    from iomm.mllm import RECONSTRUCT

    return create_mllm(
        tmp_path_factory.mktemp("mllm") / "tiny",
        texts=[RECONSTRUCT],
        vision=VISION,
        text={**TEXT, "hidden_size": 64},
    )


@pytest.fixture(scope="module")
def mllm(mllm_folder):
    from iomm.internvl import load_mllm

    return load_mllm(str(mllm_folder), dtype=torch.float32)


@pytest.fixture
def poison(monkeypatch):
    """Fills torch.empty and torch.empty_like with NaN (integers: the lowest), so that an unwritten element shows; and gives
    the kernels two threads, so that a seam between them does.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def poisoned(real):
        def make(*args, **kwargs):
            out = real(*args, **kwargs)
            return out.fill_(
                float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min
            )

        return make

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST)
    )
