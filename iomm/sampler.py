"""From noise to an image: the probability-flow ODE dx/dt = F(x, t, condition) from t = 1 to t = 0."""

from itertools import pairwise

import torch

from iomm.config import InputError, choice
from iomm.flow import flux_shift, shift_time
from iomm.kernels.philox import SAMPLER, normal

METHODS = ("euler", "heun")


def image_noise(seed, image_B, num_tokens, token_dim):
    """Standard normal (B, N, K) float32 for the images numbered `image_B` (int64), each by seed and number alone."""
    return normal(seed, SAMPLER, image_B, num_tokens * token_dim).unflatten(
        1, (num_tokens, token_dim)
    )


def step_times(steps, shift=1.0):
    """The steps + 1 times from 1 to 0, float64: equal steps, then the resolution shift."""
    if steps < 1:
        raise InputError(f"sampler steps must be >= 1, got {steps}")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def guided(velocity_fn, condition_BCD, uncondition_BCD, guidance):
    """-> F(x, t) = F_u + guidance (F_c - F_u), classifier-free guidance (arXiv 2207.12598) with weight 1 = none.

    Both halves run as one doubled batch; in two passes only where their condition lengths differ.
    """
    if guidance == 1.0:
        return lambda x, t_B: velocity_fn(x, t_B, condition_BCD)
    if uncondition_BCD is None:
        raise InputError(
            f"guidance {guidance} needs an unconditional condition; give one or set guidance to 1"
        )

    def velocity(x, t_B):
        if condition_BCD.shape == uncondition_BCD.shape:
            both = torch.cat((condition_BCD, uncondition_BCD))
            conditioned, unconditioned = velocity_fn(
                torch.cat((x, x)), torch.cat((t_B, t_B)), both
            ).chunk(2)
        else:
            conditioned, unconditioned = (
                velocity_fn(x, t_B, condition_BCD),
                velocity_fn(x, t_B, uncondition_BCD),
            )
        unconditioned = unconditioned.to(x.dtype)
        return unconditioned + guidance * (conditioned.to(x.dtype) - unconditioned)

    return velocity


@torch.no_grad()
def sample(
    velocity_fn,
    noise_BNK,
    condition_BCD,
    uncondition_BCD=None,
    *,
    steps,
    method="euler",
    shift=1.0,
    guidance=1.0,
):
    """Noise -> image tokens (B, N, K) in the noise's dtype, at least float32, whatever dtype the velocity comes in.

    `velocity_fn(x_BNK, t_B, condition_BCD) -> velocity_BNK`; float32 times. Euler calls it `steps` times,
    Heun twice as often. shift: of the times (flow.shift_time); "flux" for FLUX's by the number of tokens.
    """
    choice("sampler method", method, METHODS)
    velocity = guided(velocity_fn, condition_BCD, uncondition_BCD, guidance)
    x = noise_BNK.to(torch.promote_types(noise_BNK.dtype, torch.float32))
    times = step_times(steps, flux_shift(x.shape[1]) if shift == "flux" else shift).tolist()
    for t, t_next in pairwise(times):
        slope = velocity(x, torch.full((len(x),), t, device=x.device)).to(x.dtype)
        if method == "heun":
            ahead = x + (t_next - t) * slope
            slope = (
                slope + velocity(ahead, torch.full((len(x),), t_next, device=x.device)).to(x.dtype)
            ) / 2
        x = x + (t_next - t) * slope
    return x
