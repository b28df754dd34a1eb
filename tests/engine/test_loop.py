"""The figures of a step: one read from the device, the same numbers on all ranks."""

from types import SimpleNamespace

import pytest
import torch

from iomm.engine import loop

# Every way in which the host gets a value of a tensor.
READS = ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "nonzero")


@pytest.fixture
def reads(monkeypatch):
    """Return the list of reads so far, by name."""
    found = []

    def watched(name, real):
        def read(self, *args, **kwargs):
            found.append(name)
            return real(self, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
    return found


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.float64, None])
@pytest.mark.parametrize("aligned", [True, False])
def test_figures_of_a_step_take_one_read(reads, monkeypatch, norm_dtype, aligned):
    # As if the other rank had the same sums, one failure less and no wish to stop.
    other = torch.zeros(11 + 2 * aligned)
    other[-2:] = torch.tensor([-1.0, -1.0])
    monkeypatch.setattr(loop.dist, "all_reduce", lambda sums: sums.mul_(2).add_(other))
    norm = 1 / 3 if norm_dtype is None else torch.tensor(1 / 3, dtype=norm_dtype)
    result = loop.StepResult(
        loss=torch.tensor(0.1),
        by_time=torch.arange(8.0).view(2, 4),
        applied=True,
        data_wait_s=0.0,
        failures=["one", "two"],
        sample_losses=[],
        align_sums=torch.tensor([3.0, 4.0]) if aligned else torch.empty(0),
    )
    totals = loop.reduce_over_ranks(result, norm, True, SimpleNamespace(size=2))
    assert reads == ["tolist"]
    assert totals == loop.StepTotals(
        loss=float(torch.tensor(0.1)),
        by_time=[2.0 * i for i in range(8)],
        align_loss=0.75 if aligned else None,
        grad_norm=float(norm),
        num_failures=3,
        stop_requested=True,
    )
