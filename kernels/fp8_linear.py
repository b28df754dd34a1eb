"""Linear layer with fp8 operands in its forward and backward products (arXiv 2209.05433).

Each operand of a product is divided by one scale, which maps its largest magnitude to the largest
value of the fp8 format, and is then rounded. Inputs and weights use e4m3 (3 mantissa bits). The
incoming gradient uses e5m2 (2 mantissa bits and the range of float16). Scales are computed anew
in each call, so the op keeps no state; a frozen weight may be rounded once (`RoundedWeight`). Sums
are float32, and results have the dtype of x.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iomm.kernels.dispatch import pick, register


class RoundedWeight(NamedTuple):
    """A frozen weight W (O, I) in e4m3, rounded once.

    W is values_OI x scale. values_IO has the same values with O innermost, as the product of the
    backward pass reads them, or is None where x needs no gradient.
    """

    values_OI: Tensor
    values_IO: Tensor | None
    scale: Tensor


def round_weight(weight_OI: Tensor, *, backward: bool) -> RoundedWeight:
    """Return a weight in fp8, with the copy for gradients of x if `backward`."""
    values_OI, scale = quantised(weight_OI, FORWARD)
    return RoundedWeight(values_OI, values_OI.t().contiguous() if backward else None, scale)


def fp8_linear(
    x: Tensor, weight_OI: Tensor | RoundedWeight, bias_O: Tensor | None = None
) -> Tensor:
    """Return x W^T + b in the dtype of x, differentiable in x, weight and bias.

    x has shape (..., I) and the result (..., O). A value that is not finite makes every result NaN.
    With a RoundedWeight the result and the gradient of x are the same to the bit, and neither
    weight nor bias gets a gradient.

    Raises:
        ValueError: Shapes or dtypes do not match.
    """
    if isinstance(weight_OI, RoundedWeight):
        if x.shape[-1] != weight_OI.values_OI.shape[1]:
            raise ValueError(
                f"x must be (..., I) for a weight {tuple(weight_OI.values_OI.shape)}, got "
                f"{tuple(x.shape)}"
            )
        run = pick("fp8_linear", x.device, x.dtype)
        return run(x.reshape(-1, x.shape[-1]), weight_OI, bias_O).unflatten(0, x.shape[:-1])
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


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (x / scale in an fp8 dtype, scale).

    The scale is a scalar in at least float32. It is never 0, so zeros stay zeros.
    """
    scale = x.abs().amax().to(torch.promote_types(x.dtype, torch.float32)) / torch.finfo(dtype).max
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (x.to(scale.dtype) / scale).to(dtype), scale


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x as an fp8 product sees it: quantised and scaled back."""
    values, scale = quantised(x, dtype)
    return values.to(scale.dtype) * scale


class _Reference(torch.autograd.Function):
    """Gradients of x W^T + b at the rounded operands. Rounding counts as the identity.

    `rounded_OI` is W rounded before, or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MI: Tensor,
        weight_OI: Tensor | None,
        bias_O: Tensor | None,
        rounded_OI: Tensor | None = None,
    ) -> Tensor:
        if rounded_OI is None:
            rounded_OI = rounded(weight_OI, FORWARD)
        ctx.save_for_backward(x_MI, rounded_OI)
        y_MO = rounded(x_MI, FORWARD) @ rounded_OI.T
        return (y_MO if bias_O is None else y_MO + bias_O).to(x_MI.dtype)

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x_MI, rounded_OI = ctx.saved_tensors
        _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        g_MO = rounded(grad_MO, BACKWARD)
        return (
            (g_MO @ rounded_OI).to(x_MI.dtype),
            (g_MO.T @ rounded(x_MI, FORWARD)).to(x_MI.dtype) if needs_weight else None,
            grad_MO.sum(0) if needs_bias else None,
            None,
        )


def fp8_linear_reference(
    x_MI: Tensor, weight_OI: Tensor | RoundedWeight, bias_O: Tensor | None
) -> Tensor:
    """Return (M, O) as defined by `fp8_linear`."""
    if isinstance(weight_OI, RoundedWeight):
        rounded_OI = weight_OI.values_OI.to(weight_OI.scale.dtype) * weight_OI.scale
        return _Reference.apply(x_MI, None, bias_O, rounded_OI)
    return _Reference.apply(x_MI, weight_OI, bias_O, None)


# cuBLASLt does not add a bias to a float32 result.
DTYPES = (torch.bfloat16,)
# cuBLASLt requires every dimension of a product to be a multiple of 16.
MULTIPLE = 16


