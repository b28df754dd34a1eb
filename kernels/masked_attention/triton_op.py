"""The Triton backend as a custom op with its own backward.

The kernels are in triton_ops/attention_forward.py and triton_ops/attention_backward.py. Compared
to the libraries, they take two segments of keys (so a cached prefix is never copied), compute and
allocate nothing for the gradient of a prefix without requires_grad, combine ragged batches with
grouped heads, and do not make the host wait for lengths.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iomm.kernels.masked_attention.packing import Lengths
from iomm.kernels.triton_ops.support import power_of_2

if TYPE_CHECKING:
    # This module must import without Triton.
    from iomm.kernels.triton_ops.tiles import Tile

HEAD_DIMS = 32, 64, 128
LOG2_E = math.log2(math.e)


def _shapes(
    q: Tensor, k: Tensor | None, offsets: Tensor, prefix_k: Tensor | None, causal: bool
) -> dict[str, Any]:
    """Return the compile-time arguments that all three kernels share."""
    keys = prefix_k if k is None else k
    return {
        "SAMPLES": power_of_2(len(offsets)),
        "HEADS": q.shape[1],
        "KEY_HEADS": keys.shape[1],
        "E": q.shape[2],
        "CAUSAL": causal and k is not None,
    }


def _tile(kernel: str, q: Tensor) -> tuple["Tile", dict[str, int]]:
    """Return the tile of a kernel and its launch options."""
    from iomm.kernels.triton_ops.tiles import tile_for

    tile = tile_for(kernel, q.shape[2], q.device)
    return tile, {
        "OWN": tile.own,
        "WALK": tile.walk,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def masked_attention_triton(
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
    """Return (S, A, E) from the Triton kernels, which need no lengths on the host."""
    contiguous = (
        None if x is None else x.contiguous()
        for x in (q, k, v, offsets, prefix_k, prefix_v, prefix_offsets)
    )
    return _forward(*contiguous, causal, float(scale))[0]


@dataclass(frozen=True)
class RaggedOffsets:
    """All that the kernels need to know of a batch."""

    offsets: Tensor
    prefix_offsets: Tensor | None


def triton_layout(
    offsets: Tensor,
    prefix_offsets: Tensor | None,
    causal: bool,
    lengths: tuple[int, ...],
    prefix_lengths: Lengths,
) -> RaggedOffsets:
    """Return the layout for `triton_in_graph`."""
    return RaggedOffsets(offsets, prefix_offsets)


def triton_in_graph(
    layout: RaggedOffsets,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """Return `masked_attention_triton` of a layout."""
    return masked_attention_triton(
        q, k, v, layout.offsets, prefix_k, prefix_v, layout.prefix_offsets, causal, scale
    )


@torch.library.custom_op("iomm::masked_attention", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    offsets: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prefix_offsets: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (S, A, E) and the log2-sum-exp2 of the scores (A, S) in float32."""
    from iomm.kernels.triton_ops.attention_forward import forward_kernel
    from iomm.kernels.triton_ops.tiles import num_slots

    out = torch.empty_like(q)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    if q.shape[0]:
        tile, options = _tile("forward", q)
        grid = q.shape[1], num_slots(q.shape[0], len(offsets) - 1, tile.own)
        forward_kernel[grid](
            q,
            k,
            v,
            offsets,
            prefix_k,
            prefix_v,
            prefix_offsets,
            out,
            lse,
            len(offsets) - 1,
            q.shape[0],
            scale * LOG2_E,
            PREFIX=prefix_k is not None,
            SUFFIX=k is not None,
            **_shapes(q, k, offsets, prefix_k, causal),
            **options,
        )
    return out, lse


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    offsets: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prefix_offsets: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "iomm::masked_attention_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def _backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    offsets: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prefix_offsets: Tensor | None,
    causal: bool,
    scale: float,
    need_suffix: bool,
    need_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, prefix_k and prefix_v. Gradients not needed are empty."""
    from iomm.kernels.triton_ops.attention_backward import keys_kernel, queries_kernel
    from iomm.kernels.triton_ops.tiles import num_slots

    num_samples, shapes = len(offsets) - 1, _shapes(q, k, offsets, prefix_k, causal)
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    if q.shape[0]:
        tile, options = _tile("queries", q)
        grid = q.shape[1], num_slots(q.shape[0], num_samples, tile.own)
        queries_kernel[grid](
            q,
            k,
            v,
            offsets,
            prefix_k,
            prefix_v,
            prefix_offsets,
            out,
            grad,
            lse,
            delta,
            dq,
            num_samples,
            q.shape[0],
            scale,
            scale * LOG2_E,
            PREFIX=prefix_k is not None,
            SUFFIX=k is not None,
            **shapes,
            **options,
        )
    gradients = [dq]
    for keys, values, key_offsets, needed, diagonal in (
        (k, v, offsets, need_suffix, shapes["CAUSAL"]),
        (prefix_k, prefix_v, prefix_offsets, need_prefix, False),
    ):
        if not needed:
            gradients += [q.new_empty(0), q.new_empty(0)]
            continue
        dk, dv = torch.empty_like(keys), torch.empty_like(values)
        if keys.shape[0]:
            tile, options = _tile("keys", q)
            grid = keys.shape[1], num_slots(keys.shape[0], num_samples, tile.own)
            keys_kernel[grid](
                q,
                keys,
                values,
                offsets,
                key_offsets,
                grad,
                lse,
                delta,
                dk,
                dv,
                num_samples,
                q.shape[0],
                keys.shape[0],
                scale,
                scale * LOG2_E,
                **{**shapes, "CAUSAL": diagonal},
                **options,
            )
        gradients += [dk, dv]
    return tuple(gradients)


@_backward.register_fake
def _(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    offsets: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    prefix_offsets: Tensor | None,
    causal: bool,
    scale: float,
    need_suffix: bool,
    need_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None, needed: bool) -> Tensor:
        return torch.empty_like(x) if needed else q.new_empty(0)

    return (
        torch.empty_like(q),
        like(k, need_suffix),
        like(v, need_suffix),
        like(prefix_k, need_prefix),
        like(prefix_v, need_prefix),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _autograd_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, q, k, v, offsets, prefix_k, prefix_v, prefix_offsets = ctx.saved_tensors
    need_q, need_k, need_v, _, need_prefix_k, need_prefix_v, *_ = ctx.needs_input_grad
    need_suffix, need_prefix = need_k or need_v, need_prefix_k or need_prefix_v
    dq, dk, dv, dprefix_k, dprefix_v = _backward(
        grad.contiguous(),
        out,
        lse,
        q,
        k,
        v,
        offsets,
        prefix_k,
        prefix_v,
        prefix_offsets,
        ctx.causal,
        ctx.scale,
        need_suffix,
        need_prefix,
    )
    return (
        dq if need_q else None,
        dk if need_k else None,
        dv if need_v else None,
        None,
        dprefix_k if need_prefix_k else None,
        dprefix_v if need_prefix_v else None,
        None,
        None,
        None,
    )


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
