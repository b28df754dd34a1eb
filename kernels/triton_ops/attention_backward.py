"""Triton kernels: gradients of masked attention.

One kernel works by tiles of queries and one by tiles of keys. Every gradient is summed by one
program in a fixed order, without atomics, so the bits are the same every time. The second kernel
runs for the suffix, and for the prefix only if its gradients are needed. The formulas are
algorithm 2 of arXiv 2307.08691.
"""

import triton
import triton.language as tl

from iomm.kernels.triton_ops.tiles import load_tile, segment_bounds, store_tile, tile_bounds


@triton.jit
def accumulate_dq(
    dq,
    q,
    grad,
    lse,
    delta,
    i,
    k,
    v,
    first,
    stop,
    end,
    head,
    scale_log2,
    HEADS: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Return dq plus the unscaled contribution of the keys first .. stop (< end)."""
    for start in range(first, stop, BLOCK):
        j = start + tl.arange(0, BLOCK)
        keys = load_tile(k, j, end, head, HEADS, E)
        values = load_tile(v, j, end, head, HEADS, E)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale_log2
        visible = (j < end)[None, :]
        if CAUSAL:
            visible = visible & (j[None, :] <= i[:, None])
        weights = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
        dp = tl.dot(grad, tl.trans(values), input_precision="ieee")
        ds = (weights * (dp - delta[:, None])).to(keys.dtype)
        dq = tl.dot(ds, keys, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["num_samples", "num_rows"])
def queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    offsets,
    prefix_k,
    prefix_v,
    prefix_offsets,
    out_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    num_samples,
    num_rows,
    scale,
    scale_log2,
    SAMPLES: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    E: tl.constexpr,
    PREFIX: tl.constexpr,
    SUFFIX: tl.constexpr,
    CAUSAL: tl.constexpr,
    OWN: tl.constexpr,
    WALK: tl.constexpr,
):
    """Compute one tile of dq and delta. The grid is (query head, slot).

    delta (HEADS, num_rows) is the sum of out * grad of each row.
    """
    head = tl.program_id(0)
    key_head = head // (HEADS // KEY_HEADS)
    sample, start, first, end = tile_bounds(
        tl.program_id(1), offsets, num_samples, num_rows, OWN, SAMPLES
    )
    if first >= end:
        return
    i = first + tl.arange(0, OWN)
    grad = load_tile(grad_ptr, i, end, head, HEADS, E)
    out = load_tile(out_ptr, i, end, head, HEADS, E)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)
    index = head.to(tl.int64) * num_rows + i
    tl.store(delta_ptr + index, delta, mask=i < end)
    lse = tl.load(lse_ptr + index, mask=i < end, other=float("inf"))
    q = load_tile(q_ptr, i, end, head, HEADS, E)
    dq = tl.zeros([OWN, E], tl.float32)
    if PREFIX:
        begin, stop = segment_bounds(prefix_offsets, sample, num_samples)
        dq = accumulate_dq(
            dq,
            q,
            grad,
            lse,
            delta,
            i,
            prefix_k,
            prefix_v,
            begin,
            stop,
            stop,
            key_head,
            scale_log2,
            KEY_HEADS,
            E,
            WALK,
            False,
        )
    if SUFFIX:
        stop = end
        if CAUSAL:
            stop = tl.minimum(end, first + OWN)
        stop = tl.where(sample < num_samples, stop, start)
        dq = accumulate_dq(
            dq,
            q,
            grad,
            lse,
            delta,
            i,
            k_ptr,
            v_ptr,
            start,
            stop,
            end,
            key_head,
            scale_log2,
            KEY_HEADS,
            E,
            WALK,
            CAUSAL,
        )
    store_tile(dq_ptr, dq * scale, i, end, head, HEADS, E)


@triton.jit(do_not_specialize=["num_samples", "num_rows", "num_keys"])
def keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    offsets,
    key_offsets,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    num_samples,
    num_rows,
    num_keys,
    scale,
    scale_log2,
    SAMPLES: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    E: tl.constexpr,
    CAUSAL: tl.constexpr,
    OWN: tl.constexpr,
    WALK: tl.constexpr,
):
    """Compute one tile of dk and dv from the queries of its sample, head by head.

    The grid is (key head, slot of keys). With CAUSAL, the keys are the suffix, key_offsets equals
    offsets, and query row i sees key row j if j <= i.
    """
    key_head = tl.program_id(0)
    sample, _, first, end = tile_bounds(
        tl.program_id(1), key_offsets, num_samples, num_keys, OWN, SAMPLES
    )
    if first >= end:
        return
    j = first + tl.arange(0, OWN)
    keys = load_tile(k_ptr, j, end, key_head, KEY_HEADS, E)
    values = load_tile(v_ptr, j, end, key_head, KEY_HEADS, E)
    dk, dv = tl.zeros([OWN, E], tl.float32), tl.zeros([OWN, E], tl.float32)
    begin, stop = segment_bounds(offsets, sample, num_samples)
    if CAUSAL:
        begin = tl.minimum(first, stop)
    for group_head in range(HEADS // KEY_HEADS):
        head = key_head * (HEADS // KEY_HEADS) + group_head
        for start in range(begin, stop, WALK):
            i = start + tl.arange(0, WALK)
            q = load_tile(q_ptr, i, stop, head, HEADS, E)
            grad = load_tile(grad_ptr, i, stop, head, HEADS, E)
            index = head.to(tl.int64) * num_rows + i
            lse = tl.load(lse_ptr + index, mask=i < stop, other=float("inf"))
            delta = tl.load(delta_ptr + index, mask=i < stop, other=0.0)
            scores = tl.dot(keys, tl.trans(q), input_precision="ieee") * scale_log2
            # Rows from `stop` on have lse = inf, so their weight is 0.
            weights = tl.exp2(scores - lse[None, :])
            if CAUSAL:
                weights = tl.where(j[:, None] <= i[None, :], weights, 0.0)
            dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
            dp = tl.dot(values, tl.trans(grad), input_precision="ieee")
            ds = (weights * (dp - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision="ieee")
    store_tile(dk_ptr, dk * scale, j, end, key_head, KEY_HEADS, E)
    store_tile(dv_ptr, dv, j, end, key_head, KEY_HEADS, E)
