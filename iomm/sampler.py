"""From noise to an image: integrate dx/dt = F(x, t, condition) from t = 1 to t = 0.

This is the probability-flow ODE of the rectified flow in flow.py.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from iomm.config import InputError, choice
from iomm.flow import flux_shift, qwen_shift, shift_time
from iomm.kernels.philox import SAMPLER, normal

METHODS = ("euler", "heun")
# Names of resolution shifts that depend on the number of tokens.
SHIFTS = ("flux", "qwen-image")
# Last time before 0 of Qwen-Image's steps.
QWEN_TERMINAL = 0.02

# (x_BNK, t_B, condition_BCD) -> velocity_BNK.
VelocityFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def image_noise(seed: int, image_B: Tensor, num_tokens: int, token_dim: int) -> Tensor:
    """Return standard normal noise (B, N, K) in float32.

    The noise of an image depends only on the seed and its number in `image_B` (int64).
    """
    return normal(seed, SAMPLER, image_B, num_tokens * token_dim).unflatten(
        1, (num_tokens, token_dim)
    )


def step_times(steps: int, shift: float | str = 1.0, num_tokens: int = 0) -> Tensor:
    """Return the steps + 1 times from 1 to 0 in float64.

    The steps are equal before the resolution shift is applied.

    Args:
        steps: number of steps.
        shift: resolution shift (`flow.shift_time`), or one of SHIFTS. With "qwen-image", the times
            are also stretched so that the last one before 0 is QWEN_TERMINAL.
        num_tokens: number of latent tokens, for SHIFTS.

    Raises:
        InputError: unless steps >= 1 and shift > 0 or in SHIFTS.
    """
    if steps < 1:
        raise InputError(f"sampler steps must be >= 1, got {steps}")
    equal = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if not isinstance(shift, str):
        return shift_time(equal, shift)
    choice("sampler shift", shift, SHIFTS)
    if shift == "flux":
        return shift_time(equal, flux_shift(num_tokens))
    times = shift_time(equal, qwen_shift(num_tokens))
    if steps > 1:
        times[:-1] = 1 - (1 - times[:-1]) * (1 - QWEN_TERMINAL) / (1 - times[-2])
    return times


def guided(
    velocity_fn: VelocityFn,
    condition_BCD: Tensor,
    uncondition_BCD: Tensor | None,
    guidance: float,
    keep_norm: bool = False,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function F(x, t) = F_u + guidance (F_c - F_u): classifier-free guidance.

    Source: arXiv 2207.12598; a guidance of 1 means none. With `keep_norm`, each token's velocity is
    scaled to the norm of F_c, as in diffusers' QwenImagePipeline. Both halves run as one doubled
    batch, or in two passes if their condition lengths differ.

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
        conditioned, unconditioned = conditioned.to(x.dtype), unconditioned.to(x.dtype)
        combined = unconditioned + guidance * (conditioned - unconditioned)
        if not keep_norm:
            return combined
        wanted, got = (part.norm(dim=-1, keepdim=True) for part in (conditioned, combined))
        # A fresh generator returns zeros.
        return combined * (wanted / got.clamp_min(torch.finfo(x.dtype).tiny))

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
    keep_norm: bool = False,
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
        shift: resolution shift of the times (`flow.shift_time`), or "flux" or "qwen-image" for
            those models', which depend on the number of tokens.
        guidance: weight of classifier-free guidance; 1 means none.
        keep_norm: scale guided velocities to the norm of the conditional one (`guided`).

    Raises:
        InputError: if an argument is out of range.
    """
    choice("sampler method", method, METHODS)
    velocity = guided(velocity_fn, condition_BCD, uncondition_BCD, guidance, keep_norm)
    x = noise_BNK.to(torch.promote_types(noise_BNK.dtype, torch.float32))
    times = step_times(steps, shift, x.shape[1]).tolist()
    for t, t_next in pairwise(times):
        slope = velocity(x, torch.full((len(x),), t, device=x.device)).to(x.dtype)
        if method == "heun":
            x_euler = x + (t_next - t) * slope
            slope_next = velocity(x_euler, torch.full((len(x),), t_next, device=x.device))
            slope = (slope + slope_next.to(x.dtype)) / 2
        x = x + (t_next - t) * slope
    return x
