"""The Triton body as a custom op with its own backward."""

import torch

from iomm.kernels.triton_support import power_of_2, warps_for

ROWS_FORWARD, ROWS_BACKWARD = 4, 32    # rows of a program; 32 make the partial sums 1/16 of what is read


def norm_modulate_triton(x_BLD, shift_BD, scale_BD, layer, eps):
    """(B, L, D) as `norm_modulate` describes it."""
    shift_BD, scale_BD = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (shift_BD, scale_BD))
    return _forward(x_BLD.contiguous(), shift_BD, scale_BD, layer, eps)


@torch.library.custom_op("iomm::norm_modulate", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(
    x: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor, layer: bool, eps: float
) -> torch.Tensor:
    from iomm.kernels.norm_modulate.kernels import forward_kernel
    num_samples, num_rows, width = x.shape
    out = torch.empty_like(x)
    if x.numel():
        forward_kernel[(-(-num_rows // ROWS_FORWARD), num_samples)](
            x, shift, scale, out, num_rows, 0 if shift is None else shift.stride(0), scale.stride(0), eps, D=width,
            BLOCK=power_of_2(width), ROWS=ROWS_FORWARD, LAYER=layer, SHIFT=shift is not None,
            num_warps=warps_for(width))
    return out


@_forward.register_fake
def _(x, shift, scale, layer, eps):
    return torch.empty_like(x)


@torch.library.custom_op("iomm::norm_modulate_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, layer: bool, eps: float, need_shift: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, shift (empty if nobody needs it) and scale."""
    from iomm.kernels.norm_modulate.kernels import backward_kernel
    num_samples, num_rows, width = x.shape
    chunks = -(-num_rows // ROWS_BACKWARD)
    dx = torch.empty_like(x)
    sums = torch.empty(2 if need_shift else 1, num_samples, chunks, width, dtype=torch.float32, device=x.device)
    if x.numel():
        backward_kernel[(chunks, num_samples)](
            grad, x, scale, dx, sums[-1] if need_shift else None, sums[0], num_rows, scale.stride(0), eps, D=width,
            BLOCK=power_of_2(width), ROWS=ROWS_BACKWARD, LAYER=layer, SHIFT=need_shift, num_warps=warps_for(width))
    sums = sums.sum(2).to(x.dtype)
    return dx, sums[1].clone() if need_shift else x.new_empty(0), sums[0].clone()


@_backward.register_fake
def _(grad, x, scale, layer, eps, need_shift):
    per_sample = x.shape[0], x.shape[2]
    return torch.empty_like(x), x.new_empty(per_sample if need_shift else 0), x.new_empty(per_sample)


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
