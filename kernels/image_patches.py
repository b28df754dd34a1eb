"""Patch rows for the ViT, made from decoded pixels and normalised in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from iomm.kernels import native
from iomm.kernels.dispatch import pick, register


def image_patches(
    pixels_BHWC: Tensor,
    patch: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Return the patches of an image batch as rows (B, P, 3 p p). Has no gradient.

    Patches are ordered row by row. Their values come from `normalised`, in the order (channel,
    y, x) of a convolution's weight, so a linear layer on them is the ViT's patch embedding. All
    backends return the same bits.

    Args:
        pixels_BHWC: uint8 pixels (B, H, W, 3).
        patch: Side p of a patch in pixels, 1 to 128. Must divide H and W.
        mean: Mean per channel, for values in [0, 1].
        std: Standard deviation per channel, for values in [0, 1].
        dtype: Floating dtype of the result.

    Raises:
        ValueError: A shape or dtype is wrong, or a side is not a multiple of `patch`.
    """
    if pixels_BHWC.dtype != torch.uint8 or pixels_BHWC.dim() != 4 or pixels_BHWC.shape[3] != 3:
        raise ValueError(
            f"pixels must be uint8 (B, H, W, 3), got {pixels_BHWC.dtype} {tuple(pixels_BHWC.shape)}"
        )
    height, width = pixels_BHWC.shape[1:3]
    if not 1 <= patch <= 128 or height % patch or width % patch:
        raise ValueError(
            f"images of {height} x {width} cannot be cut into patches of {patch}: "
            f"the patch size must be 1 to 128, and both sides must be multiples of it"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, got {dtype}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(
            f"mean and std must be three numbers each, std above 0, got {mean} and {std}"
        )
    run = pick("image_patches", pixels_BHWC.device, dtype)
    return run(pixels_BHWC.contiguous(), patch, list(mean), list(std), dtype)


def normalised(pixels_BHWC: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return uint8 pixels (B, H, W, 3) as normalised float32 (B, 3, H, W).

    The result is (v - mean) / std per channel with v in [0, 1]. It is computed as (value - 255
    mean) x 1 / (255 std), with each operation rounded to float32.
    """
    subtracted = torch.tensor([255 * m for m in mean], device=pixels_BHWC.device)[:, None, None]
    factor = torch.tensor([1 / (255 * s) for s in std], device=pixels_BHWC.device)[:, None, None]
    values_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(
        torch.float32, memory_format=torch.contiguous_format
    )
    return (values_BCHW - subtracted) * factor


def image_patches_reference(
    pixels_BHWC: Tensor, patch: int, mean: list[float], std: list[float], dtype: torch.dtype
) -> Tensor:
    """Return (B, P, 3 p p) as defined by `image_patches`."""
    values = normalised(pixels_BHWC, mean, std)
    batch, channels, height, width = values.shape
    cut = values.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch).to(dtype)


@torch.library.custom_op("iomm::image_patches", mutates_args=(), device_types=("cpu", "cuda"))
def image_patches_compiled(
    pixels_BHWC: Tensor, patch: int, mean: list[float], std: list[float], dtype: torch.dtype
) -> Tensor:
    """Return (B, P, 3 p p) from the C++ or CUDA library, chosen by the device."""
    batch, height, width, _ = pixels_BHWC.shape
    shape = batch, (height // patch) * (width // patch), 3 * patch * patch
    patches = torch.empty(shape, dtype=dtype, device=pixels_BHWC.device)
    native.launch(
        pixels_BHWC.device,
        "iomm_image_patches",
        pixels_BHWC,
        batch,
        height,
        width,
        patch,
        *(255.0 * m for m in mean),
        *(1 / (255.0 * s) for s in std),
        int(dtype == torch.bfloat16),
        patches,
    )
    return patches


@image_patches_compiled.register_fake
def _(
    pixels_BHWC: Tensor, patch: int, mean: list[float], std: list[float], dtype: torch.dtype
) -> Tensor:
    batch, height, width, _ = pixels_BHWC.shape
    return pixels_BHWC.new_empty(
        batch, (height // patch) * (width // patch), 3 * patch * patch, dtype=dtype
    )


_NATIVE_DTYPES = torch.float32, torch.bfloat16
register(
    "image_patches",
    "cpp",
    image_patches_compiled,
    devices=("cpu",),
    dtypes=_NATIVE_DTYPES,
    why_not=lambda: native.why_not("cpu"),
)
register(
    "image_patches",
    "cuda",
    image_patches_compiled,
    devices=("cuda",),
    dtypes=_NATIVE_DTYPES,
    why_not=lambda: native.why_not("cuda"),
)
register("image_patches", "reference", image_patches_reference)
