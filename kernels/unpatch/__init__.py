"""Latent tokens back to latents: the inverse of the packing "c (h p) (w q) -> (h w) (c p q)"."""

import torch

from iomm.kernels import native
from iomm.kernels.dispatch import pick, register
from iomm.kernels.unpatch.compiled import unpatch_compiled
from iomm.kernels.unpatch.reference import unpatch_reference

_NATIVE_DTYPES = torch.float32, torch.bfloat16, torch.float16
register("unpatch", "cpp", unpatch_compiled, devices=("cpu",), dtypes=_NATIVE_DTYPES,
         why_not=lambda: native.why_not("cpu"))
register("unpatch", "cuda", unpatch_compiled, devices=("cuda",), dtypes=_NATIVE_DTYPES,
         why_not=lambda: native.why_not("cuda"))
register("unpatch", "reference", unpatch_reference)


def unpatch(tokens_BNK, height, width, patch=2):
    """(B, C, H, W) latents of tokens (B, N, K), differentiable: undoes `patch_tokens`. Bodies move the same bits.

    Raises ValueError if sizes do not fit."""
    if tokens_BNK.dim() != 3:
        raise ValueError(f"tokens must have shape (B, N, K), got {tuple(tokens_BNK.shape)}")
    num_tokens, token_dim = tokens_BNK.shape[1:]
    if height % patch or width % patch or num_tokens != (height // patch) * (width // patch) or token_dim % patch**2:
        raise ValueError(f"{num_tokens} tokens of {token_dim} values do not make latents of {height} x {width} "
                         f"with patches of {patch}")
    return pick("unpatch", tokens_BNK.device, tokens_BNK.dtype)(tokens_BNK.contiguous(), height, width, patch)
