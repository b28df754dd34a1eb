"""The Triton body as a custom op with its own backward: one launch for each stream."""

import torch

ROWS, WARPS = 32, 4    # (token, head) vectors of a program: at E = 128 32 values a thread


def qk_norm_rope_triton(*arguments):
    """(q, k, v) as `qk_norm_rope` describes them. Raises ValueError unless the head dim is a power of 2 above 15."""
    *tensors, eps = arguments
    dim = tensors[0].shape[-1]
    if dim < 16 or dim & dim - 1:
        raise ValueError(f"qk_norm_rope:triton wants a head dim of 16, 32, 64, 128 or 256, got {dim}: "
                         "choose another body")
    tensors[3:5] = (x.float() for x in tensors[3:5])
    return _forward(*(None if x is None else x.contiguous() for x in tensors), eps)


def _streams(qkv, q_weight, k_weight, cos, sin, condition, condition_q_weight, condition_k_weight):
    """(projections, weights, tables, first row in q, first row in k and v) of each stream; rows of q; rows of k."""
    num_condition = 0 if condition is None else condition.shape[1]
    num_asking = num_condition if condition is not None and condition.shape[2] == 3 else 0
    streams = [(qkv, q_weight, k_weight, cos, sin, num_asking, num_condition)]
    if condition is not None:
        streams.append((condition, condition_q_weight, condition_k_weight, None, None, 0, 0))
    return streams, num_asking + qkv.shape[1], num_condition + qkv.shape[1]


def _grid(x):
    return -(-x.shape[1] * x.shape[3] // ROWS), x.shape[0]


def _constants(x, q_weight, k_weight, cos):
    return {"HEADS": x.shape[3], "E": x.shape[4], "PARTS": x.shape[2], "ROWS": ROWS, "num_warps": WARPS,
            "Q_WEIGHT": q_weight is not None and x.shape[2] == 3, "K_WEIGHT": k_weight is not None,
            "ROTATE": cos is not None}


@torch.library.custom_op("iomm::qk_norm_rope", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(
    qkv: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, cos: torch.Tensor,
    sin: torch.Tensor, condition: torch.Tensor | None, condition_q_weight: torch.Tensor | None,
    condition_k_weight: torch.Tensor | None, eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from iomm.kernels.qk_norm_rope.kernels import forward_kernel
    streams, num_queries, num_joint = _streams(
        qkv, q_weight, k_weight, cos, sin, condition, condition_q_weight, condition_k_weight)
    q, k, v = (torch.empty(qkv.shape[0], rows, *qkv.shape[3:], dtype=qkv.dtype, device=qkv.device)
               for rows in (num_queries, num_joint, num_joint))
    for x, q_norm, k_norm, cos_x, sin_x, first_query, first in streams:
        if x.numel():
            forward_kernel[_grid(x)](
                x, q_norm, k_norm, cos_x, sin_x, q, k, v, x.shape[1], num_queries, num_joint, first_query, first, eps,
                **_constants(x, q_norm, k_norm, cos_x))
    return q, k, v


@_forward.register_fake
def _(qkv, q_weight, k_weight, cos, sin, condition, condition_q_weight, condition_k_weight, eps):
    _, num_queries, num_joint = _streams(qkv, None, None, None, None, condition, None, None)
    return tuple(qkv.new_empty(qkv.shape[0], rows, *qkv.shape[3:]) for rows in (num_queries, num_joint, num_joint))


@torch.library.custom_op("iomm::qk_norm_rope_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, qkv: torch.Tensor, q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, condition: torch.Tensor | None,
    condition_q_weight: torch.Tensor | None, condition_k_weight: torch.Tensor | None, eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of both projections and of their weights; empty tensors for what is not there."""
    from iomm.kernels.qk_norm_rope.kernels import backward_kernel
    streams, num_queries, num_joint = _streams(
        qkv, q_weight, k_weight, cos, sin, condition, condition_q_weight, condition_k_weight)
    gradients = []
    for x, q_norm, k_norm, cos_x, sin_x, first_query, first in streams:
        dx = torch.empty_like(x)
        programs, samples = _grid(x)
        size = samples * programs, 2, x.shape[4] // 2
        sums = [None if weight is None else torch.empty(size, dtype=torch.float32, device=x.device)
                for weight in (q_norm, k_norm)]
        if x.shape[2] == 2 and sums[0] is not None:
            sums[0].zero_()     # a weight for queries that are not there
        if x.numel():
            backward_kernel[programs, samples](
                x, q_norm, k_norm, cos_x, sin_x, dq, dk, dv, dx, *sums, x.shape[1], num_queries, num_joint, first_query,
                first, eps, **_constants(x, q_norm, k_norm, cos_x))
        gradients.append(dx)
        gradients += [x.new_empty(0) if total is None else total.sum(0).T.reshape(-1).to(weight.dtype)
                      for total, weight in zip(sums, (q_norm, k_norm))]
    return tuple(gradients + [qkv.new_empty(0) for _ in range(6 - len(gradients))])


@_backward.register_fake
def _(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, condition, condition_q_weight, condition_k_weight, eps):
    return tuple(qkv.new_empty(0) if x is None else torch.empty_like(x) for x in (
        qkv, q_weight, k_weight, condition, condition_q_weight, condition_k_weight))


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.present = [x is not None for x in tensors]
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dq, dk, dv):
    got = _backward(dq.contiguous(), dk.contiguous(), dv.contiguous(), *ctx.saved_tensors, ctx.eps)
    got = (*got[:3], None, None, *got[3:])
    return (*(x if here and needed else None for x, here, needed in zip(got, ctx.present, ctx.needs_input_grad)), None)


_forward.register_autograd(_differentiate, setup_context=_save)
