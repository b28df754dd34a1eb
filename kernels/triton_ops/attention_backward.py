"""Triton: gradients of masked attention, one kernel by tiles of queries and one by tiles of keys.

Every gradient is summed by one program in a fixed order: no atomics, the same bits every time. The second kernel runs
for the suffix, and for the prefix only if somebody wants those gradients. Formulas: arXiv 2307.08691, algorithm 2.
"""

import triton
import triton.language as tl

from iomm.kernels.triton_ops.tiles import load_tile, rows_of, store_tile, tile_of


@triton.jit
def pull_queries(
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
    """Adds to dq what the keys first .. stop (< end) give, still without the scale."""
    for start in range(first, stop, BLOCK):
        j = start + tl.arange(0, BLOCK)
        keys = load_tile(k, j, end, head, HEADS, E)
        values = load_tile(v, j, end, head, HEADS, E)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale_log2
        visible = (j < end)[None, :]
        if CAUSAL:
            visible = visible & (j[None, :] <= i[:, None])
        weights = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
        pulls = tl.dot(grad, tl.trans(values), input_precision="ieee")
        moves = (weights * (pulls - delta[:, None])).to(keys.dtype)
        dq = tl.dot(moves, keys, dq, input_precision="ieee")
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
    """Program (query head, slot): dq of its tile, and delta (HEADS, num_rows), the sum of out * grad of each row."""
    head = tl.program_id(0)
    key_head = head // (HEADS // KEY_HEADS)
    sample, start, first, end = tile_of(
        tl.program_id(1), offsets, num_samples, num_rows, OWN, SAMPLES
    )
    if first >= end:
        return
    i = first + tl.arange(0, OWN)
    grad = load_tile(grad_ptr, i, end, head, HEADS, E)
    out = load_tile(out_ptr, i, end, head, HEADS, E)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)
    place = head.to(tl.int64) * num_rows + i
    tl.store(delta_ptr + place, delta, mask=i < end)
    lse = tl.load(lse_ptr + place, mask=i < end, other=float("inf"))
    q = load_tile(q_ptr, i, end, head, HEADS, E)
    dq = tl.zeros([OWN, E], tl.float32)
    if PREFIX:
        begin, stop = rows_of(prefix_offsets, sample, num_samples)
        dq = pull_queries(
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
        dq = pull_queries(
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
    """Program (key head, slot of keys): dk and dv of its tile from the queries of its sample, head by head.

    CAUSAL: keys are the suffix, key_offsets are offsets, and query row i sees key row j where j <= i.
    """
    key_head = tl.program_id(0)
    sample, _, first, end = tile_of(
        tl.program_id(1), key_offsets, num_samples, num_keys, OWN, SAMPLES
    )
    if first >= end:
        return
    j = first + tl.arange(0, OWN)
    keys = load_tile(k_ptr, j, end, key_head, KEY_HEADS, E)
    values = load_tile(v_ptr, j, end, key_head, KEY_HEADS, E)
    dk, dv = tl.zeros([OWN, E], tl.float32), tl.zeros([OWN, E], tl.float32)
    begin, stop = rows_of(offsets, sample, num_samples)
    if CAUSAL:
        begin = tl.minimum(first, stop)
    for member in range(HEADS // KEY_HEADS):
        head = key_head * (HEADS // KEY_HEADS) + member
        for start in range(begin, stop, WALK):
            i = start + tl.arange(0, WALK)
            q = load_tile(q_ptr, i, stop, head, HEADS, E)
            grad = load_tile(grad_ptr, i, stop, head, HEADS, E)
            place = head.to(tl.int64) * num_rows + i
            lse = tl.load(lse_ptr + place, mask=i < stop, other=float("inf"))
            delta = tl.load(delta_ptr + place, mask=i < stop, other=0.0)
            scores = tl.dot(keys, tl.trans(q), input_precision="ieee") * scale_log2
            # A row behind `stop` has lse = inf, so 0
            weights = tl.exp2(scores - lse[None, :])
            if CAUSAL:
                weights = tl.where(j[:, None] <= i[None, :], weights, 0.0)
            dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
            pulls = tl.dot(values, tl.trans(grad), input_precision="ieee")
            moves = (weights * (pulls - delta[None, :])).to(q.dtype)
            dk = tl.dot(moves, q, dk, input_precision="ieee")
    store_tile(dk_ptr, dk * scale, j, end, key_head, KEY_HEADS, E)
    store_tile(dv_ptr, dv, j, end, key_head, KEY_HEADS, E)
