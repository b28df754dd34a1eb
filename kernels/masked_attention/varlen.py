"""Library bodies for ragged batches on CUDA: PyTorch's varlen_attn (FlashAttention 2 inside torch), and flash-attn.

Both want the keys of a sample in one piece, so prefix and suffix are copied together; the mask law is then their causal
mask, aligned at the last key. They compute gradients of a prefix whether anybody needs them or not.
"""

import functools
import importlib.util
import inspect
from dataclasses import dataclass

import torch

from iomm.kernels.masked_attention.packing import lengths_of, remembered, rows_in

DTYPES = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Packing:
    """Where the keys of both segments go in one packed tensor, and what the libraries ask to know."""

    key_offsets: torch.Tensor
    max_queries: int
    max_keys: int
    total_queries: int
    total_keys: int
    suffix_rows: torch.Tensor | None
    prefix_rows: torch.Tensor | None


def _make_packing(offsets, prefix_offsets, num_rows, num_prefix, has_suffix):
    lengths = lengths_of("offsets", offsets, num_rows)
    suffix = lengths if has_suffix else [0] * len(lengths)
    prefix = (
        [0] * len(lengths)
        if prefix_offsets is None
        else lengths_of("prefix_offsets", prefix_offsets, num_prefix)
    )
    keys = [a + b for a, b in zip(prefix, suffix)]
    bounds = torch.tensor([0, *keys]).cumsum(0)
    device, starts = offsets.device, bounds[:-1]
    return Packing(
        key_offsets=bounds.int().to(device),
        max_queries=max(lengths, default=0),
        max_keys=max(keys, default=0),
        total_queries=sum(lengths),
        total_keys=sum(keys),
        suffix_rows=rows_in(suffix, starts, torch.tensor(prefix, dtype=torch.int64), device)
        if has_suffix
        else None,
        prefix_rows=rows_in(prefix, starts, 0, device),
    )


def _join(packing, prefix, suffix):
    """Keys (or values) of both segments in one packed tensor. Rows are unique: backward is a gather, no atomics."""
    some = prefix if suffix is None else suffix
    joined = some.new_zeros(packing.total_keys, *some.shape[1:])
    for part, rows in ((prefix, packing.prefix_rows), (suffix, packing.suffix_rows)):
        if part is not None:
            joined = joined.index_copy(0, rows, part[: len(rows)])
    return joined


def _run(attend, q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, causal, scale):
    """`attend(q, k, v, offsets, key_offsets, max_queries, max_keys, causal, scale)` on the joined keys."""
    num_prefix = 0 if prefix_k is None else prefix_k.shape[0]
    packing = remembered(
        _make_packing, offsets, prefix_offsets, q.shape[0], num_prefix, k is not None
    )
    behind = q.new_zeros(q.shape[0] - packing.total_queries, *q.shape[1:])
    q = q[: packing.total_queries]
    if k is None:
        keys, values = (x[: packing.total_keys] for x in (prefix_k, prefix_v))
    elif prefix_k is None:
        keys, values = (x[: packing.total_keys] for x in (k, v))
    else:
        keys, values = _join(packing, prefix_k, k), _join(packing, prefix_v, v)
    # Nothing to compute, but a graph to keep.
    if not q.shape[0] or not packing.total_keys:
        out = q * 0 + keys.sum() * 0 + values.sum() * 0
    else:
        out = attend(
            q,
            keys,
            values,
            offsets,
            packing.key_offsets,
            packing.max_queries,
            packing.max_keys,
            causal and k is not None,
            scale,
        )
    return torch.cat((out, behind)) if behind.shape[0] else out


def masked_attention_varlen(*arguments):
    """(S, A, E) as `masked_attention` describes it, by torch.nn.attention.varlen. bf16 and float16, CUDA."""
    return _run(_torch_varlen, *arguments)


@functools.cache
def _torch_options():
    """Which keywords this torch's varlen_attn has: grouped heads from 2.12; causal was a bool once."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _torch_varlen(q, k, v, offsets, key_offsets, max_queries, max_keys, causal, scale):
    from torch.nn.attention.varlen import varlen_attn

    known, options = _torch_options(), {"scale": scale}
    if causal:
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, offsets, key_offsets, max_queries, max_keys, **options)


def varlen_why_not():
    """Why PyTorch's varlen_attn cannot run here, or None."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if "scale" not in _torch_options():
        return f"the varlen_attn of torch {torch.__version__} takes no scale"
    return None


def masked_attention_flash(*arguments):
    """(S, A, E) as `masked_attention` describes it, by the flash-attn package. bf16 and float16, CUDA."""
    return _run(_flash_varlen, *arguments)


def _flash_varlen(q, k, v, offsets, key_offsets, max_queries, max_keys, causal, scale):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        offsets,
        key_offsets,
        max_queries,
        max_keys,
        softmax_scale=scale,
        causal=causal,
        deterministic=True,
    )


def flash_why_not():
    """Why flash-attn cannot run here, or None."""
    return None if importlib.util.find_spec("flash_attn") else "flash-attn is not installed"
