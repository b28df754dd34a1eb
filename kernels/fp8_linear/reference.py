"""The specification of fp8_linear: rounded sides, products of them in at least float32, rounded once."""

import torch

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def quantised(x, dtype):
    """-> (x / scale in the fp8 dtype, scale): a scalar, at least float32, and never 0, so that zeros stay zeros."""
    scale = x.abs().amax().to(torch.promote_types(x.dtype, torch.float32)) / torch.finfo(dtype).max
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (x.to(scale.dtype) / scale).to(dtype), scale


def rounded(x, dtype):
    """x as the product sees it."""
    values, scale = quantised(x, dtype)
    return values.to(scale.dtype) * scale


class _Reference(torch.autograd.Function):
    """Gradients are those of x W^T + b at the rounded sides: rounding itself counts as the identity."""

    @staticmethod
    def forward(ctx, x_MI, weight_OI, bias_O):
        ctx.save_for_backward(x_MI, weight_OI)
        y_MO = rounded(x_MI, FORWARD) @ rounded(weight_OI, FORWARD).T
        return (y_MO if bias_O is None else y_MO + bias_O).to(x_MI.dtype)

    @staticmethod
    def backward(ctx, grad_MO):
        x_MI, weight_OI = ctx.saved_tensors
        g_MO = rounded(grad_MO, BACKWARD)
        dx_MI, dweight_OI = g_MO @ rounded(weight_OI, FORWARD), g_MO.T @ rounded(x_MI, FORWARD)
        return dx_MI.to(x_MI.dtype), dweight_OI.to(weight_OI.dtype), grad_MO.sum(0) if ctx.needs_input_grad[2] else None


def fp8_linear_reference(x_MI, weight_OI, bias_O):
    """(M, O) as `fp8_linear` describes it."""
    return _Reference.apply(x_MI, weight_OI, bias_O)
