"""The Triton body as a custom op with its own backward; kernels in forward.py and backward.py.

What it does that no library does: two segments of keys (so a cached prefix is never copied), a prefix without gradient
(nothing is computed or allocated for it), raggedness and grouped heads in one, and no wait of the host for lengths.
"""

import math

import torch

from iomm.kernels.triton_ops.support import power_of_2

HEAD_DIMS = 32, 64, 128
LOG2_E = math.log2(math.e)


def _shapes(q, k, offsets, prefix_k, causal):
    """Compile-time arguments that all three kernels share."""
    keys = prefix_k if k is None else k
    return {
        "SAMPLES": power_of_2(len(offsets)),
        "HEADS": q.shape[1],
        "KEY_HEADS": keys.shape[1],
        "E": q.shape[2],
        "CAUSAL": causal and k is not None,
    }


def _tile(kernel, q):
    from iomm.kernels.triton_ops.tiles import tile_for

    tile = tile_for(kernel, q.shape[2], q.device)
    return tile, {
        "OWN": tile.own,
        "WALK": tile.walk,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def masked_attention_triton(q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, causal, scale):
    """(S, A, E) as `masked_attention` describes it. Raises ValueError for head dims other than 32, 64 and 128."""
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(
            f"masked_attention:triton has head dims {HEAD_DIMS}, got {q.shape[2]}: choose another body"
        )
    contiguous = (
        None if x is None else x.contiguous()
        for x in (q, k, v, offsets, prefix_k, prefix_v, prefix_offsets)
    )
    return _forward(*contiguous, causal, float(scale))[0]


@torch.library.custom_op("iomm::masked_attention", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    offsets: torch.Tensor,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    prefix_offsets: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (S, A, E), log2-sum (A, S) float32)."""
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
def _(q, k, v, offsets, prefix_k, prefix_v, prefix_offsets, causal, scale):
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "iomm::masked_attention_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def _backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    offsets: torch.Tensor,
    prefix_k: torch.Tensor | None,
    prefix_v: torch.Tensor | None,
    prefix_offsets: torch.Tensor | None,
    causal: bool,
    scale: float,
    need_suffix: bool,
    need_prefix: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, prefix_k and prefix_v; empty tensors for those that nobody needs."""
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
    grad,
    out,
    lse,
    q,
    k,
    v,
    offsets,
    prefix_k,
    prefix_v,
    prefix_offsets,
    causal,
    scale,
    need_suffix,
    need_prefix,
):
    def like(x, needed):
        return torch.empty_like(x) if needed else q.new_empty(0)

    return (
        torch.empty_like(q),
        like(k, need_suffix),
        like(v, need_suffix),
        like(prefix_k, need_prefix),
        like(prefix_v, need_prefix),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx, grad, _):
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


_forward.register_autograd(_differentiate, setup_context=_save)
