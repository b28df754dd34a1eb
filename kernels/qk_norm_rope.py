"""Queries, keys and values for attention, with RMS norm per head and rotary embedding.

Two streams are joined into one sequence. RoPE (arXiv 2104.09864) rotates pairs (2f, 2f + 1), as
in FLUX and Z-Image.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iomm.kernels.dispatch import pick, register
from iomm.kernels.triton_ops import support


def qk_norm_rope(
    qkv_BNPAE: Tensor,
    q_weight_E: Tensor | None,
    k_weight_E: Tensor | None,
    cos_NF: Tensor,
    sin_NF: Tensor,
    *,
    condition: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (q, k, v), each (B, L, A, E) in the dtype of qkv, ready for attention.

    q and k are divided by their root mean square over E (eps inside the root), multiplied by
    their weight, and rotated. v is unchanged. Differentiable in projections and weights.

    Args:
        qkv_BNPAE: Projections (B, N, 3, A, E) of the main stream.
        q_weight_E: Weight of the q norm. None means 1.
        k_weight_E: Weight of the k norm. None means 1.
        cos_NF: Cosines (N, E / 2) of the rotation angles, float32 or float64. With L = C + N rows
            instead of N, the first C rotate the condition, which is not rotated otherwise. With
            (B, N or L, E / 2) each sample has its own angles; only PyTorch's formula has those.
        sin_NF: Sines of the rotation angles, shaped like the cosines.
        condition: (projections, q weight, k weight) of a second stream, which comes first in the
            joint sequence of L = C + N. Its projections are qkv (B, C, 3, A, E) or kv (B, C, 2, A,
            E). With kv it has no queries, and q has N rows.
        eps: Added to the mean square.

    Raises:
        ValueError: Shapes or dtypes do not match.
    """
    if qkv_BNPAE.dim() != 5 or qkv_BNPAE.shape[2] != 3:
        raise ValueError(f"qkv must be (B, N, 3, A, E), got {tuple(qkv_BNPAE.shape)}")
    batch, length, _, heads, dim = qkv_BNPAE.shape
    projections, q_weight, k_weight = condition or (None, None, None)
    joint = length if projections is None else projections.shape[1] + length
    if (
        cos_NF.shape[:-2] not in ((), (batch,))
        or cos_NF.shape[-2] not in (length, joint)
        or cos_NF.shape[-1] != dim // 2
        or sin_NF.shape != cos_NF.shape
        or dim % 2
    ):
        raise ValueError(
            f"cos and sin must be ({length} or {joint}, {dim // 2}), "
            f"got {tuple(cos_NF.shape)} and {tuple(sin_NF.shape)}"
        )
    if projections is not None and (
        projections.dim() != 5
        or projections.shape[2] not in (2, 3)
        or projections.dtype != qkv_BNPAE.dtype
        or (projections.shape[0], *projections.shape[3:]) != (batch, heads, dim)
    ):
        raise ValueError(
            f"the condition must be (B, C, 2 or 3, A, E) to match qkv {tuple(qkv_BNPAE.shape)} in "
            f"{qkv_BNPAE.dtype}, got {tuple(projections.shape)} in {projections.dtype}"
        )
    for weight in (q_weight_E, k_weight_E, q_weight, k_weight):
        if weight is not None and weight.shape != (dim,):
            raise ValueError(f"weights must be ({dim},), got {tuple(weight.shape)}")
    if cos_NF.dim() == 3:
        run = qk_norm_rope_torch
    else:
        run = pick("qk_norm_rope", qkv_BNPAE.device, qkv_BNPAE.dtype)
    return run(
        qkv_BNPAE, q_weight_E, k_weight_E, cos_NF, sin_NF, projections, q_weight, k_weight, eps
    )


def _joint(
    norm: Callable[[Tensor, Tensor | None], Tensor],
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    condition: Tensor | None,
    condition_q_weight: Tensor | None,
    condition_k_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    (first_cos, first_sin), (cos, sin) = _split_tables(cos, sin, qkv.shape[1])
    q, k = rotate(norm(q, q_weight), cos, sin), rotate(norm(k, k_weight), cos, sin)
    if condition is not None:
        *first_q, first_k, first_v = condition.unbind(2)
        first_q = [norm(x, condition_q_weight) for x in first_q]
        first_k = norm(first_k, condition_k_weight)
        if first_cos is not None:
            first_q = [rotate(x, first_cos, first_sin) for x in first_q]
            first_k = rotate(first_k, first_cos, first_sin)
        if first_q:
            q = torch.cat((*first_q, q), dim=1)
        k = torch.cat((first_k, k), dim=1)
        v = torch.cat((first_v, v), dim=1)
    return q, k, v


def _split_tables(
    cos: Tensor, sin: Tensor, length: int
) -> tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor, Tensor]]:
    """Return (cos, sin) of the condition, None if it is not rotated, and of the main stream."""
    num_first = cos.shape[-2] - length
    if not num_first:
        return (None, None), (cos, sin)
    parts = (table.split((num_first, length), dim=-2) for table in (cos, sin))
    return tuple(zip(*parts, strict=True))


