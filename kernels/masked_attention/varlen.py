"""Library backends for ragged batches on CUDA: PyTorch's varlen_attn and flash-attn.

PyTorch's varlen_attn is FlashAttention 2 inside torch. Both libraries require the keys of a
sample to be contiguous, so prefix and suffix are copied into one tensor. The mask rule is then
their causal mask, aligned at the last key. They compute the gradients of a prefix even if they
are not needed. Nothing is padded, heads are not repeated, and there is no mask tensor.
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
# FlashAttention 2 has wider ones up to 256, but no backward pass for them on sm_86 and sm_89.
HEAD_DIMS = tuple(range(8, 193, 8))


@dataclass(frozen=True)
class PackedLayout:
    """Rows of both key segments in one packed tensor, and the sizes that the libraries need.

    There are no rows if there is only one segment.
    """

    offsets: Tensor
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
    has_both = has_suffix and prefix_offsets is not None
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
        offsets=offsets,
        key_offsets=key_offsets,
        max_queries=max(lengths, default=0),
        max_keys=max(keys, default=0),
        total_queries=sum(lengths),
        total_keys=sum(keys),
        suffix_rows=target_rows(offsets, sum(suffix), starts_B + prefix_offsets.diff())
        if has_both
        else None,
        prefix_rows=target_rows(prefix_offsets, sum(prefix), starts_B) if has_both else None,
    )


def _join(layout: PackedLayout, prefix: Tensor, suffix: Tensor) -> Tensor:
    """Return the keys (or values) of both segments in one packed tensor.

    Rows are unique, so the backward pass is a gather without atomics.
    """
    joined = suffix.new_zeros(prefix.shape[0] + suffix.shape[0], *suffix.shape[1:])
    joined = joined.index_copy(0, layout.prefix_rows, prefix)
    return joined.index_copy(0, layout.suffix_rows, suffix)


def packed_attention(
    attend: Callable[..., Tensor],
    layout: PackedLayout,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """Return the attention of a library function on the joined keys, where no row is padding.

    torch.compile makes one graph for all batches. `attend` takes (q, k, v, offsets, key_offsets,
    max_queries, max_keys, causal, scale).
    """
    if k is None:
        keys, values = prefix_k, prefix_v
    elif prefix_k is None:
        keys, values = k, v
    else:
        keys, values = _join(layout, prefix_k, k), _join(layout, prefix_v, v)
    return attend(
        q,
        keys,
        values,
        layout.offsets,
        layout.key_offsets,
        layout.max_queries,
        layout.max_keys,
        causal and k is not None,
        scale,
    )


def _first_rows(x: Tensor | None, number: int) -> Tensor | None:
    """Return the first rows. The gradient of a slice, even of all rows, is a padded copy."""
    return x if x is None or x.shape[0] == number else x[:number]


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
    """Return the attention of a library function.

    `attend` is as in `packed_attention`. The other arguments are the same as in
    `masked_attention_reference`.
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
    num_padding = q.shape[0] - layout.total_queries
    q, k, v = (_first_rows(x, layout.total_queries) for x in (q, k, v))
    total_prefix = layout.total_keys - (0 if k is None else layout.total_queries)
    prefix_k, prefix_v = (_first_rows(x, total_prefix) for x in (prefix_k, prefix_v))
    # There is nothing to compute, but the result must stay in the graph.
    if not q.shape[0] or not layout.total_keys:
        out = q * 0 + sum(x.sum() * 0 for x in (k, v, prefix_k, prefix_v) if x is not None)
    else:
        out = packed_attention(attend, layout, q, k, v, prefix_k, prefix_v, causal, scale)
    return torch.cat((out, q.new_zeros(num_padding, *q.shape[1:]))) if num_padding else out


def masked_attention_varlen(*arguments: Tensor | bool | float | Lengths) -> Tensor:
    """Return (S, A, E) from torch.nn.attention.varlen. CUDA, bf16 and fp16 only.

    The arguments are the same as in `masked_attention_reference`.
    """
    return _run(_torch_varlen, *arguments)


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

    return varlen_attn(
        q,
        k,
        v,
        offsets,
        key_offsets,
        max_queries,
        max_keys,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=q.shape[1] != k.shape[1],
    )


@functools.cache
def varlen_why_not() -> str | None:
    """Return why PyTorch's varlen_attn cannot run here, or None if it can."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    from torch.nn.attention.varlen import varlen_attn

    if not {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return f"varlen_attn of torch {torch.__version__} lacks an argument"
    if torch.cuda.is_available():
        if not torch.backends.cuda.is_flash_attention_available():
            return "this build of torch has no FlashAttention"
        if torch.cuda.get_device_capability() < (8, 0):
            return "needs compute capability 8.0 (A100) or later"
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


def varlen_in_graph(layout: PackedLayout, *arguments: Tensor | bool | float | None) -> Tensor:
    """Return `packed_attention` of varlen_attn."""
    return packed_attention(_torch_varlen, layout, *arguments)


def flash_in_graph(layout: PackedLayout, *arguments: Tensor | bool | float | None) -> Tensor:
    """Return `packed_attention` of flash-attn."""
    return packed_attention(_flash_varlen, layout, *arguments)


def packed_layout(
    offsets: Tensor,
    prefix_offsets: Tensor | None,
    causal: bool,
    lengths: tuple[int, ...],
    prefix_lengths: Lengths,
) -> PackedLayout | None:
    """Return the layout of samples with suffix keys; None if there is nothing to compute."""
    num_rows, num_prefix = sum(lengths), sum(prefix_lengths or ())
    if not num_rows:
        return None
    return cached_layout(
        _make_layout,
        offsets,
        prefix_offsets,
        num_rows,
        num_prefix,
        True,
        lengths,
        prefix_lengths,
    )
