"""Rows normalised, then scaled and shifted per sample: the start of every modulated block (adaLN, arXiv 2212.09748)."""

from iomm.kernels import triton_support
from iomm.kernels.dispatch import pick, register
from iomm.kernels.norm_modulate.fused import norm_modulate_triton
from iomm.kernels.norm_modulate.reference import norm_modulate_reference, norm_modulate_torch

# PyTorch's body comes first: torch.compile fuses it with what surrounds it, and no GPU has timed the other one yet.
register("norm_modulate", "torch", norm_modulate_torch)
register("norm_modulate", "triton", norm_modulate_triton, devices=triton_support.DEVICES,
         dtypes=triton_support.DTYPES, why_not=triton_support.why_not, note=triton_support.NOTE)
register("norm_modulate", "reference", norm_modulate_reference)


def norm_modulate(x_BLD, shift_BD, scale_BD, *, kind="layer", eps=1e-6):
    """(B, L, D) in x's dtype: norm(x) (1 + scale) + shift, one shift and scale per sample; differentiable in all three.

    kind "layer": (x - mean) / sqrt(variance + eps); "rms": x / sqrt(mean square + eps), both over D and without weights
    of their own (a learned weight w is scale' = w (1 + scale) - 1). shift may be None. Raises ValueError on shapes or
    dtypes that do not fit."""
    wanted = x_BLD.shape[0], x_BLD.shape[-1]
    if x_BLD.dim() != 3 or scale_BD.shape != wanted or (shift_BD is not None and shift_BD.shape != wanted):
        raise ValueError(f"x must be (B, L, D), shift and scale (B, D), got {tuple(x_BLD.shape)}, "
                         f"{None if shift_BD is None else tuple(shift_BD.shape)} and {tuple(scale_BD.shape)}")
    if scale_BD.dtype != x_BLD.dtype or (shift_BD is not None and shift_BD.dtype != x_BLD.dtype):
        raise ValueError(f"x, shift and scale must share a dtype, got {x_BLD.dtype} and {scale_BD.dtype}")
    if kind not in ("layer", "rms"):
        raise ValueError(f"kind must be layer or rms, got {kind!r}")
    return pick("norm_modulate", x_BLD.device, x_BLD.dtype)(x_BLD, shift_BD, scale_BD, kind == "layer", eps)
