"""The C++ and CUDA bodies: one custom op, the library is chosen by the device."""

import torch

from iomm.kernels import native

_KINDS = {torch.uint8: 0, torch.bfloat16: 1, torch.float32: 2}


def image_patches_compiled(pixels, patch, scale, shift, dtype, with_vae):
    """(patches, VAE pixels or None) as `image_patches` describes them."""
    patches, vae = _compiled(pixels, patch, scale, shift, dtype, with_vae)
    return patches, vae if with_vae else None


def _shapes(pixels, patch, with_vae):
    batch, *rest = pixels.shape
    height, width = rest[:2] if pixels.dtype == torch.uint8 else rest[1:]
    patches = batch, (height // patch) * (width // patch), 3 * patch * patch
    return patches, (batch, 3, height, width) if with_vae else (0,), height, width


@torch.library.custom_op("iomm::image_patches", mutates_args=(), device_types=("cpu", "cuda"))
def _compiled(
    pixels: torch.Tensor, patch: int, scale: list[float], shift: list[float], dtype: torch.dtype, with_vae: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(patches, VAE pixels or an empty tensor)."""
    shape, vae_shape, height, width = _shapes(pixels, patch, with_vae)
    patches = torch.empty(shape, dtype=dtype, device=pixels.device)
    vae = torch.empty(vae_shape, dtype=dtype, device=pixels.device)
    native.launch(pixels.device, "iomm_image_patches", pixels, _KINDS[pixels.dtype], shape[0], height, width, patch,
                  *scale, *shift, int(dtype == torch.bfloat16), patches, vae if with_vae else None)
    return patches, vae


@_compiled.register_fake
def _(pixels, patch, scale, shift, dtype, with_vae):
    shape, vae_shape, _, _ = _shapes(pixels, patch, with_vae)
    return pixels.new_empty(shape, dtype=dtype), pixels.new_empty(vae_shape, dtype=dtype)
