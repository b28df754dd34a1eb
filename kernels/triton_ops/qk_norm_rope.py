"""Triton kernels: norm, rotation and the copy into the joint sequence in one pass.

A program handles ROWS (token, head) vectors of one sample. Each projection is read once and
written once, to where attention reads it. Gradients of the weights are two-pass sums.
"""

import triton
import triton.language as tl

# Arguments that vary from batch to batch: one kernel serves all their values.
SIZES = ["num_tokens", "sample_stride", "token_stride", "num_first_query", "num_first"]


@triton.jit
def deinterleave(x, ROWS: tl.constexpr, E: tl.constexpr):
    """Return the even and the odd columns of (rows, E), in float32."""
    return tl.split(tl.reshape(x.to(tl.float32), [ROWS, E // 2, 2]))


@triton.jit
def interleave(even, odd, ROWS: tl.constexpr, E: tl.constexpr):
    """Return (rows, E) from its even and odd columns. Inverse of `deinterleave`."""
    return tl.reshape(tl.join(even, odd), [ROWS, E])


@triton.jit
def load_weight(weight_ptr, E: tl.constexpr, WEIGHT: tl.constexpr):
    """Return the even and odd halves of a weight, or ones if there is none."""
    f = tl.arange(0, E // 2)
    if WEIGHT:
        even, odd = (
            tl.load(weight_ptr + 2 * f).to(tl.float32),
            tl.load(weight_ptr + 2 * f + 1).to(tl.float32),
        )
    else:
        even, odd = tl.full([E // 2], 1.0, tl.float32), tl.full([E // 2], 1.0, tl.float32)
    return even[None, :], odd[None, :]


@triton.jit
def norm_rope(
    x,
    weight_ptr,
    cos,
    sin,
    eps,
    ROWS: tl.constexpr,
    E: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROTATE: tl.constexpr,
):
    even, odd = deinterleave(x, ROWS, E)
    rstd = 1.0 / tl.sqrt((tl.sum(even * even, axis=1) + tl.sum(odd * odd, axis=1)) / E + eps)
    weight_even, weight_odd = load_weight(weight_ptr, E, WEIGHT)
    even, odd = even * rstd[:, None] * weight_even, odd * rstd[:, None] * weight_odd
    if ROTATE:
        even, odd = even * cos - odd * sin, odd * cos + even * sin
    return interleave(even, odd, ROWS, E)


@triton.jit
def norm_rope_backward(
    grad,
    x,
    weight_ptr,
    cos,
    sin,
    eps,
    ROWS: tl.constexpr,
    E: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Return the gradients of x, of the weight's even half and of its odd half."""
    grad_even, grad_odd = deinterleave(grad, ROWS, E)
    if ROTATE:
        grad_even, grad_odd = grad_even * cos + grad_odd * sin, grad_odd * cos - grad_even * sin
    even, odd = deinterleave(x, ROWS, E)
    rstd = (1.0 / tl.sqrt((tl.sum(even * even, axis=1) + tl.sum(odd * odd, axis=1)) / E + eps))[
        :, None
    ]
    even, odd = even * rstd, odd * rstd
    dweight_even, dweight_odd = tl.sum(grad_even * even, axis=0), tl.sum(grad_odd * odd, axis=0)
    weight_even, weight_odd = load_weight(weight_ptr, E, WEIGHT)
    grad_even, grad_odd = grad_even * weight_even, grad_odd * weight_odd
    projection = ((tl.sum(grad_even * even, axis=1) + tl.sum(grad_odd * odd, axis=1)) / E)[:, None]
    return (
        interleave(
            (grad_even - even * projection) * rstd, (grad_odd - odd * projection) * rstd, ROWS, E
        ),
        dweight_even,
        dweight_odd,
    )


@triton.jit
def part_offsets(
    num_tokens,
    sample_stride,
    token_stride,
    first,
    part: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return (projection offsets, joint offsets, mask) of a part's rows.

    In the joint tensor, sample_stride and token_stride count tokens.
    """
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, E)[None, :]
    token, head = row // HEADS, row % HEADS
    source = (((sample * num_tokens + token) * PARTS + part) * HEADS + head)[:, None] * E + e
    joint_token = sample * sample_stride + (first + token).to(tl.int64) * token_stride
    joint = (joint_token * HEADS + head)[:, None] * E + e
    return source, joint, (row < num_tokens * HEADS)[:, None]


@triton.jit
def load_angles(
    cos_ptr,
    sin_ptr,
    num_tokens,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Return the cosines and sines of the program's rows, (ROWS, E / 2) each."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = (row // HEADS).to(tl.int64)[:, None] * (E // 2) + tl.arange(0, E // 2)[None, :]
    mask = (row < num_tokens * HEADS)[:, None]
    if ROTATE:
        cos, sin = (
            tl.load(cos_ptr + index, mask=mask, other=0.0),
            tl.load(sin_ptr + index, mask=mask, other=0.0),
        )
    else:
        cos, sin = (
            tl.full([ROWS, E // 2], 1.0, tl.float32),
            tl.full([ROWS, E // 2], 0.0, tl.float32),
        )
    return cos, sin


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    x_ptr,
    q_weight,
    k_weight,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    num_tokens,
    sample_stride,
    token_stride,
    num_first_query,
    num_first,
    eps,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    Q_WEIGHT: tl.constexpr,
    K_WEIGHT: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Compute ROWS vectors of q, k and v for one stream. The grid is (ROWS vectors, sample).

    The stream's tokens begin at num_first_query in q and at num_first in k and v, whose samples and
    tokens are sample_stride and token_stride tokens apart.
    """
    cos, sin = load_angles(cos_ptr, sin_ptr, num_tokens, HEADS, E, ROWS, ROTATE)
    if PARTS == 3:
        source, joint, mask = part_offsets(
            num_tokens, sample_stride, token_stride, num_first_query, 0, PARTS, HEADS, E, ROWS
        )
        x = tl.load(x_ptr + source, mask=mask, other=0.0)
        x = norm_rope(x, q_weight, cos, sin, eps, ROWS, E, Q_WEIGHT, ROTATE)
        tl.store(q_ptr + joint, x.to(q_ptr.dtype.element_ty), mask=mask)
    source, joint, mask = part_offsets(
        num_tokens, sample_stride, token_stride, num_first, PARTS - 2, PARTS, HEADS, E, ROWS
    )
    x = tl.load(x_ptr + source, mask=mask, other=0.0)
    x = norm_rope(x, k_weight, cos, sin, eps, ROWS, E, K_WEIGHT, ROTATE)
    tl.store(k_ptr + joint, x.to(k_ptr.dtype.element_ty), mask=mask)
    source, joint, mask = part_offsets(
        num_tokens, sample_stride, token_stride, num_first, PARTS - 1, PARTS, HEADS, E, ROWS
    )
    tl.store(v_ptr + joint, tl.load(x_ptr + source, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    x_ptr,
    q_weight,
    k_weight,
    cos_ptr,
    sin_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dx_ptr,
    partial_q,
    partial_k,
    num_tokens,
    sample_stride,
    token_stride,
    num_first_query,
    num_first,
    eps,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    Q_WEIGHT: tl.constexpr,
    K_WEIGHT: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Compute ROWS vectors of dx and the partial sums of the weight gradients.

    The grid is that of `forward_kernel`. partial_q and partial_k are float32 with shape
    (samples, programs, 2, E / 2).
    """
    cos, sin = load_angles(cos_ptr, sin_ptr, num_tokens, HEADS, E, ROWS, ROTATE)
    f = tl.arange(0, E // 2)
    partial = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * E + f
    if PARTS == 3:
        source, joint, mask = part_offsets(
            num_tokens, sample_stride, token_stride, num_first_query, 0, PARTS, HEADS, E, ROWS
        )
        x = tl.load(x_ptr + source, mask=mask, other=0.0)
        grad = tl.load(dq_ptr + joint, mask=mask, other=0.0)
        dx, even, odd = norm_rope_backward(
            grad, x, q_weight, cos, sin, eps, ROWS, E, Q_WEIGHT, ROTATE
        )
        tl.store(dx_ptr + source, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if Q_WEIGHT:
            tl.store(partial_q + partial, even)
            tl.store(partial_q + partial + E // 2, odd)
    source, joint, mask = part_offsets(
        num_tokens, sample_stride, token_stride, num_first, PARTS - 2, PARTS, HEADS, E, ROWS
    )
    x = tl.load(x_ptr + source, mask=mask, other=0.0)
    grad = tl.load(dk_ptr + joint, mask=mask, other=0.0)
    dx, even, odd = norm_rope_backward(grad, x, k_weight, cos, sin, eps, ROWS, E, K_WEIGHT, ROTATE)
    tl.store(dx_ptr + source, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if K_WEIGHT:
        tl.store(partial_k + partial, even)
        tl.store(partial_k + partial + E // 2, odd)
    source, joint, mask = part_offsets(
        num_tokens, sample_stride, token_stride, num_first, PARTS - 1, PARTS, HEADS, E, ROWS
    )
    tl.store(dx_ptr + source, tl.load(dv_ptr + joint, mask=mask, other=0.0), mask=mask)
