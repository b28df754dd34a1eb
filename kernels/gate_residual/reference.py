"""The specification of gate_residual, and the same formula in the inputs' dtype."""

import torch


def gate_residual_reference(x_BLD, gate_BD, y_BLD):
    """(B, L, D) as `gate_residual` describes it; at least float32, rounded once."""
    dtype = torch.promote_types(x_BLD.dtype, torch.float32)
    return (x_BLD.to(dtype) + gate_BD[:, None].to(dtype) * y_BLD.to(dtype)).to(x_BLD.dtype)


def gate_residual_torch(x_BLD, gate_BD, y_BLD):
    """The same; the product is rounded to x's dtype unless torch.compile fuses it with the sum."""
    return x_BLD + gate_BD[:, None] * y_BLD
