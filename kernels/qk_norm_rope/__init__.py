"""Queries, keys and values for attention: RMS norm per head, rotary embedding, two streams joined into one sequence.

Rotation in pairs (2f, 2f + 1), as FLUX and Z-Image have it (RoPE, arXiv 2104.09864).
"""

from iomm.kernels import triton_support
from iomm.kernels.dispatch import pick, register
from iomm.kernels.qk_norm_rope.fused import qk_norm_rope_triton
from iomm.kernels.qk_norm_rope.reference import qk_norm_rope_reference, qk_norm_rope_torch

# PyTorch's body comes first: torch.compile fuses it with what surrounds it, and no GPU has timed the other one yet.
register("qk_norm_rope", "torch", qk_norm_rope_torch)
register("qk_norm_rope", "triton", qk_norm_rope_triton, devices=triton_support.DEVICES,
         dtypes=triton_support.DTYPES, why_not=triton_support.why_not, note=triton_support.NOTE)
register("qk_norm_rope", "reference", qk_norm_rope_reference)


def qk_norm_rope(qkv_BNPAE, q_weight_E, k_weight_E, cos_NF, sin_NF, *, condition=None, eps=1e-6):
    """(q, k, v), each (B, L, A, E) in qkv's dtype: the projections of one sequence, ready for attention.

    qkv (B, N, 3, A, E): q and k are divided by their root mean square over E (eps inside the root), times their weight
    (None: 1), and rotated by the angles of cos, sin (N, E / 2), float32 or float64; v stays as it is.
    condition: (qkv (B, C, 3, A, E) or kv (B, C, 2, A, E), q weight, k weight) of a second stream that comes first in
    the joint sequence of L = C + N and is not rotated; with kv alone it asks nothing, and q has N rows.
    Differentiable in projections and weights. Raises ValueError on shapes that do not fit."""
    if qkv_BNPAE.dim() != 5 or qkv_BNPAE.shape[2] != 3:
        raise ValueError(f"qkv must be (B, N, 3, A, E), got {tuple(qkv_BNPAE.shape)}")
    batch, length, _, heads, dim = qkv_BNPAE.shape
    if cos_NF.shape != (length, dim // 2) or sin_NF.shape != cos_NF.shape or dim % 2:
        raise ValueError(f"cos and sin must be ({length}, {dim // 2}), "
                         f"got {tuple(cos_NF.shape)} and {tuple(sin_NF.shape)}")
    parts, q_weight, k_weight = condition or (None, None, None)
    if parts is not None and (parts.dim() != 5 or parts.shape[2] not in (2, 3) or parts.dtype != qkv_BNPAE.dtype
                              or (parts.shape[0], *parts.shape[3:]) != (batch, heads, dim)):
        raise ValueError(f"the condition must be (B, C, 2 or 3, A, E) like qkv {tuple(qkv_BNPAE.shape)} in "
                         f"{qkv_BNPAE.dtype}, got {tuple(parts.shape)} in {parts.dtype}")
    for weight in (q_weight_E, k_weight_E, q_weight, k_weight):
        if weight is not None and weight.shape != (dim,):
            raise ValueError(f"weights must be ({dim},), got {tuple(weight.shape)}")
    run = pick("qk_norm_rope", qkv_BNPAE.device, qkv_BNPAE.dtype)
    return run(qkv_BNPAE, q_weight_E, k_weight_E, cos_NF, sin_NF, parts, q_weight, k_weight, eps)
