"""The PyTorch backend: one scaled_dot_product_attention per call.

Regular batches need no mask. Ragged batches are padded to a dense layout.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from iomm.kernels.masked_attention.packing import (
    Lengths,
    cached_layout,
    sample_lengths,
    target_rows,
)
from iomm.kernels.masked_attention.reference import masked_attention_reference

# cuDNN's backward returns NaN with a mask at lengths % 128 == 64 (pytorch #196678), so masked
# calls do not use it.
_MASKED_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return softmax attention (B, A, L, E) computed by PyTorch.

    With gradients in bfloat16 on a CPU it is computed by two matrix products, because the
    backward pass of torch 2.13's SDPA is 2 to 8 times slower there (320 and 80 tokens;
    benchmarks/LOG.md). The products round scores and weights to bfloat16, which SDPA does not.

    Args:
        q: Queries (B, A, L, E).
        k: Keys, which may have fewer heads than q.
        v: Values, with the heads of k.
        mask: bool, True where visible, or None.
        causal: Whether query i sees only the keys up to i.
        scale: Factor on the scores. The default is 1 / sqrt(E).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        repeat = q.shape[1] // k.shape[1]
        k, v = (x if repeat == 1 else x.repeat_interleave(repeat, dim=1) for x in (k, v))
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ v
    with sdpa_kernel(_MASKED_BACKENDS) if q.is_cuda and mask is not None else nullcontext():
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal,
            scale=scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )


@dataclass(frozen=True)
class DenseLayout:
    """Rows of the packed tokens in the dense layout.

    The keys of a sample are in slots [prefix | suffix].
    """

    num_samples: int
    # Length of the longest sample.
    num_queries: int
    # Length of the longest prefix.
    num_prefix: int
    # All samples have equal lengths, so the packed layout is dense already.
    regular: bool
    total_queries: int
    total_prefix: int
    # (S,), row of each query in (B * num_queries).
    query_rows: Tensor | None = None
    # (S,), row of each suffix key in (B * num_slots).
    suffix_rows: Tensor | None = None
    # (Tp,), row of each prefix key in (B * num_slots).
    prefix_rows: Tensor | None = None
    # (B, 1, num_queries, num_slots), True where visible.
    mask: Tensor | None = None


def _make_layout(
    offsets: Tensor,
    prefix_offsets: Tensor | None,
    has_suffix: bool,
    causal: bool,
    lengths: Lengths = None,
    prefix_lengths: Lengths = None,
) -> DenseLayout:
    lengths = sample_lengths("offsets", offsets, lengths=lengths)
    prefix_lengths = (
        (0,) * len(lengths)
        if prefix_offsets is None
        else sample_lengths("prefix_offsets", prefix_offsets, lengths=prefix_lengths)
    )
    num_queries, num_prefix = max(lengths, default=0), max(prefix_lengths, default=0)
    equal_lengths = len(set(lengths)) <= 1 and len(set(prefix_lengths)) <= 1
    sizes = {
        "num_samples": len(lengths),
        "num_queries": num_queries,
        "num_prefix": num_prefix,
        "total_queries": sum(lengths),
        "total_prefix": sum(prefix_lengths),
    }
    if equal_lengths and not (causal and has_suffix and num_prefix):
        return DenseLayout(regular=True, **sizes)
    num_slots = num_prefix + (num_queries if has_suffix else 0)
    device = offsets.device
    if prefix_offsets is None:
        prefix_offsets = torch.zeros_like(offsets)
    sample_B = torch.arange(len(lengths), device=device)
    slot_J = torch.arange(num_slots, device=device)
    visible_BJ = slot_J < prefix_offsets.diff()[:, None]
    visible = visible_BJ[:, None].repeat(1, num_queries, 1)
    if has_suffix:
        suffix_J = slot_J - num_prefix
        present_BJ = (suffix_J >= 0) & (suffix_J < offsets.diff()[:, None])
        # The last suffix key that each query sees.
        last_I = torch.full((num_queries,), num_queries, device=device)
        if causal:
            last_I = torch.arange(num_queries, device=device)
        visible |= present_BJ[:, None] & (suffix_J <= last_I[:, None])
    # The softmax of a row without visible keys would be 0/0. Such a row sees slot 0 instead,
    # which is zero padding and makes its output zero.
    if num_slots:
        visible[..., 0] |= ~visible.any(-1)
    return DenseLayout(
        regular=False,
        **sizes,
        mask=visible[:, None],
        query_rows=target_rows(offsets, sizes["total_queries"], sample_B * num_queries),
        suffix_rows=target_rows(offsets, sizes["total_queries"], sample_B * num_slots + num_prefix)
        if has_suffix
        else None,
        prefix_rows=target_rows(prefix_offsets, sizes["total_prefix"], sample_B * num_slots),
    )


def _heads_first(x: Tensor, num_samples: int) -> Tensor:
    return x.unflatten(0, (num_samples, -1)).transpose(1, 2)


def masked_attention_sdpa(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    offsets: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prefix_offsets: Tensor | None,
    causal: bool,
    scale: float,
    lengths: Lengths = None,
    prefix_lengths: Lengths = None,
) -> Tensor:
    """Return (S, A, E) from scaled_dot_product_attention."""
    layout = cached_layout(
        _make_layout, offsets, prefix_offsets, k is not None, causal, lengths, prefix_lengths
    )
    num_prefix = 0 if prefix_k is None else prefix_k.shape[0]
    if layout.total_queries > q.shape[0] or layout.total_prefix > num_prefix:
        raise ValueError(
            f"offsets end at {layout.total_queries} queries and {layout.total_prefix} prefix keys, "
            f"but there are only {q.shape[0]} and {num_prefix}"
        )
    # There are rows after the last sample.
    if layout.total_queries < q.shape[0] or layout.total_prefix < num_prefix:
        padding = q.new_zeros(q.shape[0] - layout.total_queries, *q.shape[1:])
        q, k, v = (None if x is None else x[: layout.total_queries] for x in (q, k, v))
        prefix_k, prefix_v = (
            None if x is None else x[: layout.total_prefix] for x in (prefix_k, prefix_v)
        )
        own = masked_attention_sdpa(
            q,
            k,
            v,
            offsets,
            prefix_k,
            prefix_v,
            prefix_offsets,
            causal,
            scale,
            lengths,
            prefix_lengths,
        )
        return torch.cat((own, padding))
    num_keys = num_prefix + (0 if k is None else k.shape[0])
    # Nothing to compute, but a graph to keep.
    if not q.shape[0] or not num_keys:
        return masked_attention_reference(
            q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, causal, scale
        )
    if layout.regular:
        return _regular(layout, q, k, v, prefix_k, prefix_v, causal, scale)
    return padded_attention(q, k, v, prefix_k, prefix_v, layout, scale)


def _regular(
    layout: DenseLayout,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    def joined(prefix: Tensor | None, suffix: Tensor | None) -> Tensor:
        parts = [
            _heads_first(x, layout.num_samples)
            for x in (prefix, suffix)
            if x is not None and x.shape[0]
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    keys, values = joined(prefix_k, k), joined(prefix_v, v)
    out = dense_attention(
        _heads_first(q, layout.num_samples),
        keys,
        values,
        causal=causal and k is not None,
        scale=scale,
    )
    return out.transpose(1, 2).flatten(0, 1)


def padded_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    layout: DenseLayout,
    scale: float,
) -> Tensor:
    """Return (S, A, E) of ragged samples, padded to the dense layout.

    All sizes are read from shapes, so that torch.compile makes one graph for all batches.
    """
    num_samples, _, num_queries, num_slots = layout.mask.shape
    repeat = q.shape[1] // (prefix_k if k is None else k).shape[1]

    def dense(prefix: Tensor | None, suffix: Tensor | None) -> Tensor:
        example = prefix if suffix is None else suffix
        slots = example.new_zeros(num_samples * num_slots, *example.shape[1:])
        if prefix is not None:
            slots = slots.index_copy(0, layout.prefix_rows, prefix)
        if suffix is not None:
            slots = slots.index_copy(0, layout.suffix_rows, suffix)
        # Heads are repeated explicitly because the CUDA kernels that take a mask do not take
        # grouped heads.
        return _heads_first(slots, num_samples).repeat_interleave(repeat, dim=1)

    queries = q.new_zeros(num_samples * num_queries, *q.shape[1:]).index_copy(
        0, layout.query_rows, q
    )
    out = dense_attention(
        _heads_first(queries, num_samples),
        dense(prefix_k, k),
        dense(prefix_v, v),
        layout.mask,
        scale=scale,
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, layout.query_rows)


def padded_in_graph(
    layout: DenseLayout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: None,
    prefix_v: None,
    causal: bool,
    scale: float,
) -> Tensor:
    """Return `padded_attention` of samples without prefix. The mask of the layout is causal."""
    return padded_attention(q, k, v, prefix_k, prefix_v, layout, scale)


def padded_layout(
    offsets: Tensor,
    prefix_offsets: Tensor | None,
    causal: bool,
    lengths: tuple[int, ...],
    prefix_lengths: Lengths,
) -> DenseLayout | None:
    """Return the layout for `padded_in_graph`.

    None if there is a prefix, or if nothing has to be padded because all samples have equal
    lengths.
    """
    if prefix_offsets is not None:
        return None
    layout = cached_layout(_make_layout, offsets, None, True, causal, lengths, None)
    return None if layout.regular else layout
