"""Library backends for ragged batches on CUDA: PyTorch's varlen_attn and flash-attn.

PyTorch's varlen_attn is FlashAttention 2 inside torch. Both libraries require the keys of a
sample to be contiguous, so prefix and suffix are copied into one tensor. The mask rule is then
their causal mask, aligned at the last key. They compute the gradients of a prefix even if they
are not needed.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from iomm.kernels.masked_attention.packing import (
    Lengths,
    cached_layout,
    sample_lengths,
    target_rows,
)

DTYPES = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class PackedLayout:
    """Rows of both key segments in one packed tensor, and the sizes that the libraries need."""

    key_offsets: Tensor
    max_queries: int
    max_keys: int
    total_queries: int
    total_keys: int
    suffix_rows: Tensor | None
    prefix_rows: Tensor | None


def _make_layout(
    offsets: Tensor,
    prefix_offsets: Tensor | None,
    num_rows: int,
    num_prefix: int,
    has_suffix: bool,
    lengths: Lengths = None,
    prefix_lengths: Lengths = None,
) -> PackedLayout:
    lengths = sample_lengths("offsets", offsets, num_rows, lengths)
    suffix = lengths if has_suffix else (0,) * len(lengths)
    if prefix_offsets is None:
        prefix, prefix_offsets = (0,) * len(lengths), torch.zeros_like(offsets)
    else:
        prefix = sample_lengths("prefix_offsets", prefix_offsets, num_prefix, prefix_lengths)
    keys = [a + b for a, b in zip(prefix, suffix, strict=True)]
    # The keys of all earlier samples come first, then the prefix, then the suffix.
    key_offsets = prefix_offsets + offsets if has_suffix else prefix_offsets
    starts_B = key_offsets[:-1].long()
    return PackedLayout(
        key_offsets=key_offsets,
        max_queries=max(lengths, default=0),
        max_keys=max(keys, default=0),
        total_queries=sum(lengths),
        total_keys=sum(keys),
        suffix_rows=target_rows(offsets, sum(suffix), starts_B + prefix_offsets.diff())
        if has_suffix
        else None,
        prefix_rows=target_rows(prefix_offsets, sum(prefix), starts_B),
    )


def _join(layout: PackedLayout, prefix: Tensor | None, suffix: Tensor | None) -> Tensor:
    """Return the keys (or values) of both segments in one packed tensor.

    Rows are unique, so the backward pass is a gather without atomics.
    """
    example = prefix if suffix is None else suffix
    joined = example.new_zeros(layout.total_keys, *example.shape[1:])
    for part, rows in ((prefix, layout.prefix_rows), (suffix, layout.suffix_rows)):
        if part is not None:
            joined = joined.index_copy(0, rows, part[: len(rows)])
    return joined


def _run(
    attend: Callable[..., Tensor],
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
    """Return the attention of a library function on the joined keys.

    `attend` takes (q, k, v, offsets, key_offsets, max_queries, max_keys, causal, scale). The
    other arguments are the same as in `masked_attention_reference`.
    """
    num_prefix = 0 if prefix_k is None else prefix_k.shape[0]
    layout = cached_layout(
        _make_layout,
        offsets,
        prefix_offsets,
        q.shape[0],
        num_prefix,
        k is not None,
        lengths,
        prefix_lengths,
    )
    padding = q.new_zeros(q.shape[0] - layout.total_queries, *q.shape[1:])
    q = q[: layout.total_queries]
    if k is None:
        keys, values = (x[: layout.total_keys] for x in (prefix_k, prefix_v))
    elif prefix_k is None:
        keys, values = (x[: layout.total_keys] for x in (k, v))
    else:
        keys, values = _join(layout, prefix_k, k), _join(layout, prefix_v, v)
    # There is nothing to compute, but the result must stay in the graph.
    if not q.shape[0] or not layout.total_keys:
        out = q * 0 + keys.sum() * 0 + values.sum() * 0
    else:
        out = attend(
            q,
            keys,
            values,
            offsets,
            layout.key_offsets,
            layout.max_queries,
            layout.max_keys,
            causal and k is not None,
            scale,
        )
    return torch.cat((out, padding)) if padding.shape[0] else out


def masked_attention_varlen(*arguments: Tensor | bool | float | Lengths) -> Tensor:
    """Return (S, A, E) from torch.nn.attention.varlen. CUDA, bf16 and fp16 only.

    The arguments are the same as in `masked_attention_reference`.
    """
    return _run(_torch_varlen, *arguments)


@functools.cache
def _torch_options() -> frozenset[str]:
    """Return the parameters of this torch's varlen_attn.

    Grouped heads exist from 2.12 on. In older versions causal is a bool.
    """
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    key_offsets: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
) -> Tensor:
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


def varlen_why_not() -> str | None:
    """Return why PyTorch's varlen_attn cannot run here, or None if it can."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if "scale" not in _torch_options():
        return f"varlen_attn of torch {torch.__version__} has no scale argument"
    return None


def masked_attention_flash(*arguments: Tensor | bool | float | Lengths) -> Tensor:
    """Return (S, A, E) from the flash-attn package. CUDA, bf16 and fp16 only.

    The arguments are the same as in `masked_attention_reference`.
    """
    return _run(_flash_varlen, *arguments)


def _flash_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    key_offsets: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
) -> Tensor:
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


def flash_why_not() -> str | None:
    """Return why flash-attn cannot run here, or None if it can."""
    return None if importlib.util.find_spec("flash_attn") else "flash-attn is not installed"