def rotate(x_BLAE: Tensor, cos_LF: Tensor, sin_LF: Tensor) -> Tensor:
    """Rotate the pairs (2f, 2f + 1) of every head by the angles of its position.

    Computed in at least float32 and rounded once.
    """
    even, odd = (
        x_BLAE.to(torch.promote_types(x_BLAE.dtype, torch.float32))
        .unflatten(-1, (-1, 2))
        .unbind(-1)
    )
    cos, sin = cos_LF.unsqueeze(-2), sin_LF.unsqueeze(-2)
    return (
        torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        .flatten(-2)
        .to(x_BLAE.dtype)
    )


def qk_norm_rope_reference(*arguments: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (q, k, v) as defined by `qk_norm_rope`.

    Computed in at least float32 and rounded once. The arguments of every backend are (qkv,
    q_weight, k_weight, cos, sin, condition, condition_q_weight, condition_k_weight, eps).
    """
    *tensors, eps = arguments
    dtype = tensors[0].dtype
    wide = [x if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x if weight is None else x * weight

    return tuple(x.to(dtype) for x in _joint(norm, *wide))


def qk_norm_rope_torch(*arguments: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (q, k, v) from PyTorch's RMS norm.

    The normalised values are rounded to the dtype of qkv before they are rotated.
    """
    *tensors, eps = arguments
    return _joint(lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, eps), *tensors)


# (token, head) vectors per program. At E = 128 each thread holds 32 values.
ROWS, WARPS = 32, 4


