"""Triton: a program takes ROWS (token, head) vectors of one sample through norm and rotation into the joint sequence.

Reads each projection once and writes it once, where attention wants it. Gradients of the weights are two-pass sums.
"""

import triton
import triton.language as tl


@triton.jit
def halves(x, ROWS: tl.constexpr, E: tl.constexpr):
    """(rows, E) -> values at even and at odd places, (rows, E / 2) each, in float32."""
    return tl.split(tl.reshape(x.to(tl.float32), [ROWS, E // 2, 2]))


@triton.jit
def whole(even, odd, ROWS: tl.constexpr, E: tl.constexpr):
    """The inverse of `halves`."""
    return tl.reshape(tl.join(even, odd), [ROWS, E])


@triton.jit
def weights_of(weight_ptr, E: tl.constexpr, WEIGHT: tl.constexpr):
    """Even and odd halves of a weight, ones if there is none."""
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
    even, odd = halves(x, ROWS, E)
    rstd = 1.0 / tl.sqrt((tl.sum(even * even, axis=1) + tl.sum(odd * odd, axis=1)) / E + eps)
    weight_even, weight_odd = weights_of(weight_ptr, E, WEIGHT)
    even, odd = even * rstd[:, None] * weight_even, odd * rstd[:, None] * weight_odd
    if ROTATE:
        even, odd = even * cos - odd * sin, odd * cos + even * sin
    return whole(even, odd, ROWS, E)


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
    """(gradient of x, of the weight's even half, of its odd half)."""
    grad_even, grad_odd = halves(grad, ROWS, E)
    if ROTATE:
        grad_even, grad_odd = grad_even * cos + grad_odd * sin, grad_odd * cos - grad_even * sin
    even, odd = halves(x, ROWS, E)
    rstd = (1.0 / tl.sqrt((tl.sum(even * even, axis=1) + tl.sum(odd * odd, axis=1)) / E + eps))[
        :, None
    ]
    even, odd = even * rstd, odd * rstd
    dweight_even, dweight_odd = tl.sum(grad_even * even, axis=0), tl.sum(grad_odd * odd, axis=0)
    weight_even, weight_odd = weights_of(weight_ptr, E, WEIGHT)
    grad_even, grad_odd = grad_even * weight_even, grad_odd * weight_odd
    along = ((tl.sum(grad_even * even, axis=1) + tl.sum(grad_odd * odd, axis=1)) / E)[:, None]
    return (
        whole((grad_even - even * along) * rstd, (grad_odd - odd * along) * rstd, ROWS, E),
        dweight_even,
        dweight_odd,
    )


@triton.jit
def places(
    num_tokens,
    num_joint,
    first,
    part: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(where a part of the program's rows lies in the projections, where in the joint sequence, mask)."""
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, E)[None, :]
    token, head = row // HEADS, row % HEADS
    source = (((sample * num_tokens + token) * PARTS + part) * HEADS + head)[:, None] * E + e
    joint = ((sample * num_joint + first) * HEADS + row)[:, None] * E + e
    return source, joint, (row < num_tokens * HEADS)[:, None]


@triton.jit
def angles(
    cos_ptr,
    sin_ptr,
    num_tokens,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Cosines and sines of the program's rows, (ROWS, E / 2)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = (row // HEADS).to(tl.int64)[:, None] * (E // 2) + tl.arange(0, E // 2)[None, :]
    inside = (row < num_tokens * HEADS)[:, None]
    if ROTATE:
        cos, sin = (
            tl.load(cos_ptr + place, mask=inside, other=0.0),
            tl.load(sin_ptr + place, mask=inside, other=0.0),
        )
    else:
        cos, sin = (
            tl.full([ROWS, E // 2], 1.0, tl.float32),
            tl.full([ROWS, E // 2], 0.0, tl.float32),
        )
    return cos, sin


@triton.jit(
    do_not_specialize=["num_tokens", "num_queries", "num_joint", "num_first_query", "num_first"]
)
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
    num_queries,
    num_joint,
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
    """Program (ROWS vectors, sample) of one stream, whose tokens begin at num_first_query in q, num_first in k, v."""
    cos, sin = angles(cos_ptr, sin_ptr, num_tokens, HEADS, E, ROWS, ROTATE)
    if PARTS == 3:
        source, joint, inside = places(
            num_tokens, num_queries, num_first_query, 0, PARTS, HEADS, E, ROWS
        )
        x = tl.load(x_ptr + source, mask=inside, other=0.0)
        x = norm_rope(x, q_weight, cos, sin, eps, ROWS, E, Q_WEIGHT, ROTATE)
        tl.store(q_ptr + joint, x.to(q_ptr.dtype.element_ty), mask=inside)
    source, joint, inside = places(
        num_tokens, num_joint, num_first, PARTS - 2, PARTS, HEADS, E, ROWS
    )
    x = tl.load(x_ptr + source, mask=inside, other=0.0)
    x = norm_rope(x, k_weight, cos, sin, eps, ROWS, E, K_WEIGHT, ROTATE)
    tl.store(k_ptr + joint, x.to(k_ptr.dtype.element_ty), mask=inside)
    source, joint, inside = places(
        num_tokens, num_joint, num_first, PARTS - 1, PARTS, HEADS, E, ROWS
    )
    tl.store(v_ptr + joint, tl.load(x_ptr + source, mask=inside, other=0.0), mask=inside)


@triton.jit(
    do_not_specialize=["num_tokens", "num_queries", "num_joint", "num_first_query", "num_first"]
)
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
    num_queries,
    num_joint,
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
    """Like `forward_kernel`; partial_q and partial_k (samples, programs, 2, E / 2) float32."""
    cos, sin = angles(cos_ptr, sin_ptr, num_tokens, HEADS, E, ROWS, ROTATE)
    f = tl.arange(0, E // 2)
    partial = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * E + f
    if PARTS == 3:
        source, joint, inside = places(
            num_tokens, num_queries, num_first_query, 0, PARTS, HEADS, E, ROWS
        )
        x = tl.load(x_ptr + source, mask=inside, other=0.0)
        grad = tl.load(dq_ptr + joint, mask=inside, other=0.0)
        dx, even, odd = norm_rope_backward(
            grad, x, q_weight, cos, sin, eps, ROWS, E, Q_WEIGHT, ROTATE
        )
        tl.store(dx_ptr + source, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if Q_WEIGHT:
            tl.store(partial_q + partial, even)
            tl.store(partial_q + partial + E // 2, odd)
    source, joint, inside = places(
        num_tokens, num_joint, num_first, PARTS - 2, PARTS, HEADS, E, ROWS
    )
    x = tl.load(x_ptr + source, mask=inside, other=0.0)
    grad = tl.load(dk_ptr + joint, mask=inside, other=0.0)
    dx, even, odd = norm_rope_backward(grad, x, k_weight, cos, sin, eps, ROWS, E, K_WEIGHT, ROTATE)
    tl.store(dx_ptr + source, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if K_WEIGHT:
        tl.store(partial_k + partial, even)
        tl.store(partial_k + partial + E // 2, odd)
    source, joint, inside = places(
        num_tokens, num_joint, num_first, PARTS - 1, PARTS, HEADS, E, ROWS
    )
    tl.store(dx_ptr + source, tl.load(dv_ptr + joint, mask=inside, other=0.0), mask=inside)
