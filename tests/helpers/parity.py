"""Two helpers for tests against other implementations: true float64 for them, and random weights for both."""

import contextlib

import torch


@contextlib.contextmanager
def true_float64():
    """Inside, float64 stays float64: diffusers rounds rotary angles, sinusoids and norms to float32 in every dtype."""
    wide, narrow = (torch.float64, torch.complex128), (torch.float32, torch.complex64)
    real_float, real_to = torch.Tensor.float, torch.Tensor.to

    def to(tensor, *args, **kwargs):
        asked = kwargs.get("dtype", args[0] if args else None)
        return (
            tensor if tensor.dtype in wide and asked in narrow else real_to(tensor, *args, **kwargs)
        )

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
    """Every parameter normal around 0 (norm scales and other vectors too), so that no zero hides a difference."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(
            torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std
        )
        if parameter.ndim == 1:
            parameter += 0.5
    return model


def relative_error(got, exact):
    """Largest difference over largest value. NaN stays NaN, which no comparison lets pass."""
    return ((got - exact).abs().max() / exact.abs().max()).item()
