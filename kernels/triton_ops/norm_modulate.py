"""Triton kernels: normalisation with scale and shift.

Each program handles some rows of one sample and keeps shift and scale in registers. Gradients of
shift and scale are sums over a sample's rows. Each program writes a partial sum, and a second
pass adds the partial sums in a fixed order. Mean and deviation are recomputed in the backward
pass, which reads x anyway.
"""

import triton
import triton.language as tl


@triton.jit
def normalised(x, mask, D: tl.constexpr, eps, LAYER: tl.constexpr):
    """Return (x normalised, 1 / deviation) of one row.

    `mask` marks the D values of the row. The rest of x is 0.
    """
    if LAYER:
        x = tl.where(mask, x - tl.sum(x, axis=0) / D, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
    return x * rstd, rstd


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    num_rows,
    shift_stride,
    scale_stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LAYER: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Compute ROWS rows of the output. The grid is (chunk of ROWS rows, sample)."""
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    d = tl.arange(0, BLOCK)
    mask = d < D
    scale = tl.load(scale_ptr + sample * scale_stride + d, mask=mask, other=0.0).to(tl.float32)
    if SHIFT:
        shift = tl.load(shift_ptr + sample * shift_stride + d, mask=mask, other=0.0).to(tl.float32)
    for row in range(first, tl.minimum(first + ROWS, num_rows)):
        index = (sample * num_rows + row) * D + d
        x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
        y, _ = normalised(x, mask, D, eps, LAYER)
        y = y * (1.0 + scale)
        if SHIFT:
            y += shift
        tl.store(out_ptr + index, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    dx_ptr,
    partial_shift,
    partial_scale,
    num_rows,
    scale_stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LAYER: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Compute ROWS rows of dx and the partial sums of dshift and dscale.

    The grid is (chunk of ROWS rows, sample). partial_shift and partial_scale are (samples,
    chunks, D) float32.
    """
    sample, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    d = tl.arange(0, BLOCK)
    mask = d < D
    scale = tl.load(scale_ptr + sample * scale_stride + d, mask=mask, other=0.0).to(tl.float32)
    dscale, dshift = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for row in range(chunk * ROWS, tl.minimum(chunk * ROWS + ROWS, num_rows)):
        index = (sample * num_rows + row) * D + d
        x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + index, mask=mask, other=0.0).to(tl.float32)
        y, rstd = normalised(x, mask, D, eps, LAYER)
        dscale += grad * y
        dshift += grad
        grad = grad * (1.0 + scale)
        dx = grad - y * (tl.sum(grad * y, axis=0) / D)
        if LAYER:
            dx -= tl.sum(grad, axis=0) / D
        tl.store(dx_ptr + index, (dx * rstd).to(dx_ptr.dtype.element_ty), mask=mask)
    partial = (sample * tl.num_programs(0) + chunk) * D + d
    tl.store(partial_scale + partial, dscale, mask=mask)
    if SHIFT:
        tl.store(partial_shift + partial, dshift, mask=mask)
