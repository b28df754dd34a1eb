"""Triton: a program takes some rows of one sample; shift and scale stay in registers.

Gradients of shift and scale are sums over a sample's rows: each program writes its own sum, a second pass adds those in
a fixed order. Mean and deviation are worked out again in the backward pass, which reads x anyway.
"""

import triton
import triton.language as tl


@triton.jit
def normalised(x, inside, D: tl.constexpr, eps, LAYER: tl.constexpr):
    """(x normalised, 1 / deviation) of one row; `inside` marks its D values, the rest is 0."""
    if LAYER:
        x = tl.where(inside, x - tl.sum(x, axis=0) / D, 0.0)
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
    """Program (chunk of ROWS rows, sample)."""
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    d = tl.arange(0, BLOCK)
    inside = d < D
    scale = tl.load(scale_ptr + sample * scale_stride + d, mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        shift = tl.load(shift_ptr + sample * shift_stride + d, mask=inside, other=0.0).to(
            tl.float32
        )
    for row in range(first, tl.minimum(first + ROWS, num_rows)):
        place = (sample * num_rows + row) * D + d
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        y, _ = normalised(x, inside, D, eps, LAYER)
        y = y * (1.0 + scale)
        if SHIFT:
            y += shift
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


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
    """Program (chunk of ROWS rows, sample); partial_* (samples, chunks, D) float32."""
    sample, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < D
    scale = tl.load(scale_ptr + sample * scale_stride + d, mask=inside, other=0.0).to(tl.float32)
    dscale, dshift = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for row in range(chunk * ROWS, tl.minimum(chunk * ROWS + ROWS, num_rows)):
        place = (sample * num_rows + row) * D + d
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        y, rstd = normalised(x, inside, D, eps, LAYER)
        dscale += grad * y
        dshift += grad
        grad = grad * (1.0 + scale)
        dx = grad - y * (tl.sum(grad * y, axis=0) / D)
        if LAYER:
            dx -= tl.sum(grad, axis=0) / D
        tl.store(dx_ptr + place, (dx * rstd).to(dx_ptr.dtype.element_ty), mask=inside)
    partial = (sample * tl.num_programs(0) + chunk) * D + d
    tl.store(partial_scale + partial, dscale, mask=inside)
    if SHIFT:
        tl.store(partial_shift + partial, dshift, mask=inside)
