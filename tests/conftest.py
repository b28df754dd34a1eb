"""Shared settings and fixtures of all tests."""

import os

import pytest
import torch

# With two workers on two cores, more threads would spend a fifth of the time waiting for each
# other.
if "PYTEST_XDIST_WORKER" in os.environ:
    # For the processes that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
# Seconds of the slowest files with two workers (Xeon, 2026-11-30, pytest --durations=0). The
# longest run first, which keeps both workers busy at the end.
SECONDS = {
    "test_run.py": 107,
    "test_failures.py": 95,
    "test_checkpoint.py": 65,
    "test_cpu_ranks.py": 59,
    "test_demo.py": 52,
    "test_rehearsal.py": 48,
    "test_interpreter.py": 46,
    "test_alignment.py": 33,
    "test_lora_ranks.py": 30,
    "test_hosts.py": 30,
    "test_torchrun.py": 30,
    "test_shapes.py": 29,
    "test_zero.py": 26,
    "test_budget.py": 23,
    "test_lora.py": 22,
    "test_fp8_linear.py": 22,
    "test_counts.py": 21,
    "test_paths.py": 20,
    "test_lora_runs.py": 20,
    "test_corrupt_samples.py": 20,
    "test_traffic.py": 18,
    "test_weights.py": 16,
    "test_found_data.py": 16,
    "test_dataset.py": 16,
    "test_commands.py": 14,
    "test_bad_samples.py": 13,
    "test_optim.py": 13,
    "test_index_builds.py": 11,
    "test_recipes.py": 11,
    "test_base_shards.py": 10,
}
# torch caches which functions create tensors. This fills the cache before any of them is poisoned
# below.
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(scope="module")
def mllm_folder(tmp_path_factory):
    """Return a folder with a random MLLM that is three layers deep and 64 wide."""
    # Imported here, because kernel tests do not need transformers.
    from toy_models import TEXT, VISION

    from iomm.config import RECONSTRUCT
    from iomm.engine.shapes.mllm import create_mllm

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
    """Fill torch.empty and torch.empty_like with NaN (integers with their minimum).

    This exposes unwritten elements. Kernels run with two threads, which exposes errors at the
    boundary between threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def poisoned(real):
        def make(*args, **kwargs):
            out = real(*args, **kwargs)
            if out.dtype == torch.bool:
                return out.fill_(True)
            return out.fill_(
                float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min
            )

        return make

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: -SECONDS.get(item.path.name, 0))
