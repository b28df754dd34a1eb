"""The specification of norm_modulate, and the same formula by PyTorch's own norms."""

import torch
import torch.nn.functional as F


def norm_modulate_reference(x_BLD, shift_BD, scale_BD, layer, eps):
    """(B, L, D) as `norm_modulate` describes it; at least float32 throughout, rounded once."""
    x = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
    if layer:
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    x = x * (1 + scale_BD[:, None].to(x.dtype))
    if shift_BD is not None:
        x = x + shift_BD[:, None].to(x.dtype)
    return x.to(x_BLD.dtype)


def norm_modulate_torch(x_BLD, shift_BD, scale_BD, layer, eps):
    """The same; rounded to x's dtype after each step unless torch.compile fuses them."""
    width = x_BLD.shape[-1:]
    x_BLD = F.layer_norm(x_BLD, width, eps=eps) if layer else F.rms_norm(x_BLD, width, eps=eps)
    x_BLD = x_BLD * (1 + scale_BD[:, None])
    return x_BLD if shift_BD is None else x_BLD + shift_BD[:, None]