def qk_norm_rope_triton(*arguments: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (q, k, v) from the Triton kernels, with one launch per stream.

    Raises:
        ValueError: The head dim is not a power of 2 above 15.
    """
    *tensors, eps = arguments
    dim = tensors[0].shape[-1]
    if dim < 16 or dim & dim - 1:
        raise ValueError(
            f"qk_norm_rope:triton requires a head dim of 16, 32, 64, 128 or 256, got {dim}. "
            "Select another backend in IOMM_KERNELS."
        )
    tensors[3:5] = (x.float() for x in tensors[3:5])
    return _forward(*(None if x is None else x.contiguous() for x in tensors), eps)


class _Stream(NamedTuple):
    """Projections of one stream, its norm weights and rotation tables, and its first rows."""

    x: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    # First row in q.
    first_query: int
    # First row in k and v.
    first: int


def _streams(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    condition: Tensor | None,
    condition_q_weight: Tensor | None,
    condition_k_weight: Tensor | None,
) -> tuple[list[_Stream], int, int]:
    """Return the streams, the number of rows of q, and the number of rows of k and v."""
    num_condition = 0 if condition is None else condition.shape[1]
    num_condition_queries = (
        num_condition if condition is not None and condition.shape[2] == 3 else 0
    )
    first_tables, tables = (None, None), (cos, sin)
    if cos is not None:
        first_tables, tables = _split_tables(cos, sin, qkv.shape[1])
    streams = [_Stream(qkv, q_weight, k_weight, *tables, num_condition_queries, num_condition)]
    if condition is not None:
        streams.append(
            _Stream(condition, condition_q_weight, condition_k_weight, *first_tables, 0, 0)
        )
    return streams, num_condition_queries + qkv.shape[1], num_condition + qkv.shape[1]


def _grid(x: Tensor) -> tuple[int, int]:
    return -(-x.shape[1] * x.shape[3] // ROWS), x.shape[0]


def _constants(
    x: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None
) -> dict[str, Any]:
    """Return the compile-time arguments of both kernels for one stream."""
    return {
        "HEADS": x.shape[3],
        "E": x.shape[4],
        "PARTS": x.shape[2],
        "ROWS": ROWS,
        "num_warps": WARPS,
        "Q_WEIGHT": q_weight is not None and x.shape[2] == 3,
        "K_WEIGHT": k_weight is not None,
        "ROTATE": cos is not None,
    }


@torch.library.custom_op("iomm::qk_norm_rope", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    condition: Tensor | None,
    condition_q_weight: Tensor | None,
    condition_k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from iomm.kernels.triton_ops.qk_norm_rope import forward_kernel

    streams, num_queries, num_joint = _streams(
        qkv, q_weight, k_weight, cos, sin, condition, condition_q_weight, condition_k_weight
    )
    q, k, v = (
        torch.empty(qkv.shape[0], rows, *qkv.shape[3:], dtype=qkv.dtype, device=qkv.device)
        for rows in (num_queries, num_joint, num_joint)
    )
    for x, q_norm, k_norm, cos_x, sin_x, first_query, first in streams:
        if x.numel():
            forward_kernel[_grid(x)](
                x,
                q_norm,
                k_norm,
                cos_x,
                sin_x,
                q,
                k,
                v,
                x.shape[1],
                num_queries,
                num_joint,
                first_query,
                first,
                eps,
                **_constants(x, q_norm, k_norm, cos_x),
            )
    return q, k, v


@_forward.register_fake
def _(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    condition: Tensor | None,
    condition_q_weight: Tensor | None,
    condition_k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _, num_queries, num_joint = _streams(qkv, None, None, None, None, condition, None, None)
    return tuple(
        qkv.new_empty(qkv.shape[0], rows, *qkv.shape[3:])
        for rows in (num_queries, num_joint, num_joint)
    )


@torch.library.custom_op(
    "iomm::qk_norm_rope_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def _backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    condition: Tensor | None,
    condition_q_weight: Tensor | None,
    condition_k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (qkv, q_weight, k_weight) and of the condition's three tensors.

    Gradients of missing tensors are empty.
    """
    from iomm.kernels.triton_ops.qk_norm_rope import backward_kernel

    streams, num_queries, num_joint = _streams(
        qkv, q_weight, k_weight, cos, sin, condition, condition_q_weight, condition_k_weight
    )
    gradients = []
    for x, q_norm, k_norm, cos_x, sin_x, first_query, first in streams:
        dx = torch.empty_like(x)
        programs, samples = _grid(x)
        size = samples * programs, 2, x.shape[4] // 2
        sums = [
            None if weight is None else torch.empty(size, dtype=torch.float32, device=x.device)
            for weight in (q_norm, k_norm)
        ]
        if x.shape[2] == 2 and sums[0] is not None:
            # The stream has a q weight but no queries.
            sums[0].zero_()
        if x.numel():
            backward_kernel[programs, samples](
                x,
                q_norm,
                k_norm,
                cos_x,
                sin_x,
                dq,
                dk,
                dv,
                dx,
                *sums,
                x.shape[1],
                num_queries,
                num_joint,
                first_query,
                first,
                eps,
                **_constants(x, q_norm, k_norm, cos_x),
            )
        gradients.append(dx)
        gradients += [
            x.new_empty(0) if total is None else total.sum(0).T.reshape(-1).to(weight.dtype)
            for total, weight in zip(sums, (q_norm, k_norm), strict=True)
        ]
    return tuple(gradients + [qkv.new_empty(0) for _ in range(6 - len(gradients))])


@_backward.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    condition: Tensor | None,
    condition_q_weight: Tensor | None,
    condition_k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(
        qkv.new_empty(0) if x is None else torch.empty_like(x)
        for x in (qkv, q_weight, k_weight, condition, condition_q_weight, condition_k_weight)
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.present = [x is not None for x in tensors]
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward(
        dq.contiguous(), dk.contiguous(), dv.contiguous(), *ctx.saved_tensors, ctx.eps
    )
    # cos and sin have no gradient.
    gradients = (*gradients[:3], None, None, *gradients[3:])
    # needs_input_grad has one more entry, for eps.
    return (
        *(
            x if present and needed else None
            for x, present, needed in zip(
                gradients, ctx.present, ctx.needs_input_grad, strict=False
            )
        ),
        None,
    )


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


# PyTorch's backend comes first because torch.compile fuses it with the surrounding ops, and
# Triton's has not been timed on a GPU yet.
register("qk_norm_rope", "torch", qk_norm_rope_torch)
register(
    "qk_norm_rope",
    "triton",
    qk_norm_rope_triton,
    devices=support.DEVICES,
    dtypes=support.DTYPES,
    why_not=support.why_not,
    note=support.NOTE,
)
register("qk_norm_rope", "reference", qk_norm_rope_reference)
