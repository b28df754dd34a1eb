"""Attention over ragged samples, each with a key prefix and a suffix of queries and keys.

The project has one mask rule. Query i of a sample sees all of that sample's prefix keys and, of
its suffix keys, the ones up to i (causal) or all (bidirectional).

Backends, in order of preference:
    varlen      CUDA, bf16 and fp16, head dim up to 192. torch.nn.attention.varlen on joined keys
    flash       CUDA, bf16 and fp16, head dim up to 192. The flash-attn package on joined keys
    sdpa        any device, dtype and head dim. Pads ragged batches
    triton      CUDA, bf16 and fp16, head dim 32, 64 or 128. Two key segments, no copies, prefix
                without gradient, no lengths
    reference   the specification
They differ only in rounding. `IOMM_KERNELS=masked_attention:triton` selects one. The libraries come
before sdpa because they neither pad nor repeat heads nor read a mask: for a layer of IOMM-B's query
pass they move 137 instead of 436 MB, for one of the prefix 7 instead of 46 MB
(benchmarks/LOG.md, 2026-11-30). Triton's counts are lower still (91 and 7 MB), but the speed of its
products is not known until benchmarks/ops.py has timed them on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iomm.kernels.dispatch import pick, register
from iomm.kernels.masked_attention import sdpa, triton_op, varlen
from iomm.kernels.masked_attention.packing import Lengths
from iomm.kernels.masked_attention.reference import masked_attention_reference
from iomm.kernels.triton_ops import support

register(
    "masked_attention",
    "varlen",
    varlen.masked_attention_varlen,
    devices=("cuda",),
    dtypes=varlen.DTYPES,
    head_dims=varlen.HEAD_DIMS,
    why_not=varlen.varlen_why_not,
)
register(
    "masked_attention",
    "flash",
    varlen.masked_attention_flash,
    devices=("cuda",),
    dtypes=varlen.DTYPES,
    head_dims=varlen.HEAD_DIMS,
    why_not=varlen.flash_why_not,
)
register("masked_attention", "sdpa", sdpa.masked_attention_sdpa)
register(
    "masked_attention",
    "triton",
    triton_op.masked_attention_triton,
    devices=support.DEVICES,
    dtypes=support.DTYPES,
    head_dims=triton_op.HEAD_DIMS,
    why_not=support.why_not,
    note=support.NOTE,
)
register("masked_attention", "reference", masked_attention_reference)

# Backend -> (its layout of a batch, its attention with that layout in a graph).
_IN_GRAPH = {
    sdpa.masked_attention_sdpa: (sdpa.padded_layout, sdpa.padded_in_graph),
    varlen.masked_attention_varlen: (varlen.packed_layout, varlen.varlen_in_graph),
    varlen.masked_attention_flash: (varlen.packed_layout, varlen.flash_in_graph),
    triton_op.masked_attention_triton: (triton_op.triton_layout, triton_op.triton_in_graph),
}


@dataclass(frozen=True)
class Plan:
    """Masked attention of one batch with suffix keys, for all layers of a model.

    torch.compile traces `attend` into one graph for all batches: lengths are not part of a plan.
    """

    layout: Any
    run: Callable[..., Tensor]
    causal: bool

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor | None = None,
        prefix_v: Tensor | None = None,
    ) -> Tensor:
        """Return softmax attention (S, A, E), as `masked_attention` does with all rows in use."""
        scale = q.shape[-1] ** -0.5
        return self.run(self.layout, q, k, v, prefix_k, prefix_v, self.causal, scale)


def plan(
    offsets: Tensor,
    dtype: torch.dtype,
    head_dim: int,
    *,
    prefix_offsets: Tensor | None = None,
    causal: bool = True,
    lengths: tuple[int, ...],
    prefix_lengths: Lengths = None,
) -> Plan | None:
    """Return the plan of the chosen backend for one batch, which reads nothing from the GPU.

    None where a backend has to be called outside of a graph, by `masked_attention`: the reference,
    sdpa with a prefix or with samples of equal lengths, and batches without rows.

    Args:
        offsets: as in `masked_attention`, like all further arguments.
        dtype: dtype of queries, keys and values.
        head_dim: E.
        prefix_offsets: None without prefix.
        causal: whether query i sees only the suffix keys up to i.
        lengths: differences of `offsets`.
        prefix_lengths: differences of `prefix_offsets`.
    """
    backend = pick("masked_attention", offsets.device, dtype, head_dim)
    if backend not in _IN_GRAPH:
        return None
    make, run = _IN_GRAPH[backend]
    layout = make(offsets, prefix_offsets, causal, lengths, prefix_lengths)
    return None if layout is None else Plan(layout, run, causal)


def _check_keys(name: str, k: Tensor, v: Tensor, q: Tensor) -> None:
    if k.dim() != 3 or k.shape != v.shape or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"{name} keys and values must both be (tokens, G, {q.shape[2]}), "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads are not a multiple of the {k.shape[1]} {name} key heads"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"q and the {name} keys and values must share dtype and device, "
            f"got {q.dtype} {q.device}, {k.dtype} {k.device}, {v.dtype} {v.device}"
        )


def _check_offsets(name: str, offsets: Tensor, q: Tensor) -> None:
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


def _check_lengths(name: str, lengths: Lengths, offsets: Tensor | None) -> None:
    num_samples = 0 if offsets is None else len(offsets) - 1
    if lengths is not None and len(lengths) != num_samples:
        raise ValueError(f"{name} must have {num_samples} entries, got {len(lengths)}")


def masked_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    offsets: Tensor,
    *,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_offsets: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    lengths: Lengths = None,
    prefix_lengths: Lengths = None,
) -> Tensor:
    """Return softmax attention (S, A, E), differentiable in q, k, v and the prefix.

    Samples and prefixes may be empty. A query that sees no key returns zeros. Rows after the last
    offset belong to no sample (a packed tensor of fixed capacity), and their outputs and
    gradients are zeros.

    Args:
        q: Packed queries (S, A, E).
        k: Suffix keys (S, G, E) in the same rows as the queries, or None for cross-attention to
            the prefix only. A is a multiple of G, and query head a reads key head a // (A / G).
        v: Suffix values (S, G, E), or None like k.
        offsets: int32 (B + 1,). Rows offsets[b] .. offsets[b + 1] of q, k and v belong to sample b.
        prefix_k: Packed prefix keys (Tp, G, E). A prefix without requires_grad gets no gradient.
        prefix_v: Packed prefix values (Tp, G, E).
        prefix_offsets: int32 (B + 1,). Rows of the prefix that belong to each sample.
        causal: If true, query i sees the suffix keys up to i. Otherwise it sees all of them.
        scale: Factor on the scores. The default is 1 / sqrt(E).
        lengths: The differences of `offsets` on the host. If they are None, all backends but
            triton read the offsets, for which the host waits until the GPU has computed them.
        prefix_lengths: The same for `prefix_offsets`.

    Raises:
        ValueError: Shapes or dtypes do not match, or offsets are inconsistent. On a GPU, offsets
            are not checked if the host knows the lengths or the backend is triton, because they
            are not read then.
    """
    if q.dim() != 3:
        raise ValueError(f"q must have shape (S, A, E), got {tuple(q.shape)}")
    _check_offsets("offsets", offsets, q)
    if (k is None) != (v is None):
        raise ValueError("k and v go together. Pass both or neither.")
    if len({prefix_k is None, prefix_v is None, prefix_offsets is None}) > 1:
        raise ValueError("prefix_k, prefix_v and prefix_offsets go together. Pass all or none.")
    if k is None and prefix_k is None:
        raise ValueError("there are no keys to attend to. Pass k and v, or a prefix.")
    if k is not None:
        _check_keys("suffix", k, v, q)
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"there must be one suffix key per query, got {k.shape[0]} keys "
                f"and {q.shape[0]} queries"
            )
    if prefix_k is not None:
        _check_keys("prefix", prefix_k, prefix_v, q)
        _check_offsets("prefix_offsets", prefix_offsets, q)
        if len(prefix_offsets) != len(offsets):
            raise ValueError(
                f"offsets and prefix_offsets must have the same number of samples, "
                f"got {len(offsets) - 1} and {len(prefix_offsets) - 1}"
            )
        if k is not None and k.shape[1] != prefix_k.shape[1]:
            raise ValueError(
                f"suffix and prefix must have the same number of key heads, "
                f"got {k.shape[1]} and {prefix_k.shape[1]}"
            )
    _check_lengths("lengths", lengths, offsets)
    _check_lengths("prefix_lengths", prefix_lengths, prefix_offsets)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    run = pick("masked_attention", q.device, q.dtype, q.shape[-1])
    return run(
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
