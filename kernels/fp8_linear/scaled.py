"""PyTorch's scaled matrix product: the tensor cores' own on a GPU, multiplied out by PyTorch on a CPU.

The weight is rounded again in the backward pass: what rounding made of it in the forward pass would be a second copy of
every weight, kept from one pass to the other, where ZeRO-3 keeps only a share of the first."""

import torch
import torch.nn.functional as F

from iomm.kernels.fp8_linear.reference import BACKWARD, FORWARD, quantised

DTYPES = (torch.bfloat16,)    # cuBLASLt adds no bias to a float32 result
MULTIPLE = 16    # of every size of a product, wanted by cuBLASLt


def why_not():
    """Why this machine has no fp8 products, or None. A CPU has: slow ones."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        return "needs compute capability 8.9 (H100, L40) or later"
    return None


def product(a_MK, b_NK, scale, bias_N, dtype):
    """a b^T scale + bias. Both lie with K inmost, as Hopper's fp8 tensor cores read them; no use of their fast
    accumulation, which has about 14 bits (arXiv 2412.19437, section 3.3.2)."""
    return torch._scaled_mm(a_MK, b_NK.t(), *scale, bias=bias_N, out_dtype=dtype, use_fast_accum=False)


class _Scaled(torch.autograd.Function):
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
        dweight_OI = product(g8_MO.t().contiguous(), x8_MI.t().contiguous(), (g_scale, x_scale), None, grad_MO.dtype)
        return dx_MI, dweight_OI, grad_MO.sum(0) if ctx.needs_input_grad[2] else None


def fp8_linear_scaled(x_MI, weight_OI, bias_O):
    """(M, O) as `fp8_linear` describes it; I and O are multiples of 16. Other numbers of rows are filled up with zeros, as
    the gradient of the weight sums over them."""
    if any(size % MULTIPLE for size in weight_OI.shape):
        raise ValueError(f"sizes of an fp8 product must be multiples of {MULTIPLE}, got a weight of {tuple(weight_OI.shape)}")
    num_rows = len(x_MI)
    if num_rows % MULTIPLE == 0:
        return _Scaled.apply(x_MI, weight_OI, bias_O)
    return _Scaled.apply(F.pad(x_MI, (0, 0, 0, -num_rows % MULTIPLE)), weight_OI, bias_O)[:num_rows]
