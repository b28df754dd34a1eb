"""Rows normalised, then scaled and shifted per sample: the start of every modulated block (adaLN, arXiv 2212.09748)."""

import torch
import torch.nn.functional as F

from iomm.kernels.dispatch import pick, register
from iomm.kernels.triton_ops import support


def norm_modulate(x_BLD, shift_BD, scale_BD, *, kind="layer", eps=1e-6):
    """(B, L, D) in x's dtype: norm(x) (1 + scale) + shift, one shift and scale per sample; differentiable in all three.

    kind "layer": (x - mean) / sqrt(variance + eps); "rms": x / sqrt(mean square + eps), both over D and without weights
    of their own (a learned weight w is scale' = w (1 + scale) - 1). shift may be None. Raises ValueError on shapes or
    dtypes that do not fit.
    """
    wanted = x_BLD.shape[0], x_BLD.shape[-1]
    if (
        x_BLD.dim() != 3
        or scale_BD.shape != wanted
        or (shift_BD is not None and shift_BD.shape != wanted)
    ):
        raise ValueError(
            f"x must be (B, L, D), shift and scale (B, D), got {tuple(x_BLD.shape)}, "
            f"{None if shift_BD is None else tuple(shift_BD.shape)} and {tuple(scale_BD.shape)}"
        )
    if scale_BD.dtype != x_BLD.dtype or (shift_BD is not None and shift_BD.dtype != x_BLD.dtype):
        raise ValueError(
            f"x, shift and scale must share a dtype, got {x_BLD.dtype} and {scale_BD.dtype}"
        )
    if kind not in ("layer", "rms"):
        raise ValueError(f"kind must be layer or rms, got {kind!r}")
    return pick("norm_modulate", x_BLD.device, x_BLD.dtype)(
        x_BLD, shift_BD, scale_BD, kind == "layer", eps
    )


def norm_modulate_reference(x_BLD, shift_BD, scale_BD, layer, eps):
    """(B, L, D) as `norm_modulate` describes it; at least float32 throughout, rounded once."""
    x = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
    if layer:
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    x = x * (1 + scale_BD[:, None].to(x.dtype))
    if shift_BD is not None:
        x = x + shift_BD[:, None].to(x.dtype)
    return x.to(x_BLD.dtype)


def norm_modulate_torch(x_BLD, shift_BD, scale_BD, layer, eps):
    """The same; rounded to x's dtype after each step unless torch.compile fuses them."""
    width = x_BLD.shape[-1:]
    x_BLD = F.layer_norm(x_BLD, width, eps=eps) if layer else F.rms_norm(x_BLD, width, eps=eps)
    x_BLD = x_BLD * (1 + scale_BD[:, None])
    return x_BLD if shift_BD is None else x_BLD + shift_BD[:, None]


# Rows of a program; 32 make the partial sums 1/16 of what is read.
ROWS_FORWARD, ROWS_BACKWARD = 4, 32


def norm_modulate_triton(x_BLD, shift_BD, scale_BD, layer, eps):
    """(B, L, D) as `norm_modulate` describes it."""
    shift_BD, scale_BD = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (shift_BD, scale_BD)
    )
    return _forward(x_BLD.contiguous(), shift_BD, scale_BD, layer, eps)


@torch.library.custom_op("iomm::norm_modulate", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(
    x: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor, layer: bool, eps: float
) -> torch.Tensor:
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
def _(x, shift, scale, layer, eps):
    return torch.empty_like(x)


@torch.library.custom_op(
    "iomm::norm_modulate_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    layer: bool,
    eps: float,
    need_shift: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, shift (empty if nobody needs it) and scale."""
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
def _(grad, x, scale, layer, eps, need_shift):
    per_sample = x.shape[0], x.shape[2]
    return (
        torch.empty_like(x),
        x.new_empty(per_sample if need_shift else 0),
        x.new_empty(per_sample),
    )


def _save(ctx, inputs, output):
    x, shift, scale, ctx.layer, ctx.eps = inputs
    ctx.has_shift = shift is not None
    ctx.save_for_backward(x, scale)


def _differentiate(ctx, grad):
    x, scale = ctx.saved_tensors
    need_shift = ctx.has_shift and ctx.needs_input_grad[1]
    dx, dshift, dscale = _backward(grad.contiguous(), x, scale, ctx.layer, ctx.eps, need_shift)
    return dx, dshift if need_shift else None, dscale, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


# PyTorch's body comes first: torch.compile fuses it with what surrounds it, and no GPU has timed the other one yet.
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
