"""Triton: a program takes some rows of one sample; the gate stays in registers, its gradient is a two-pass sum."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(x_ptr, gate_ptr, y_ptr, out_ptr, num_rows, gate_stride, D: tl.constexpr, BLOCK: tl.constexpr,
                   ROWS: tl.constexpr):
    """Program (chunk of ROWS rows, sample)."""
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    d = tl.arange(0, BLOCK)
    inside = d < D
    gate = tl.load(gate_ptr + sample * gate_stride + d, mask=inside, other=0.0).to(tl.float32)
    for row in range(first, tl.minimum(first + ROWS, num_rows)):
        place = (sample * num_rows + row) * D + d
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + place, (x + gate * y).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(grad_ptr, gate_ptr, y_ptr, dy_ptr, partial_gate, num_rows, gate_stride, D: tl.constexpr,
                    BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Program (chunk of ROWS rows, sample); partial_gate (samples, chunks, D) float32."""
    sample, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < D
    gate = tl.load(gate_ptr + sample * gate_stride + d, mask=inside, other=0.0).to(tl.float32)
    dgate = tl.zeros([BLOCK], tl.float32)
    for row in range(chunk * ROWS, tl.minimum(chunk * ROWS + ROWS, num_rows)):
        place = (sample * num_rows + row) * D + d
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
        dgate += grad * y
        tl.store(dy_ptr + place, (grad * gate).to(dy_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_gate + (sample * tl.num_programs(0) + chunk) * D + d, dgate, mask=inside)
