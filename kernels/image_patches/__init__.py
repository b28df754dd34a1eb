"""Patch rows for the ViT and normalised pixels for the VAE, made from decoded pixels in one pass."""

import torch

from iomm.kernels import native
from iomm.kernels.dispatch import pick, register
from iomm.kernels.image_patches.compiled import image_patches_compiled
from iomm.kernels.image_patches.reference import image_patches_reference

_PIXELS = torch.uint8, torch.bfloat16, torch.float32
register("image_patches", "cpp", image_patches_compiled, devices=("cpu",), dtypes=_PIXELS,
         why_not=lambda: native.why_not("cpu"))
register("image_patches", "cuda", image_patches_compiled, devices=("cuda",), dtypes=_PIXELS,
         why_not=lambda: native.why_not("cuda"))
register("image_patches", "reference", image_patches_reference)


def image_patches(pixels, patch, *, mean, std, dtype=torch.bfloat16, vae=True):
    """(patches (B, P, 3 p p), VAE pixels (B, 3, H, W) in [-1, 1] or None) in `dtype`, float32 or bfloat16. No gradient.

    pixels: uint8 (B, H, W, 3) of 0 to 255, or float (B, 3, H, W) in [-1, 1], which are VAE pixels already: then the
    second result is they themselves, cast. Patches run row by row; their values, in the order (channel, y, x) of a
    convolution's weight, are (v - mean) / std per channel with v in [0, 1]: a linear layer on them is the ViT's patch
    embedding. Worked out in float32 as value * scale + shift, each rounded, so bodies agree in every bit. Without `vae`
    only patches are made. Raises ValueError on shapes, dtypes or sides that are no multiple of `patch`."""
    is_bytes = pixels.dtype == torch.uint8
    if pixels.dim() != 4 or pixels.shape[3 if is_bytes else 1] != 3 or not (is_bytes or pixels.is_floating_point()):
        raise ValueError(f"pixels must be uint8 (B, H, W, 3) or float (B, 3, H, W), "
                         f"got {pixels.dtype} {tuple(pixels.shape)}")
    height, width = pixels.shape[1:3] if is_bytes else pixels.shape[2:]
    if not 1 <= patch <= 128 or height % patch or width % patch:
        raise ValueError(f"images of {height} x {width} cannot be cut into patches of {patch}: "
                         f"both sides must be multiples of it, and it of 1 to 128")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must be three numbers each, std above 0, got {mean} and {std}")
    unit = 1 / 255 if is_bytes else 1 / 2      # v = value * unit, and 1/2 more for pixels in [-1, 1]
    scale = [unit / s for s in std]
    shift = [((0 if is_bytes else 1 / 2) - m) / s for m, s in zip(mean, std)]
    run = pick("image_patches", pixels.device, pixels.dtype)
    patches, vae_pixels = run(pixels.detach().contiguous(), patch, scale, shift, dtype, vae and is_bytes)
    return patches, (vae_pixels if is_bytes else pixels.to(dtype)) if vae else None
