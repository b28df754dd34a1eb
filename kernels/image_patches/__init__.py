"""Patch rows for the ViT, normalised, made from decoded pixels in one pass."""

import torch

from iomm.kernels import native
from iomm.kernels.dispatch import pick, register
from iomm.kernels.image_patches.compiled import image_patches_compiled
from iomm.kernels.image_patches.reference import image_patches_reference, normalised

__all__ = ["image_patches", "normalised"]

_NATIVE_DTYPES = torch.float32, torch.bfloat16
register("image_patches", "cpp", image_patches_compiled, devices=("cpu",), dtypes=_NATIVE_DTYPES,
         why_not=lambda: native.why_not("cpu"))
register("image_patches", "cuda", image_patches_compiled, devices=("cuda",), dtypes=_NATIVE_DTYPES,
         why_not=lambda: native.why_not("cuda"))
register("image_patches", "reference", image_patches_reference)


def image_patches(pixels_BHWC, patch, *, mean, std, dtype):
    """Return the patches of uint8 pixels (B, H, W, 3) as rows (B, P, 3 p p) in a floating `dtype`. No gradient.

    Patches run row by row; their values, in the order (channel, y, x) of a convolution's weight, are those of
    `normalised`: a linear layer on them is the ViT's patch embedding. All backends give the same bits. Raises ValueError
    on shapes, dtypes or sides that are no multiple of `patch`."""
    if pixels_BHWC.dtype != torch.uint8 or pixels_BHWC.dim() != 4 or pixels_BHWC.shape[3] != 3:
        raise ValueError(f"pixels must be uint8 (B, H, W, 3), got {pixels_BHWC.dtype} {tuple(pixels_BHWC.shape)}")
    height, width = pixels_BHWC.shape[1:3]
    if not 1 <= patch <= 128 or height % patch or width % patch:
        raise ValueError(f"images of {height} x {width} cannot be cut into patches of {patch}: "
                         f"both sides must be multiples of it, and it of 1 to 128")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating one, got {dtype}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must be three numbers each, std above 0, got {mean} and {std}")
    run = pick("image_patches", pixels_BHWC.device, dtype)
    return run(pixels_BHWC.contiguous(), patch, list(mean), list(std), dtype)
