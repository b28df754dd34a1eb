"""The specification of image_patches."""

import torch


def image_patches_reference(pixels, patch, scale, shift, dtype, with_vae):
    """(patches (B, P, 3 p p), VAE pixels or None) as `image_patches` describes them."""
    values = pixels.permute(0, 3, 1, 2) if pixels.dtype == torch.uint8 else pixels
    values = values.float()
    batch, channels, height, width = values.shape
    scale, shift = (torch.tensor(x, dtype=torch.float32, device=pixels.device)[:, None, None] for x in (scale, shift))
    cut = (values * scale + shift).reshape(batch, channels, height // patch, patch, width // patch, patch)
    patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch).to(dtype)
    return patches, (values * (2 / 255) - 1).to(dtype).contiguous() if with_vae else None
