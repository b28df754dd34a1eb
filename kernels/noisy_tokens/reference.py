"""The specification of noisy tokens and their target."""

import torch

from iomm.kernels.philox import NOISE
from iomm.kernels.philox.reference import philox_reference


def patch_tokens_reference(latents_BCHW, patch):
    """(B, N, K): "c (h p) (w q) -> (h w) (c p q)"."""
    num_samples, channels, height, width = latents_BCHW.shape
    rows, columns = height // patch, width // patch
    cut = latents_BCHW.reshape(num_samples, channels, rows, patch, columns, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(num_samples, rows * columns, channels * patch * patch)


def noisy_tokens_reference(latents_BCHW, t_B, seed, n_B, patch):
    """(noisy_BNK, target_BNK) as `noisy_tokens` describes them."""
    x = latents_BCHW.to(torch.promote_types(latents_BCHW.dtype, torch.float32))
    z = philox_reference("normal", seed, NOISE, n_B, x.shape[1:].numel()).view_as(x).to(x.dtype)
    t = t_B.to(x.dtype)[:, None, None, None]
    noisy = (1 - t) * x + t * z
    target = z - x
    return tuple(patch_tokens_reference(y, patch).to(latents_BCHW.dtype) for y in (noisy, target))
