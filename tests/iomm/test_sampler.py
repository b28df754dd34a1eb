"""The sampler against diffusers' scheduler and an analytic case; guidance and noise."""

from itertools import pairwise

import pytest
import torch

from iomm.config import InputError
from iomm.flow import flux_shift
from iomm.sampler import guided, image_noise, sample, step_times


def field(x, t_B, condition_BCD):
    """Return a smooth velocity that depends on every argument."""
    t = t_B[:, None, None].to(x.dtype)
    return (
        torch.sin(2 * x) * (1 + t) - 0.3 * x * t**2 + condition_BCD.mean(dim=(1, 2), keepdim=True)
    )


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_diffusers_scheduler(steps, shift):
    import numpy
    from diffusers import FlowMatchEulerDiscreteScheduler

    noise, condition = (
        torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)),
        torch.ones(3, 2, 4),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / steps, steps))
    x = noise
    for timestep in scheduler.timesteps:
        t_B = (timestep / 1000).expand(3)
        x = scheduler.step(field(x, t_B, condition), timestep, x, return_dict=False)[0]
    got = sample(field, noise, condition, steps=steps, shift=shift)
    # Measured: 5e-7.
    assert (got - x).abs().max() < 1e-6 * max(1, x.abs().max())


@pytest.mark.parametrize("num_tokens", [256, 1024, 4096])
def test_flux_shift_equals_diffusers(num_tokens):
    """Compare with its pipeline's mu and its scheduler's shift at 256, 512 and 1024 px."""
    import numpy
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / 20, 20), mu=calculate_shift(num_tokens))
    times = step_times(20, flux_shift(num_tokens))
    assert (scheduler.sigmas.double() - times).abs().max() < 1e-6
    noise, condition = (
        torch.randn(2, num_tokens, 1, generator=torch.Generator().manual_seed(0)),
        torch.ones(2, 2, 4),
    )
    by_name = sample(field, noise, condition, steps=3, shift="flux")
    assert torch.equal(
        by_name, sample(field, noise, condition, steps=3, shift=flux_shift(num_tokens))
    )


@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("num_tokens", [256, 1024, 4096])
def test_qwen_image_times_equal_diffusers(num_tokens, steps):
    import numpy
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
    from toy_models import qwen_scheduler

    scheduler = qwen_scheduler()
    config = scheduler.config
    mu = calculate_shift(
        num_tokens,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    times = step_times(steps, "qwen-image", num_tokens)
    assert times[0] == 1 and times[-1] == 0 and len(times) == steps + 1
    # With one step diffusers divides zero by zero.
    if steps > 1:
        scheduler.set_timesteps(sigmas=numpy.linspace(1.0, 1 / steps, steps), mu=mu)
        assert (scheduler.sigmas.double() - times).abs().max() < 1e-6
        assert times[-2] == pytest.approx(0.02, abs=1e-12)


def test_guidance_keeps_the_norm_of_the_conditional_velocity():
    noise, condition = torch.randn(3, 5, 4), torch.randn(3, 2, 4)
    t_B, uncondition = torch.rand(3), torch.zeros(3, 2, 4)
    plain = guided(field, condition, uncondition, 4.0)(noise, t_B)
    kept = guided(field, condition, uncondition, 4.0, keep_norm=True)(noise, t_B)
    alone = field(noise, t_B, condition)
    assert torch.allclose(kept.norm(dim=-1), alone.norm(dim=-1))
    assert torch.allclose(
        kept / kept.norm(dim=-1, keepdim=True), plain / plain.norm(dim=-1, keepdim=True), atol=1e-6
    )
    # The velocity of a fresh generator is zero.
    zero = guided(lambda x, t_B, c: torch.zeros_like(x), condition, uncondition, 4.0, True)
    assert not zero(noise, t_B).any()


def gaussian(mean, std):
    """Return the exact velocity E[z - x | x_t] for data from N(mean, std^2).

    It has a closed form because x, z and x_t are jointly normal.
    """

    def velocity(x, t_B, condition_BCD):
        t = t_B[:, None, None].double()
        return -mean + (t - (1 - t) * std**2) / (t**2 + ((1 - t) * std) ** 2) * (x - (1 - t) * mean)

    return velocity


def gaussian_errors(method, steps):
    """Return the errors of the mean and of the standard deviation.

    The flow is affine in the noise, so noises of +1 and -1 measure both without randomness.
    """
    mean, std = 1.7, 0.4
    noise = torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None, None]
    up, down = sample(
        gaussian(mean, std), noise, torch.zeros(2, 1, 1), steps=steps, method=method
    ).flatten()
    return abs((up + down) / 2 - mean).item(), abs((up - down) / 2 - std).item()


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_gaussian_error_shrinks_at_the_methods_order(method, order):
    coarse, fine = gaussian_errors(method, 50), gaussian_errors(method, 100)
    # Measured: 6.5e-3 (Euler) and 3.0e-5 (Heun).
    assert max(fine) < {"euler": 7e-3, "heun": 4e-5}[method]
    assert coarse[1] / fine[1] == pytest.approx(2**order, rel=0.1)


