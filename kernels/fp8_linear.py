"""A linear layer whose matrix products, forward and backward, take both operands in fp8 (arXiv 2209.05433).

Every side of a product is divided by one scale that puts its largest magnitude at the largest value of its format and is
then rounded: e4m3 (3 bits of mantissa) for inputs and weights, e5m2 (2 bits, a range as wide as float16's) for the gradient
that comes in. Scales are found anew in each call, so that there is no state. Sums are float32, results in x's dtype.
"""

import torch
import torch.nn.functional as F

from iomm.kernels.dispatch import pick, register


def fp8_linear(x, weight_OI, bias_O=None):
    """(..., I) -> (..., O) in x's dtype: x W^T + b, differentiable in all three. Values that are not finite make every
    result NaN. Raises ValueError on shapes or dtypes that do not fit.
    """
    if (
        weight_OI.dim() != 2
        or x.shape[-1] != weight_OI.shape[1]
        or (bias_O is not None and len(bias_O) != len(weight_OI))
    ):
        raise ValueError(
            f"x must be (..., I), the weight (O, I) and the bias (O,), got {tuple(x.shape)}, "
            f"{tuple(weight_OI.shape)} and {None if bias_O is None else tuple(bias_O.shape)}"
        )
    if x.dtype != weight_OI.dtype or (bias_O is not None and bias_O.dtype != x.dtype):
        raise ValueError(
            f"x, weight and bias must share a dtype, got {x.dtype}, {weight_OI.dtype} and "
            f"{None if bias_O is None else bias_O.dtype}"
        )
    y_MO = pick("fp8_linear", x.device, x.dtype)(x.reshape(-1, x.shape[-1]), weight_OI, bias_O)
    return y_MO.view(*x.shape[:-1], len(weight_OI))


FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def quantised(x, dtype):
    """-> (x / scale in the fp8 dtype, scale): a scalar, at least float32, and never 0, so that zeros stay zeros."""
    scale = x.abs().amax().to(torch.promote_types(x.dtype, torch.float32)) / torch.finfo(dtype).max
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (x.to(scale.dtype) / scale).to(dtype), scale


def rounded(x, dtype):
    """X as the product sees it."""
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
        return (
            dx_MI.to(x_MI.dtype),
            dweight_OI.to(weight_OI.dtype),
            grad_MO.sum(0) if ctx.needs_input_grad[2] else None,
        )


def fp8_linear_reference(x_MI, weight_OI, bias_O):
    """(M, O) as `fp8_linear` describes it."""
    return _Reference.apply(x_MI, weight_OI, bias_O)


# cuBLASLt adds no bias to a float32 result
DTYPES = (torch.bfloat16,)
# Of every size of a product, wanted by cuBLASLt.
MULTIPLE = 16


def why_not():
    """Why this machine has no fp8 products, or None. A CPU has: slow ones."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        return "needs compute capability 8.9 (H100, L40) or later"
    return None


def product(a_MK, b_NK, scale, bias_N, dtype):
    """A b^T scale + bias. Both lie with K inmost, as Hopper's fp8 tensor cores read them; no use of their fast
    accumulation, which has about 14 bits (arXiv 2412.19437, section 3.3.2).
    """
    return torch._scaled_mm(
        a_MK, b_NK.t(), *scale, bias=bias_N, out_dtype=dtype, use_fast_accum=False
    )


class _Scaled(torch.autograd.Function):
    """PyTorch's scaled matrix product: the tensor cores' own on a GPU, multiplied out by PyTorch on a CPU.

    The weight is rounded again in the backward pass: what rounding made of it in the forward pass would be a second copy of
    every weight, kept from one pass to the other, where ZeRO-3 keeps only a share of the first.
    """

    @staticmethod
    def forward(ctx, x_MI, weight_OI, bias_O):
        (x8_MI, x_scale), (w8_OI, w_scale) = quantised(x_MI, FORWARD), quantised(weight_OI, FORWARD)
        ctx.save_for_backward(x8_MI, x_scale, weight_OI)
        return product(x8_MI, w8_OI, (x_scale, w_scale), bias_O, x_MI.dtype)

    @staticmethod
    def backward(ctx, grad_MO):
        x8_MI, x_scale, weight_OI = ctx.saved_tensors
        g8_MO, g_scale = quantised(grad_MO, BACKWARD)
        w8_IO, w_scale = quantised(weight_OI.t().contiguous(), FORWARD)
        dx_MI = product(g8_MO, w8_IO, (g_scale, w_scale), None, grad_MO.dtype)
        dweight_OI = product(
            g8_MO.t().contiguous(), x8_MI.t().contiguous(), (g_scale, x_scale), None, grad_MO.dtype
        )
        return dx_MI, dweight_OI, grad_MO.sum(0) if ctx.needs_input_grad[2] else None


def fp8_linear_scaled(x_MI, weight_OI, bias_O):
    """(M, O) as `fp8_linear` describes it; I and O are multiples of 16. Other numbers of rows are filled up with zeros, as
    the gradient of the weight sums over them.
    """
    if any(size % MULTIPLE for size in weight_OI.shape):
        raise ValueError(
            f"sizes of an fp8 product must be multiples of {MULTIPLE}, got a weight of {tuple(weight_OI.shape)}"
        )
    num_rows = len(x_MI)
    if num_rows % MULTIPLE == 0:
        return _Scaled.apply(x_MI, weight_OI, bias_O)
    return _Scaled.apply(F.pad(x_MI, (0, 0, 0, -num_rows % MULTIPLE)), weight_OI, bias_O)[:num_rows]


register("fp8_linear", "scaled_mm", fp8_linear_scaled, dtypes=DTYPES, why_not=why_not)
register("fp8_linear", "reference", fp8_linear_reference)
