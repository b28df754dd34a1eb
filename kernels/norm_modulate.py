"""Normalisation with a scale and shift per sample, the start of every modulated block.

This is adaLN (arXiv 2212.09748).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iomm.kernels.dispatch import pick, register
from iomm.kernels.triton_ops import support


def norm_modulate(
    x_BLD: Tensor,
    shift_BD: Tensor | None,
    scale_BD: Tensor,
    *,
    kind: str = "layer",
    eps: float = 1e-6,
) -> Tensor:
    """Return norm(x) (1 + scale) + shift, differentiable in x, shift and scale.

    The result is (B, L, D) in the dtype of x.

    Args:
        x_BLD: Input rows.
        shift_BD: Shift per sample, or None.
        scale_BD: Scale per sample.
        kind: "layer" is (x - mean) / sqrt(variance + eps), "rms" is x / sqrt(mean square + eps),
            both over D. Neither has a learned weight. To apply a weight w, pass w (1 + scale) - 1
            as the scale.
        eps: Added to the variance or mean square.

    Raises:
        ValueError: Shapes or dtypes do not match, or `kind` is unknown.
    """
    per_sample = x_BLD.shape[0], x_BLD.shape[-1]
    if (
        x_BLD.dim() != 3
        or scale_BD.shape != per_sample
        or (shift_BD is not None and shift_BD.shape != per_sample)
    ):
        raise ValueError(
            f"x must be (B, L, D), and shift and scale (B, D), got {tuple(x_BLD.shape)}, "
            f"{None if shift_BD is None else tuple(shift_BD.shape)} and {tuple(scale_BD.shape)}"
        )
    if scale_BD.dtype != x_BLD.dtype or (shift_BD is not None and shift_BD.dtype != x_BLD.dtype):
        raise ValueError(
            f"x, shift and scale must share a dtype, got {x_BLD.dtype} and {scale_BD.dtype}"
        )
    if kind not in ("layer", "rms"):
        raise ValueError(f"kind must be 'layer' or 'rms', got {kind!r}")
    return pick("norm_modulate", x_BLD.device, x_BLD.dtype)(
        x_BLD, shift_BD, scale_BD, kind == "layer", eps
    )


def norm_modulate_reference(
    x_BLD: Tensor, shift_BD: Tensor | None, scale_BD: Tensor, layer: bool, eps: float
) -> Tensor:
    """Return (B, L, D) as defined by `norm_modulate`.

    Computed in at least float32 and rounded once. `layer` selects layer norm instead of RMS norm.
    """
    x = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
    if layer:
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    x = x * (1 + scale_BD[:, None].to(x.dtype))
    if shift_BD is not None:
        x = x + shift_BD[:, None].to(x.dtype)
    return x.to(x_BLD.dtype)


def norm_modulate_torch(
    x_BLD: Tensor, shift_BD: Tensor | None, scale_BD: Tensor, layer: bool, eps: float
) -> Tensor:
    """Return (B, L, D) from PyTorch's norms.

    Rounded to the dtype of x after each step, unless torch.compile fuses the steps.
    """
    width = x_BLD.shape[-1:]
    x_BLD = F.layer_norm(x_BLD, width, eps=eps) if layer else F.rms_norm(x_BLD, width, eps=eps)
    x_BLD = x_BLD * (1 + scale_BD[:, None])
    return x_BLD if shift_BD is None else x_BLD + shift_BD[:, None]


# Rows per program. With 32, the partial sums are 1/16 of the data read.
ROWS_FORWARD, ROWS_BACKWARD = 4, 32


def norm_modulate_triton(
    x_BLD: Tensor, shift_BD: Tensor | None, scale_BD: Tensor, layer: bool, eps: float
) -> Tensor:
    """Return (B, L, D) from the Triton kernels."""
    shift_BD, scale_BD = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (shift_BD, scale_BD)
    )
    return _forward(x_BLD.contiguous(), shift_BD, scale_BD, layer, eps)


@torch.library.custom_op("iomm::norm_modulate", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(x: Tensor, shift: Tensor | None, scale: Tensor, layer: bool, eps: float) -> Tensor:
    from iomm.kernels.triton_ops.norm_modulate import forward_kernel

    num_samples, num_rows, width = x.shape
    out = torch.empty_like(x)
    if x.numel():
        forward_kernel[(-(-num_rows // ROWS_FORWARD), num_samples)](
            x,
            shift,
            scale,
            out,
            num_rows,
            0 if shift is None else shift.stride(0),
            scale.stride(0),
            eps,
            D=width,
            BLOCK=support.power_of_2(width),
            ROWS=ROWS_FORWARD,
            LAYER=layer,
            SHIFT=shift is not None,
            num_warps=support.warps_for(width),
        )
    return out


@_forward.register_fake
def _(x: Tensor, shift: Tensor | None, scale: Tensor, layer: bool, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(
    "iomm::norm_modulate_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def _backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    layer: bool,
    eps: float,
    need_shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, shift (empty unless `need_shift`) and scale."""
    from iomm.kernels.triton_ops.norm_modulate import backward_kernel

    num_samples, num_rows, width = x.shape
    chunks = -(-num_rows // ROWS_BACKWARD)
    dx = torch.empty_like(x)
    sums = torch.empty(
        2 if need_shift else 1, num_samples, chunks, width, dtype=torch.float32, device=x.device
    )
    if x.numel():
        backward_kernel[(chunks, num_samples)](
            grad,
            x,
            scale,
            dx,
            sums[-1] if need_shift else None,
            sums[0],
            num_rows,
            scale.stride(0),
            eps,
            D=width,
            BLOCK=support.power_of_2(width),
            ROWS=ROWS_BACKWARD,
            LAYER=layer,
            SHIFT=need_shift,
            num_warps=support.warps_for(width),
        )
    sums = sums.sum(2).to(x.dtype)
    return dx, sums[1].clone() if need_shift else x.new_empty(0), sums[0].clone()


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, scale: Tensor, layer: bool, eps: float, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    per_sample = x.shape[0], x.shape[2]
    return (
        torch.empty_like(x),
        x.new_empty(per_sample if need_shift else 0),
        x.new_empty(per_sample),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, shift, scale, ctx.layer, ctx.eps = inputs
    ctx.has_shift = shift is not None
    ctx.save_for_backward(x, scale)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
    x, scale = ctx.saved_tensors
    need_shift = ctx.has_shift and ctx.needs_input_grad[1]
    dx, dshift, dscale = _backward(grad.contiguous(), x, scale, ctx.layer, ctx.eps, need_shift)
    return dx, dshift if need_shift else None, dscale, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


# PyTorch's backend comes first because torch.compile fuses it with the surrounding ops, and
# Triton's has not been timed on a GPU yet.
register("norm_modulate", "torch", norm_modulate_torch)
register(
    "norm_modulate",
    "triton",
    norm_modulate_triton,
    devices=support.DEVICES,
    dtypes=support.DTYPES,
    why_not=support.why_not,
    note=support.NOTE,
)
register("norm_modulate", "reference", norm_modulate_reference)
