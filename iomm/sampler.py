"""From noise to an image: integrate dx/dt = F(x, t, condition) from t = 1 to t = 0.

This is the probability-flow ODE of the rectified flow in flow.py.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from iomm.config import InputError, choice
from iomm.flow import flux_shift, shift_time
from iomm.kernels.philox import SAMPLER, normal

METHODS = ("euler", "heun")

# (x_BNK, t_B, condition_BCD) -> velocity_BNK.
VelocityFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def image_noise(seed: int, image_B: Tensor, num_tokens: int, token_dim: int) -> Tensor:
    """Return standard normal noise (B, N, K) in float32.

    The noise of an image depends only on the seed and its number in `image_B` (int64).
    """
    return normal(seed, SAMPLER, image_B, num_tokens * token_dim).unflatten(
        1, (num_tokens, token_dim)
    )


def step_times(steps: int, shift: float = 1.0) -> Tensor:
    """Return the steps + 1 times from 1 to 0 in float64.

    The steps are equal before the resolution shift is applied.

    Raises:
        InputError: unless steps >= 1 and shift > 0.
    """
    if steps < 1:
        raise InputError(f"sampler steps must be >= 1, got {steps}")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def guided(
    velocity_fn: VelocityFn,
    condition_BCD: Tensor,
    uncondition_BCD: Tensor | None,
    guidance: float,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function F(x, t) = F_u + guidance (F_c - F_u): classifier-free guidance.

    Source: arXiv 2207.12598; a guidance of 1 means none. Both halves run as one doubled batch, or
    in two passes if their condition lengths differ.

    Raises:
        InputError: if guidance is not 1 and there is no unconditional condition.
    """
    if guidance == 1.0:
        return lambda x, t_B: velocity_fn(x, t_B, condition_BCD)
    if uncondition_BCD is None:
        raise InputError(
            f"guidance {guidance} needs an unconditional condition. Pass one, or set guidance to 1."
        )

    def velocity(x: Tensor, t_B: Tensor) -> Tensor:
        if condition_BCD.shape == uncondition_BCD.shape:
            both = torch.cat((condition_BCD, uncondition_BCD))
            doubled = velocity_fn(torch.cat((x, x)), torch.cat((t_B, t_B)), both)
            conditioned, unconditioned = doubled.chunk(2)
        else:
            conditioned = velocity_fn(x, t_B, condition_BCD)
            unconditioned = velocity_fn(x, t_B, uncondition_BCD)
        unconditioned = unconditioned.to(x.dtype)
        return unconditioned + guidance * (conditioned.to(x.dtype) - unconditioned)

    return velocity


@torch.no_grad()
def sample(
    velocity_fn: VelocityFn,
    noise_BNK: Tensor,
    condition_BCD: Tensor,
    uncondition_BCD: Tensor | None = None,
    *,
    steps: int,
    method: str = "euler",
    shift: float | str = 1.0,
    guidance: float = 1.0,
) -> Tensor:
    """Integrate noise to image tokens (B, N, K).

    The result has the dtype of the noise, at least float32, whatever the dtype of the velocity.

    Args:
        velocity_fn: the velocity, called with float32 times.
        noise_BNK: noise at t = 1.
        condition_BCD: condition tokens.
        uncondition_BCD: condition tokens of the empty prompt, for guidance.
        steps: number of steps. Euler calls `velocity_fn` once per step, Heun twice.
        method: "euler" or "heun".
        shift: resolution shift of the times (`flow.shift_time`), or "flux" for FLUX's, which
            depends on the number of tokens.
        guidance: weight of classifier-free guidance; 1 means none.

    Raises:
        InputError: if an argument is out of range.
    """
    choice("sampler method", method, METHODS)
    velocity = guided(velocity_fn, condition_BCD, uncondition_BCD, guidance)
    x = noise_BNK.to(torch.promote_types(noise_BNK.dtype, torch.float32))
    times = step_times(steps, flux_shift(x.shape[1]) if shift == "flux" else shift).tolist()
    for t, t_next in pairwise(times):
        slope = velocity(x, torch.full((len(x),), t, device=x.device)).to(x.dtype)
        if method == "heun":
            x_euler = x + (t_next - t) * slope
            slope_next = velocity(x_euler, torch.full((len(x),), t_next, device=x.device))
            slope = (slope + slope_next.to(x.dtype)) / 2
        x = x + (t_next - t) * slope
    return x
