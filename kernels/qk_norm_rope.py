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
    their weight, and rotated. v is unchanged. Differentiable in projections and weights. With a
    condition they may be sequence-first in memory (L, B, A, E), as the output of attention is then:
    the tokens of one stream are one matrix.

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
        run = pick("qk_norm_rope", qkv_BNPAE.device, qkv_BNPAE.dtype, dim)
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
HEAD_DIMS = 16, 32, 64, 128, 256


def qk_norm_rope_triton(*arguments: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (q, k, v) from the Triton kernels, with one launch per stream.

    With a condition they are sequence-first in memory. E must be in HEAD_DIMS.
    """
    *tensors, eps = arguments
    tensors[3:5] = (x.float() for x in tensors[3:5])
    outputs = _forward(*(None if x is None else x.contiguous() for x in tensors), eps)
    return outputs if tensors[5] is None else tuple(x.transpose(0, 1) for x in outputs)


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


class _Layout(NamedTuple):
    """The streams, and the joint tensors that the kernels read and write.

    Joint tensors are (B, L, A, E) with one stream and (L, B, A, E) with two.
    """

    streams: list[_Stream]
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    # Tokens from one sample to the next, and from one token of a sample to the next.
    sample_stride: int
    token_stride: int


def _layout(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    condition: Tensor | None,
    condition_q_weight: Tensor | None,
    condition_k_weight: Tensor | None,
) -> _Layout:
    batch, length, _, heads, dim = qkv.shape
    if condition is None:
        shape = batch, length, heads, dim
        main = _Stream(qkv, q_weight, k_weight, cos, sin, 0, 0)
        return _Layout([main], shape, shape, length, 1)
    num_condition = condition.shape[1]
    num_queries = num_condition if condition.shape[2] == 3 else 0
    first_tables, tables = (None, None), (cos, sin)
    if cos is not None:
        first_tables, tables = _split_tables(cos, sin, length)
    streams = [
        _Stream(qkv, q_weight, k_weight, *tables, num_queries, num_condition),
        _Stream(condition, condition_q_weight, condition_k_weight, *first_tables, 0, 0),
    ]
    shapes = ((rows + length, batch, heads, dim) for rows in (num_queries, num_condition))
    return _Layout(streams, *shapes, 1, batch)


def _joint_shapes(layout: _Layout) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of q, k and v as the kernels see them."""
    return layout.query_shape, layout.key_shape, layout.key_shape


def _sums_shape(x: Tensor) -> tuple[int, int, int]:
    """Return the shape of a stream's partial sums, one row per program."""
    programs, samples = _grid(x)
    return programs * samples, 2, x.shape[4] // 2


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

    layout = _layout(
        qkv, q_weight, k_weight, cos, sin, condition, condition_q_weight, condition_k_weight
    )
    q, k, v = (
        torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for shape in _joint_shapes(layout)
    )
    for x, q_norm, k_norm, cos_x, sin_x, first_query, first in layout.streams:
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
                layout.sample_stride,
                layout.token_stride,
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
    layout = _layout(qkv, None, None, None, None, condition, None, None)
    return tuple(qkv.new_empty(shape) for shape in _joint_shapes(layout))


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

    Those of weights are partial sums (P, 2, E / 2), the even values before the odd ones. Those of
    missing tensors are empty.
    """
    from iomm.kernels.triton_ops.qk_norm_rope import backward_kernel

    layout = _layout(
        qkv, q_weight, k_weight, cos, sin, condition, condition_q_weight, condition_k_weight
    )
    gradients = []
    for x, q_norm, k_norm, cos_x, sin_x, first_query, first in layout.streams:
        dx = torch.empty_like(x)
        sums = [
            None
            if weight is None
            else torch.empty(_sums_shape(x), dtype=torch.float32, device=x.device)
            for weight in (q_norm, k_norm)
        ]
        if x.shape[2] == 2 and sums[0] is not None:
            # The stream has a q weight but no queries.
            sums[0].zero_()
        if x.numel():
            backward_kernel[_grid(x)](
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
                layout.sample_stride,
                layout.token_stride,
                first_query,
                first,
                eps,
                **_constants(x, q_norm, k_norm, cos_x),
            )
        gradients.append(dx)
        gradients += [x.new_empty(0) if total is None else total for total in sums]
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
    gradients = []
    for x, *weights in (
        (qkv, q_weight, k_weight),
        (condition, condition_q_weight, condition_k_weight),
    ):
        gradients.append(qkv.new_empty(0) if x is None else torch.empty_like(x))
        gradients += [
            qkv.new_empty(0)
            if weight is None
            else weight.new_empty(_sums_shape(x), dtype=torch.float32)
            for weight in weights
        ]
    return tuple(gradients)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.present = [x is not None for x in tensors]
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    gradients = list(
        _backward(dq.contiguous(), dk.contiguous(), dv.contiguous(), *tensors, ctx.eps)
    )
    # cos and sin have no gradient.
    gradients[3:3] = None, None
    # Outside of the op, where torch.compile fuses the sums.
    for index in (1, 2, 6, 7):
        if ctx.present[index]:
            total = gradients[index].sum(0).T.reshape(-1)
            gradients[index] = total.to(tensors[index].dtype)
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


# Triton's comes first because torch.compile makes 6 kernels of PyTorch's formula that move 1.09 GB
# for a block of IOMM-B at 16 images, where one launch per stream moves 0.38 GB.
register(
    "qk_norm_rope",
    "triton",
    qk_norm_rope_triton,
    devices=support.DEVICES,
    dtypes=support.DTYPES,
    head_dims=HEAD_DIMS,
    why_not=support.why_not,
)
register("qk_norm_rope", "torch", qk_norm_rope_torch)
register("qk_norm_rope", "reference", qk_norm_rope_reference)