def test_gaussian_samples_have_mean_and_variance():
    noise = image_noise(5, torch.arange(4), 50, 100)
    x = sample(gaussian(-0.5, 2.0), noise, torch.zeros(4, 1, 1), steps=100, method="heun")
    # Standard error of the mean, in standard deviations. That of the deviation is 0.71 of it.
    error = 1 / noise.numel() ** 0.5
    assert abs(x.mean() + 0.5) < 4 * 2 * error and abs(x.std() / 2 - 1) < 4 * 0.71 * error


def test_guidance_runs_as_one_doubled_batch():
    calls, noise = [], torch.randn(3, 5, 4)
    condition, uncondition = torch.randn(3, 2, 4), torch.zeros(3, 2, 4)

    def velocity(x, t_B, condition_BCD):
        calls.append(len(x))
        return field(x, t_B, condition_BCD)

    got = sample(velocity, noise, condition, uncondition, steps=4, guidance=4.0)
    assert calls == [6] * 4
    x = noise
    for t, t_next in pairwise(step_times(4)):
        t_B = t.float().expand(3)
        bare = field(x, t_B, uncondition)
        x = x + (t_next - t).item() * (bare + 4.0 * (field(x, t_B, condition) - bare))
    assert torch.equal(got, x)
    calls.clear()
    sample(velocity, noise, condition, steps=4)
    assert calls == [3] * 4
    longer = guided(velocity, condition, torch.zeros(3, 9, 4), 4.0)
    assert torch.allclose(
        longer(noise, torch.ones(3)),
        guided(velocity, condition, uncondition, 4.0)(noise, torch.ones(3)),
    )


def test_heun_calls_twice_per_step_and_keeps_float32():
    calls = []

    def velocity(x, t_B, condition_BCD):
        calls.append(t_B[0].item())
        return field(x, t_B, condition_BCD).bfloat16()

    x = sample(
        velocity, torch.randn(1, 2, 2).bfloat16(), torch.zeros(1, 1, 1), steps=3, method="heun"
    )
    assert x.dtype == torch.float32 and len(calls) == 6 and calls[0] == 1.0 and calls[-1] == 0.0


def test_image_does_not_depend_on_its_batch():
    whole = image_noise(3, torch.tensor([0, 1, 2, 7]), 6, 4)
    assert torch.equal(whole[3:], image_noise(3, torch.tensor([7]), 6, 4))
    assert not torch.equal(whole[3:], image_noise(4, torch.tensor([7]), 6, 4)) and whole.shape == (
        4,
        6,
        4,
    )
    condition = torch.randn(4, 2, 3)
    images = sample(field, whole, condition, steps=5, method="heun")
    assert torch.equal(
        images[2:3], sample(field, whole[2:3], condition[2:3], steps=5, method="heun")
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps"),
        ({"steps": 4, "method": "rk4"}, "euler, heun"),
        ({"steps": 4, "shift": 0.0}, "shift"),
        ({"steps": 4, "shift": "sd3"}, "flux, qwen-image"),
        ({"steps": 4, "guidance": 2.0}, "guidance"),
    ],
)
def test_invalid_sampler_options_are_rejected(options, message):
    with pytest.raises(InputError, match=message):
        sample(field, torch.randn(1, 2, 2), torch.zeros(1, 1, 1), **options)
