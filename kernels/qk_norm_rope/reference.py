"""The specification of qk_norm_rope, and the same formula by PyTorch's own norm."""

import torch
import torch.nn.functional as F


def _joint(norm, qkv, q_weight, k_weight, cos, sin, condition, condition_q_weight, condition_k_weight):
    q, k, v = qkv.unbind(2)
    q, k = rotate(norm(q, q_weight), cos, sin), rotate(norm(k, k_weight), cos, sin)
    if condition is not None:
        *first_q, first_k, first_v = condition.unbind(2)
        if first_q:
            q = torch.cat((norm(first_q[0], condition_q_weight), q), dim=1)
        k, v = torch.cat((norm(first_k, condition_k_weight), k), dim=1), torch.cat((first_v, v), dim=1)
    return q, k, v


def rotate(x_BLAE, cos_LF, sin_LF):
    """Turns the pairs (2f, 2f + 1) of every head by the angle of its position; at least float32, rounded once."""
    even, odd = x_BLAE.to(torch.promote_types(x_BLAE.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_LF[:, None], sin_LF[:, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x_BLAE.dtype)


def qk_norm_rope_reference(*arguments):
    """(q, k, v) as `qk_norm_rope` describes them; at least float32 throughout, rounded once."""
    *tensors, eps = arguments
    dtype = tensors[0].dtype
    wide = [x if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]

    def norm(x, weight):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x if weight is None else x * weight

    return tuple(x.to(dtype) for x in _joint(norm, *wide))


def qk_norm_rope_torch(*arguments):
    """The same; the normalised values are rounded to qkv's dtype before they are rotated."""
    *tensors, eps = arguments
    return _joint(lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, eps), *tensors)
