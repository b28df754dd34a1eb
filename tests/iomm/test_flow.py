"""Times and their distributions, and the velocity loss."""

import math

import pytest
import torch

from iomm.config import InputError
from iomm.flow import loss_by_time, sample_time, shift_time, velocity_loss

# Quantiles of U(0, 1), so these tests involve no randomness.
EVEN = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


def test_uniform_times_equal_the_uniform_numbers():
    uniform = torch.rand(64)
    assert torch.equal(sample_time(uniform), uniform)
    assert sample_time(uniform.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.8, 0.8), (-1.0, 0.5)])
def test_logit_normal_times_have_mean_and_std(mean, std):
    logits = torch.logit(sample_time(EVEN, "logit_normal", mean=mean, std=std))
    # 1e5 quantiles miss 3e-5 of the tails.
    assert abs(logits.mean() - mean) < 1e-9 and abs(logits.std() / std - 1) < 1e-4
    assert math.isclose(logits.median(), mean, abs_tol=2e-5 * std)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_times_are_finite_at_the_ends(kind):
    ends = torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24, 1.0])
    t = sample_time(ends, kind, shift=3.0)
    assert ((t >= 0) & (t <= 1)).all() and (t.diff() >= 0).all()


def test_shift_keeps_ends_and_moves_times_towards_noise():
    t = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(shift_time(t, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    assert torch.allclose(shift_time(shift_time(EVEN, 3.0), 1 / 3), EVEN, rtol=0, atol=1e-15)
    assert torch.equal(sample_time(EVEN, shift=2.5), shift_time(EVEN, 2.5))


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_nonpositive_shift_is_rejected(shift):
    with pytest.raises(InputError, match="shift"):
        shift_time(EVEN, shift)


def test_unknown_time_kind_is_rejected():
    with pytest.raises(InputError, match="uniform, logit_normal"):
        sample_time(EVEN, "cosine")


def test_velocity_loss_is_mean_square_in_float32():
    velocity, target = (
        torch.randn(5, 7, 3, dtype=torch.float64),
        torch.randn(5, 7, 3, dtype=torch.float64),
    )
    loss, loss_B = velocity_loss(velocity, target)
    assert torch.allclose(loss, ((velocity - target) ** 2).mean(), rtol=1e-15)
    assert torch.allclose(loss_B[2], ((velocity - target)[2] ** 2).mean(), rtol=1e-15)
    loss, loss_B = velocity_loss(velocity.bfloat16(), target.bfloat16())
    exact, _ = velocity_loss(velocity.bfloat16().double(), target.bfloat16().double())
    assert (
        loss.dtype == loss_B.dtype == torch.float32
        and abs(loss / exact - 1) < 2 * torch.finfo(torch.float32).eps
    )


def test_velocity_loss_gradient_and_single_graph():
    random = torch.Generator().manual_seed(0)
    velocity, target = (
        torch.randn(2, 3, 4, generator=random, dtype=torch.float64) for _ in range(2)
    )
    assert torch.autograd.gradcheck(velocity_loss, (velocity.requires_grad_(), target))
    loss, loss_B = velocity_loss(velocity, target)
    torch.testing.assert_close(
        loss, torch.nn.functional.mse_loss(velocity, target), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(loss_B.mean(), loss, rtol=1e-14, atol=0)
    compiled = torch.compile(lambda *x: velocity_loss(*x)[0] * 3, fullgraph=True, backend="eager")
    assert torch.equal(compiled(velocity, target), loss * 3)


def test_velocity_loss_rejects_different_shapes():
    with pytest.raises(ValueError, match="same shape"):
        velocity_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4, 3))


def test_loss_by_time_sums_and_counts():
    loss_B, t_B = (
        torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]),
        torch.tensor([0.0, 0.24, 0.25, 0.99, 1.0]),
    )
    sums, counts = loss_by_time(loss_B, t_B)
    assert sums.tolist() == [3.0, 4.0, 0.0, 24.0] and counts.tolist() == [2, 1, 0, 2]
