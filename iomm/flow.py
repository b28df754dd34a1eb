"""Rectified flow between image (t = 0) and noise (t = 1): times and loss. Draws nothing itself.

The noisy tokens with their velocity are an op: kernels/noisy_tokens.
"""

import math

import torch

from iomm.config import InputError, choice

TIME_KINDS = ("uniform", "logit_normal")


def shift_time(t, shift):
    """Resolution shift t' = s t / (1 + (s - 1) t) of times in [0, 1] (Stable Diffusion 3, arXiv 2403.03206, eq. 23).

    s > 1 moves times towards noise. 0 and 1 stay. Raises InputError unless s > 0.
    """
    if not shift > 0:
        raise InputError(f"time shift must be > 0, got {shift}")
    return shift * t / (1 + (shift - 1) * t)


def flux_shift(num_tokens):
    """FLUX.1-dev's resolution shift for an image of so many latent tokens, for shift_time: exp(mu), mu a line through 0.5 at
    256 tokens (256 px) and 1.15 at 4096 (github.com/black-forest-labs/flux, sampling.py): 1.88 at 512 px, 3.16 at 1024.
    """
    return math.exp(0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256))


def sample_time(uniform_B, kind="uniform", mean=0.0, std=1.0, shift=1.0):
    """Times (B,) in [0, 1], at least float32, from uniform numbers in [0, 1), one each.

    `logit_normal`: sigmoid(mean + std x) with x normal (arXiv 2403.03206, eq. 19), by inverting the distribution.
    """
    choice("time kind", kind, TIME_KINDS)
    t_B = uniform_B.to(torch.promote_types(uniform_B.dtype, torch.float32))
    if kind == "logit_normal":
        # A drawn 0 would be minus infinity.
        tiny = torch.finfo(t_B.dtype).eps / 2
        t_B = torch.sigmoid(mean + std * torch.special.ndtri(t_B.clamp(tiny, 1 - tiny)))
    return shift_time(t_B, shift)


def velocity_loss(velocity_BNK, target_BNK):
    """Return (mean squared error, the same per sample (B,)), unitless, at least float32.

    Raises ValueError unless both have one shape (B, N, K): broadcasting would give a wrong loss.
    """
    if velocity_BNK.dim() != 3 or velocity_BNK.shape != target_BNK.shape:
        raise ValueError(
            f"velocity and target must be (B, N, K) alike, "
            f"got {tuple(velocity_BNK.shape)} and {tuple(target_BNK.shape)}"
        )
    dtype = torch.promote_types(velocity_BNK.dtype, torch.float32)
    loss_B = (velocity_BNK.to(dtype) - target_BNK.to(dtype)).square().mean(dim=(1, 2))
    return loss_B.mean(), loss_B


def loss_by_time(loss_B, t_B, num_buckets=4):
    """-> (sum of the losses, number of samples), each (num_buckets,), by equal intervals of t from 0 to 1.

    Sums, not means, so that ranks and steps add up; divide where a bucket is not empty.
    """
    bucket_B = (t_B * num_buckets).long().clamp(0, num_buckets - 1)
    sums = torch.zeros(num_buckets, dtype=loss_B.dtype, device=loss_B.device).index_add(
        0, bucket_B, loss_B
    )
    return sums, torch.bincount(bucket_B, minlength=num_buckets)
