"""What all tests share: two threads at most, and poisoned outputs for kernel tests."""

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))
with torch.device("meta"):       # torch remembers once which functions make tensors: before any of them is poisoned below
    torch.empty(0)


@pytest.fixture
def poison(monkeypatch):
    """Fills torch.empty and torch.empty_like with NaN (integers: the lowest), so that an unwritten element shows."""

    def poisoned(real):
        def make(*args, **kwargs):
            out = real(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)
        return make

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
