"""Helpers for tests against other implementations."""

import contextlib

import torch


@contextlib.contextmanager
def true_float64():
    """Keep float64 tensors in float64 inside this context.

    diffusers rounds rotary angles, sinusoids and norms to float32 in every dtype.
    """
    wide, narrow = (torch.float64, torch.complex128), (torch.float32, torch.complex64)
    real_float, real_to = torch.Tensor.float, torch.Tensor.to

    def to(tensor, *args, **kwargs):
        dtype = kwargs.get("dtype", args[0] if args else None)
        if tensor.dtype in wide and dtype in narrow:
            return tensor
        return real_to(tensor, *args, **kwargs)

    torch.Tensor.float = lambda tensor, *args: (
        tensor if tensor.dtype in wide else real_float(tensor, *args)
    )
    torch.Tensor.to = to
    try:
        yield
    finally:
        torch.Tensor.float, torch.Tensor.to = real_float, real_to


@torch.no_grad()
def randomize(model, seed=0, std=0.05):
    """Draw every parameter from a normal distribution, and return the model.

    Zeros could hide a difference. The mean is 0 for matrices and 0.5 for vectors such as norm
    scales.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
        )
        if parameter.ndim == 1:
            parameter += 0.5
    return model


def relative_error(got, exact):
    """Return the largest difference over the largest value.

    NaN stays NaN, and fails any comparison.
    """
    return ((got - exact).abs().max() / exact.abs().max()).item()


def inputs(config, grid, num_condition, batch=2, dtype=torch.float64):
    """Return random noisy tokens, times and a condition; all but the times require grad."""
    generator = torch.Generator().manual_seed(1)
    shapes = (
        (batch, grid[0] * grid[1], config.token_dim),
        (batch, num_condition, config.condition_dim),
    )
    noisy, condition = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return (
        noisy.requires_grad_(),
        torch.rand(batch, generator=generator, dtype=torch.float64).to(dtype),
        condition.requires_grad_(),
    )
