"""Rectified flow between image (t = 0) and noise (t = 1): times and loss.

Draws no random numbers. The op kernels/noisy_tokens computes the noisy tokens and their velocity.
"""

import math

import torch
from torch import Tensor

from iomm.config import InputError, choice

TIME_KINDS = ("uniform", "logit_normal")


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Return the times t' = s t / (1 + (s - 1) t), the resolution shift s of times in [0, 1].

    Source: Stable Diffusion 3, arXiv 2403.03206, eq. 23. s > 1 moves times towards noise; 0 and 1
    are fixed points.

    Raises:
        InputError: unless s > 0.
    """
    if not shift > 0:
        raise InputError(f"time shift must be > 0, got {shift}")
    return shift * t / (1 + (shift - 1) * t)


def flux_shift(num_tokens: int) -> float:
    """Return FLUX.1-dev's resolution shift for an image of `num_tokens` latent tokens.

    The shift is exp(mu), where mu is a line through 0.5 at 256 tokens (256 px) and 1.15 at 4096
    tokens: 1.88 at 512 px, 3.16 at 1024 px. Source: github.com/black-forest-labs/flux, sampling.py.
    """
    return math.exp(0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256))


def sample_time(
    uniform_B: Tensor,
    kind: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
) -> Tensor:
    """Return times (B,) in [0, 1], at least float32, one for each uniform number in [0, 1).

    Args:
        uniform_B: uniform random numbers.
        kind: "uniform", or "logit_normal" for sigmoid(mean + std x) with x normal (arXiv
            2403.03206, eq. 19), computed with the inverse normal distribution function.
        mean: mean of the logit.
        std: standard deviation of the logit.
        shift: resolution shift (`shift_time`).

    Raises:
        InputError: if `kind` is unknown or `shift` is not positive.
    """
    choice("time kind", kind, TIME_KINDS)
    t_B = uniform_B.to(torch.promote_types(uniform_B.dtype, torch.float32))
    if kind == "logit_normal":
        # A uniform 0 would become minus infinity.
        tiny = torch.finfo(t_B.dtype).eps / 2
        t_B = torch.sigmoid(mean + std * torch.special.ndtri(t_B.clamp(tiny, 1 - tiny)))
    return shift_time(t_B, shift)


def velocity_loss(velocity_BNK: Tensor, target_BNK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean squared error and its value per sample (B,), in at least float32.

    Both are unitless.

    Raises:
        ValueError: unless both have the same shape (B, N, K), as broadcasting would give a wrong
            loss.
    """
    if velocity_BNK.dim() != 3 or velocity_BNK.shape != target_BNK.shape:
        raise ValueError(
            f"velocity and target must have the same shape (B, N, K), "
            f"got {tuple(velocity_BNK.shape)} and {tuple(target_BNK.shape)}"
        )
    dtype = torch.promote_types(velocity_BNK.dtype, torch.float32)
    loss_B = (velocity_BNK.to(dtype) - target_BNK.to(dtype)).square().mean(dim=(1, 2))
    return loss_B.mean(), loss_B


def loss_by_time(loss_B: Tensor, t_B: Tensor, num_buckets: int = 4) -> tuple[Tensor, Tensor]:
    """Return the sum of losses and the number of samples in equal intervals of t.

    Both are (num_buckets,). They are sums, not means, so they can be added over ranks and steps.
    Divide only where the count is not zero.
    """
    bucket_B = (t_B * num_buckets).long().clamp(0, num_buckets - 1)
    sums = loss_B.new_zeros(num_buckets).index_add(0, bucket_B, loss_B)
    # bincount would read the largest bucket on the host.
    counts = bucket_B.new_zeros(num_buckets).index_add(0, bucket_B, torch.ones_like(bucket_B))
    return sums, counts
