"""The PyTorch body: one scaled_dot_product_attention, maskless where the batch is regular, else padded to dense."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from iomm.kernels.masked_attention.packing import lengths_of, remembered, rows_in
from iomm.kernels.masked_attention.reference import masked_attention_reference

# cuDNN's backward gives NaN with a mask at lengths % 128 == 64 (pytorch #196678), so masked calls go without it.
_MASKED_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def dense_attention(q, k, v, mask=None, *, causal=False, scale=None):
    """(B, A, L, E): softmax attention by PyTorch. k, v may have fewer heads than q. mask: bool, True where visible.

    With gradients in bfloat16 on a CPU plain products take its place: torch 2.13's backward there is 2 to 8 times slower
    than they are (320 and 80 tokens; benchmarks/LOG.md). They round scores and weights to bfloat16, which it does not.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        repeat = q.shape[1] // k.shape[1]
        k, v = (x if repeat == 1 else x.repeat_interleave(repeat, dim=1) for x in (k, v))
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(
            -1
        ) @ v
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
class Plan:
    """Where packed rows go in the dense layout. Keys of a sample lie in slots [prefix | suffix]."""

    num_samples: int
    # Longest sample
    num_queries: int
    # Longest prefix
    num_prefix: int
    # All samples alike: packed is dense already.
    regular: bool
    total_queries: int
    total_prefix: int
    # (S,) row of each query in (B * num_queries)
    query_rows: torch.Tensor | None = None
    # (S,) row of each suffix key in (B * num_slots)
    suffix_rows: torch.Tensor | None = None
    # (Tp,)
    prefix_rows: torch.Tensor | None = None
    # (B, 1, num_queries, num_slots), True where visible
    mask: torch.Tensor | None = None


def _make_plan(offsets, prefix_offsets, has_suffix, causal):
    lengths = lengths_of("offsets", offsets)
    prefix_lengths = (
        [0] * len(lengths)
        if prefix_offsets is None
        else lengths_of("prefix_offsets", prefix_offsets)
    )
    num_queries, num_prefix = max(lengths, default=0), max(prefix_lengths, default=0)
    alike = len(set(lengths)) <= 1 and len(set(prefix_lengths)) <= 1
    sizes = {
        "num_samples": len(lengths),
        "num_queries": num_queries,
        "num_prefix": num_prefix,
        "total_queries": sum(lengths),
        "total_prefix": sum(prefix_lengths),
    }
    if alike and not (causal and has_suffix and num_prefix):
        return Plan(regular=True, **sizes)
    num_slots = num_prefix + (num_queries if has_suffix else 0)
    device, samples = offsets.device, torch.arange(len(lengths))
    slot_J = torch.arange(num_slots)
    visible_BJ = slot_J < torch.tensor(prefix_lengths)[:, None]
    visible = visible_BJ[:, None].repeat(1, num_queries, 1)
    if has_suffix:
        suffix_J = slot_J - num_prefix
        own_BJ = (suffix_J >= 0) & (suffix_J < torch.tensor(lengths)[:, None])
        reach_I = torch.arange(num_queries) if causal else torch.full((num_queries,), num_queries)
        visible |= own_BJ[:, None] & (suffix_J <= reach_I[:, None])
    # A row that sees nothing would be 0/0. Slot 0 of such a sample is padding, all zeros: so is all that comes of it.
    if num_slots:
        visible[..., 0] |= ~visible.any(-1)
    return Plan(
        regular=False,
        **sizes,
        mask=visible[:, None].to(device),
        query_rows=rows_in(lengths, samples * num_queries, 0, device),
        suffix_rows=rows_in(lengths, samples * num_slots, num_prefix, device)
        if has_suffix
        else None,
        prefix_rows=rows_in(prefix_lengths, samples * num_slots, 0, device),
    )


def _heads_first(x, num_samples):
    return x.unflatten(0, (num_samples, -1)).transpose(1, 2)


def masked_attention_sdpa(q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, causal, scale):
    """(S, A, E) as `masked_attention` describes it."""
    plan = remembered(_make_plan, offsets, prefix_offsets, k is not None, causal)
    num_prefix = 0 if prefix_k is None else prefix_k.shape[0]
    if plan.total_queries > q.shape[0] or plan.total_prefix > num_prefix:
        raise ValueError(
            f"offsets end at {plan.total_queries} queries and {plan.total_prefix} prefix keys, "
            f"but there are {q.shape[0]} and {num_prefix}"
        )
    # Rows behind the last sample.
    if plan.total_queries < q.shape[0] or plan.total_prefix < num_prefix:
        behind = q.new_zeros(q.shape[0] - plan.total_queries, *q.shape[1:])
        q, k, v = (None if x is None else x[: plan.total_queries] for x in (q, k, v))
        prefix_k, prefix_v = (
            None if x is None else x[: plan.total_prefix] for x in (prefix_k, prefix_v)
        )
        own = masked_attention_sdpa(
            q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, causal, scale
        )
        return torch.cat((own, behind))
    num_keys = num_prefix + (0 if k is None else k.shape[0])
    # Nothing to compute, but a graph to keep.
    if not q.shape[0] or not num_keys:
        return masked_attention_reference(
            q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, causal, scale
        )
    run = _regular if plan.regular else _padded
    return run(plan, q, k, v, prefix_k, prefix_v, causal, scale)


def _regular(plan, q, k, v, prefix_k, prefix_v, causal, scale):
    def joined(prefix, suffix):
        parts = [
            _heads_first(x, plan.num_samples)
            for x in (prefix, suffix)
            if x is not None and x.shape[0]
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    keys, values = joined(prefix_k, k), joined(prefix_v, v)
    out = dense_attention(
        _heads_first(q, plan.num_samples),
        keys,
        values,
        causal=causal and k is not None,
        scale=scale,
    )
    return out.transpose(1, 2).flatten(0, 1)


def _padded(plan, q, k, v, prefix_k, prefix_v, causal, scale):
    num_slots = plan.mask.shape[-1]
    repeat = q.shape[1] // (prefix_k if k is None else k).shape[1]

    def dense(prefix, suffix):
        some = prefix if suffix is None else suffix
        slots = some.new_zeros(plan.num_samples * num_slots, *some.shape[1:])
        if prefix is not None:
            slots = slots.index_copy(0, plan.prefix_rows, prefix)
        if suffix is not None:
            slots = slots.index_copy(0, plan.suffix_rows, suffix)
        # Heads are repeated by hand: the CUDA kernels that take a mask do not take grouped heads.
        return _heads_first(slots, plan.num_samples).repeat_interleave(repeat, dim=1)

    queries = q.new_zeros(plan.num_samples * plan.num_queries, *q.shape[1:]).index_copy(
        0, plan.query_rows, q
    )
    out = dense_attention(
        _heads_first(queries, plan.num_samples),
        dense(prefix_k, k),
        dense(prefix_v, v),
        plan.mask,
        scale=scale,
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, plan.query_rows)
