"""Triton: attention of one tile of queries to its prefix, then to its suffix, by one online softmax.

The online softmax is FlashAttention's (arXiv 2205.14135; tiles of queries outermost as in 2307.08691). Two segments of
keys instead of one concatenation: the cached prefix is read where it lies.
"""

import triton
import triton.language as tl

from iomm.kernels.triton_ops.tiles import load_tile, rows_of, store_tile, tile_of


@triton.jit
def attend_to(
    state,
    q,
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
    EDGE: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Folds the keys first .. stop (< end) into (acc, peak, total). EDGE: some may lie behind `end`; CAUSAL: query
    row i sees those up to i. Without either nothing is masked.
    """
    acc, peak, total = state
    for start in range(first, stop, BLOCK):
        j = start + tl.arange(0, BLOCK)
        keys = load_tile(k, j, end, head, HEADS, E)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale_log2
        if CAUSAL:
            scores = tl.where(
                (j[None, :] <= i[:, None]) & (j < end)[None, :], scores, float("-inf")
            )
        elif EDGE:
            scores = tl.where((j < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        values = load_tile(v, j, end, head, HEADS, E)
        acc = tl.dot(
            weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee"
        )
        peak = higher
    return acc, peak, total


@triton.jit(do_not_specialize=["num_samples", "num_rows"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    offsets,
    prefix_k,
    prefix_v,
    prefix_offsets,
    out_ptr,
    lse_ptr,
    num_samples,
    num_rows,
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
    """Program (query head, slot). lse (HEADS, num_rows) float32: log2 of the sum of 2^(score scale_log2)."""
    head = tl.program_id(0)
    key_head = head // (HEADS // KEY_HEADS)
    sample, start, first, end = tile_of(
        tl.program_id(1), offsets, num_samples, num_rows, OWN, SAMPLES
    )
    if first >= end:
        return
    i = first + tl.arange(0, OWN)
    q = load_tile(q_ptr, i, end, head, HEADS, E)
    state = (
        tl.zeros([OWN, E], tl.float32),
        tl.full([OWN], float("-inf"), tl.float32),
        tl.zeros([OWN], tl.float32),
    )
    if PREFIX:
        begin, stop = rows_of(prefix_offsets, sample, num_samples)
        whole = begin + (stop - begin) // WALK * WALK
        state = attend_to(
            state,
            q,
            i,
            prefix_k,
            prefix_v,
            begin,
            whole,
            stop,
            key_head,
            scale_log2,
            KEY_HEADS,
            E,
            WALK,
            False,
            False,
        )
        state = attend_to(
            state,
            q,
            i,
            prefix_k,
            prefix_v,
            whole,
            stop,
            stop,
            key_head,
            scale_log2,
            KEY_HEADS,
            E,
            WALK,
            True,
            False,
        )
    if SUFFIX:
        stop = end
        whole = start + (end - start) // WALK * WALK
        # All of the keys before the tile's first row are seen by all of its rows.
        if CAUSAL:
            stop = tl.minimum(end, first + OWN)
            whole = start + (first - start) // WALK * WALK
        stop = tl.where(sample < num_samples, stop, start)
        whole = tl.minimum(whole, stop)
        state = attend_to(
            state,
            q,
            i,
            k_ptr,
            v_ptr,
            start,
            whole,
            end,
            key_head,
            scale_log2,
            KEY_HEADS,
            E,
            WALK,
            False,
            False,
        )
        state = attend_to(
            state,
            q,
            i,
            k_ptr,
            v_ptr,
            whole,
            stop,
            end,
            key_head,
            scale_log2,
            KEY_HEADS,
            E,
            WALK,
            True,
            CAUSAL,
        )
    acc, peak, total = state
    # A query without keys gives zeros.
    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    store_tile(out_ptr, acc, i, end, head, HEADS, E)
    lse = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), 0.0)
    tl.store(lse_ptr + head.to(tl.int64) * num_rows + i, lse, mask=i < end)
