"""A gated branch added to the residual stream: the end of every modulated block."""

from iomm.kernels import triton_support
from iomm.kernels.dispatch import pick, register
from iomm.kernels.gate_residual.fused import gate_residual_triton
from iomm.kernels.gate_residual.reference import gate_residual_reference, gate_residual_torch

# PyTorch's body comes first: torch.compile fuses it with what surrounds it, and no GPU has timed the other one yet.
register("gate_residual", "torch", gate_residual_torch)
register("gate_residual", "triton", gate_residual_triton, devices=triton_support.DEVICES,
         dtypes=triton_support.DTYPES, why_not=triton_support.why_not, note=triton_support.NOTE)
register("gate_residual", "reference", gate_residual_reference)


def gate_residual(x_BLD, gate_BD, y_BLD):
    """(B, L, D) in x's dtype: x + gate y, one gate per sample; differentiable in all three.

    Raises ValueError on shapes or dtypes that do not fit."""
    if x_BLD.dim() != 3 or y_BLD.shape != x_BLD.shape or gate_BD.shape != (x_BLD.shape[0], x_BLD.shape[2]):
        raise ValueError(f"x and y must be (B, L, D) alike and the gate (B, D), got {tuple(x_BLD.shape)}, "
                         f"{tuple(y_BLD.shape)} and {tuple(gate_BD.shape)}")
    if not x_BLD.dtype == y_BLD.dtype == gate_BD.dtype:
        raise ValueError(f"x, gate and y must share a dtype, got {x_BLD.dtype}, {gate_BD.dtype} and {y_BLD.dtype}")
    return pick("gate_residual", x_BLD.device, x_BLD.dtype)(x_BLD, gate_BD, y_BLD)
