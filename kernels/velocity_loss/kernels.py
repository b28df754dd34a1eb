"""Triton: one pass over prediction and target gives the sums of squares and the error that the gradient is made of."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_values"])
def forward_kernel(velocity_ptr, target_ptr, error_ptr, partial_loss, num_values, BLOCK: tl.constexpr):
    """Program (chunk of BLOCK values, sample); partial_loss (samples, chunks) float32 sums of squares."""
    sample, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    within = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = within < num_values
    place = sample * num_values + within
    velocity = tl.load(velocity_ptr + place, mask=inside, other=0.0).to(tl.float32)
    error = velocity - tl.load(target_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(error_ptr + place, error.to(error_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_loss + sample * tl.num_programs(0) + chunk, tl.sum(error * error, axis=0))


@triton.jit(do_not_specialize=["num_values"])
def backward_kernel(error_ptr, loss_factor, grad_ptr, num_values, BLOCK: tl.constexpr):
    """Program (chunk of BLOCK values, sample): error times the sample's factor (samples,) float32."""
    sample = tl.program_id(1).to(tl.int64)
    within = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = within < num_values
    place = sample * num_values + within
    error = tl.load(error_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = error * tl.load(loss_factor + sample)
    tl.store(grad_ptr + place, grad.to(grad_ptr.dtype.element_ty), mask=inside)