def why_not() -> str | None:
    """Return why this machine has no fp8 products, or None if it has. CPUs have slow ones."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        return "needs compute capability 8.9 (H100, L40) or later"
    return None


def product(
    a_MK: Tensor,
    b_NK: Tensor,
    scale: tuple[Tensor, Tensor],
    bias_N: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return (M, N): a b^T scaled, plus the bias.

    K is the innermost dimension of both operands, as Hopper's fp8 tensor cores read them. Their
    fast accumulation is off because it has only about 14 bits (arXiv 2412.19437, section 3.3.2).

    Args:
        a_MK: Left operand in fp8.
        b_NK: Right operand in fp8.
        scale: Scales of a and b.
        bias_N: Bias, or None.
        dtype: Dtype of the result.
    """
    return torch._scaled_mm(
        a_MK, b_NK.t(), *scale, bias=bias_N, out_dtype=dtype, use_fast_accum=False
    )


class _Scaled(torch.autograd.Function):
    """PyTorch's scaled matrix product, on tensor cores on a GPU and emulated on a CPU.

    The weight is quantised again in the backward pass. Saving the quantised weight of the forward
    pass would keep a second copy of every weight between the passes, where ZeRO-3 keeps only a
    shard of the first.
    """

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        (x8_MI, x_scale), (w8_OI, w_scale) = quantised(x_MI, FORWARD), quantised(weight_OI, FORWARD)
        ctx.save_for_backward(x8_MI, x_scale, weight_OI)
        return product(x8_MI, w8_OI, (x_scale, w_scale), bias_O, x_MI.dtype)

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x8_MI, x_scale, weight_OI = ctx.saved_tensors
        g8_MO, g_scale = quantised(grad_MO, BACKWARD)
        w8_IO, w_scale = quantised(weight_OI.t().contiguous(), FORWARD)
        dx_MI, dweight_OI = product(g8_MO, w8_IO, (g_scale, w_scale), None, grad_MO.dtype), None
        if ctx.needs_input_grad[1]:
            dweight_OI = product(
                g8_MO.t().contiguous(),
                x8_MI.t().contiguous(),
                (g_scale, x_scale),
                None,
                grad_MO.dtype,
            )
        return dx_MI, dweight_OI, grad_MO.sum(0) if ctx.needs_input_grad[2] else None


class _ScaledFrozen(torch.autograd.Function):
    """`_Scaled` with a weight that was rounded before and needs no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MI: Tensor,
        values_OI: Tensor,
        values_IO: Tensor | None,
        scale: Tensor,
        bias_O: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(values_IO, scale)
        x8_MI, x_scale = quantised(x_MI, FORWARD)
        return product(x8_MI, values_OI, (x_scale, scale), bias_O, x_MI.dtype)

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor, None, None, None, None]:
        values_IO, scale = ctx.saved_tensors
        g8_MO, g_scale = quantised(grad_MO, BACKWARD)
        dx_MI = product(g8_MO, values_IO, (g_scale, scale), None, grad_MO.dtype)
        return dx_MI, None, None, None, None


def fp8_linear_scaled(
    x_MI: Tensor, weight_OI: Tensor | RoundedWeight, bias_O: Tensor | None
) -> Tensor:
    """Return (M, O) as defined by `fp8_linear`.

    M is padded with zero rows to a multiple of 16, because the gradient of the weight sums over
    rows.

    Raises:
        ValueError: I or O is not a multiple of 16.
    """
    num_rows = len(x_MI)
    if isinstance(weight_OI, RoundedWeight):
        # Without a gradient of the weight, rows are only M of the products, which may be any.
        return _ScaledFrozen.apply(x_MI, *weight_OI, bias_O)
    if any(size % MULTIPLE for size in weight_OI.shape):
        raise ValueError(
            f"both sizes of an fp8 weight must be multiples of {MULTIPLE}, "
            f"got {tuple(weight_OI.shape)}"
        )
    if num_rows % MULTIPLE == 0:
        return _Scaled.apply(x_MI, weight_OI, bias_O)
    return _Scaled.apply(F.pad(x_MI, (0, 0, 0, -num_rows % MULTIPLE)), weight_OI, bias_O)[:num_rows]


register("fp8_linear", "scaled_mm", fp8_linear_scaled, dtypes=DTYPES, why_not=why_not)
register("fp8_linear", "reference", fp8_linear_reference)
