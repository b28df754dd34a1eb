"""Attention over ragged samples, each with a prefix that all of its queries see and a suffix that they are part of.

The one mask law of the project: query i of a sample sees all of that sample's prefix keys and, of the suffix, the
keys up to i (causal) or all (bidirectional).

Bodies, in order of preference until benchmarks/ops.py has timed them on a GPU:
    sdpa        any device and dtype; pads ragged batches. First, as the one that is proven on every machine
    varlen      CUDA, halves: torch.nn.attention.varlen, keys copied together
    flash       CUDA, halves: the flash-attn package, keys copied together
    triton      CUDA, halves, head dim 32, 64 or 128: two segments, gradient-free prefix, no wait of the host
    reference   the specification
They differ in rounding alone; `IOMM_KERNELS=masked_attention:triton` chooses one.
"""

import torch

from iomm.kernels.dispatch import pick, register
from iomm.kernels.masked_attention import varlen
from iomm.kernels.masked_attention.reference import masked_attention_reference
from iomm.kernels.masked_attention.sdpa import masked_attention_sdpa
from iomm.kernels.masked_attention.triton_op import masked_attention_triton
from iomm.kernels.triton_ops import support

register("masked_attention", "sdpa", masked_attention_sdpa)
register(
    "masked_attention",
    "varlen",
    varlen.masked_attention_varlen,
    devices=("cuda",),
    dtypes=varlen.DTYPES,
    why_not=varlen.varlen_why_not,
    note=support.NOTE,
)
register(
    "masked_attention",
    "flash",
    varlen.masked_attention_flash,
    devices=("cuda",),
    dtypes=varlen.DTYPES,
    why_not=varlen.flash_why_not,
    note=support.NOTE,
)
register(
    "masked_attention",
    "triton",
    masked_attention_triton,
    devices=support.DEVICES,
    dtypes=support.DTYPES,
    why_not=support.why_not,
    note=support.NOTE,
)
register("masked_attention", "reference", masked_attention_reference)


def _check_keys(name, k, v, q):
    if k.dim() != 3 or k.shape != v.shape or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"{name} keys and values must be (tokens, G, {q.shape[2]}) alike, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads are not a multiple of the {k.shape[1]} {name} key heads"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"q and the {name} keys and values must share dtype and device, got {q.dtype} {q.device}, "
            f"{k.dtype} {k.device}, {v.dtype} {v.device}"
        )


def _check_offsets(name, offsets, q):
    if (
        offsets.dtype != torch.int32
        or offsets.dim() != 1
        or len(offsets) < 1
        or offsets.device != q.device
    ):
        raise ValueError(
            f"{name} must be int32 of shape (B + 1,) on {q.device}, got {offsets.dtype} of shape "
            f"{tuple(offsets.shape)} on {offsets.device}"
        )


def masked_attention(
    q, k, v, offsets, *, prefix_k=None, prefix_v=None, prefix_offsets=None, causal=True, scale=None
):
    """(S, A, E): softmax attention of the packed queries q (S, A, E), differentiable in q, k, v and the prefix.

    Sample b owns the queries offsets[b] .. offsets[b + 1] (int32, (B + 1,)), the suffix keys k, v (S, G, E) at the same
    places (None for cross-attention to the prefix alone) and the prefix keys prefix_k, prefix_v (Tp, G, E) by
    prefix_offsets (same B). A is a multiple of G: head a reads key head a // (A / G). scale defaults to 1 / sqrt(E).
    Samples and prefixes may be empty; a query that sees no key gives zeros. Rows behind the last offset belong to no
    sample (a packed tensor of fixed capacity): their outputs and gradients are zeros. A prefix without requires_grad
    gets no gradient. Raises ValueError on shapes and dtypes that do not fit, and on offsets where the body reads them
    on the host (all but triton, which cannot and trusts them).
    """
    if q.dim() != 3:
        raise ValueError(f"q must have shape (S, A, E), got {tuple(q.shape)}")
    _check_offsets("offsets", offsets, q)
    if (k is None) != (v is None):
        raise ValueError("k and v go together: give both or neither")
    if len({prefix_k is None, prefix_v is None, prefix_offsets is None}) > 1:
        raise ValueError("prefix_k, prefix_v and prefix_offsets go together: give all or none")
    if k is None and prefix_k is None:
        raise ValueError("there is nothing to attend to: give k and v, or a prefix")
    if k is not None:
        _check_keys("suffix", k, v, q)
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"suffix keys must be as many as the {q.shape[0]} queries, got {k.shape[0]}"
            )
    if prefix_k is not None:
        _check_keys("prefix", prefix_k, prefix_v, q)
        _check_offsets("prefix_offsets", prefix_offsets, q)
        if len(prefix_offsets) != len(offsets):
            raise ValueError(
                f"offsets and prefix_offsets must name equally many samples, "
                f"got {len(offsets) - 1} and {len(prefix_offsets) - 1}"
            )
        if k is not None and k.shape[1] != prefix_k.shape[1]:
            raise ValueError(
                f"suffix and prefix must have equally many key heads, "
                f"got {k.shape[1]} and {prefix_k.shape[1]}"
            )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run = pick("masked_attention", q.device, q.dtype)
    return run(q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, causal, scale)
