"""Triton kernel: masked attention.

A tile of queries attends to its prefix, then to its suffix, in one online softmax. The softmax is
FlashAttention's (arXiv 2205.14135), with tiles of queries as the outer loop as in 2307.08691. The
two key segments are not concatenated, so a cached prefix is read in place.
"""

import triton
import triton.language as tl

from iomm.kernels.triton_ops.tiles import load_tile, segment_bounds, store_tile, tile_bounds


@triton.jit
def attend_segment(
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
    """Update (acc, row_max, row_sum) with the keys first .. stop (< end).

    With EDGE, keys from `end` on are masked. With CAUSAL, query row i sees the keys up to i.
    Without either nothing is masked.
    """
    acc, row_max, row_sum = state
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
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        values = load_tile(v, j, end, head, HEADS, E)
        acc = tl.dot(
            weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee"
        )
        row_max = new_max
    return acc, row_max, row_sum


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
    """Compute one tile of the output. The grid is (query head, slot).

    lse (HEADS, num_rows) float32 is the log2 of the sum of 2^(score scale_log2).
    """
    head = tl.program_id(0)
    key_head = head // (HEADS // KEY_HEADS)
    sample, start, first, end = tile_bounds(
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
        begin, stop = segment_bounds(prefix_offsets, sample, num_samples)
        full_end = begin + (stop - begin) // WALK * WALK
        state = attend_segment(
            state,
            q,
            i,
            prefix_k,
            prefix_v,
            begin,
            full_end,
            stop,
            key_head,
            scale_log2,
            KEY_HEADS,
            E,
            WALK,
            False,
            False,
        )
        state = attend_segment(
            state,
            q,
            i,
            prefix_k,
            prefix_v,
            full_end,
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
        full_end = start + (end - start) // WALK * WALK
        # Every row of the tile sees all keys before the tile's first row.
        if CAUSAL:
            stop = tl.minimum(end, first + OWN)
            full_end = start + (first - start) // WALK * WALK
        stop = tl.where(sample < num_samples, stop, start)
        full_end = tl.minimum(full_end, stop)
        state = attend_segment(
            state,
            q,
            i,
            k_ptr,
            v_ptr,
            start,
            full_end,
            end,
            key_head,
            scale_log2,
            KEY_HEADS,
            E,
            WALK,
            False,
            False,
        )
        state = attend_segment(
            state,
            q,
            i,
            k_ptr,
            v_ptr,
            full_end,
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
    acc, row_max, row_sum = state
    # The output of a query without keys is zero.
    has_keys = row_sum > 0
    acc = acc / tl.where(has_keys, row_sum, 1.0)[:, None]
    store_tile(out_ptr, acc, i, end, head, HEADS, E)
    lse = tl.where(has_keys, row_max + tl.log2(tl.where(has_keys, row_sum, 1.0)), 0.0)
    tl.store(lse_ptr + head.to(tl.int64) * num_rows + i, lse, mask=i < end)
