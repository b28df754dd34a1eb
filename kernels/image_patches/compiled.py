"""The C++ and CUDA bodies: one custom op, the library is chosen by the device."""

import torch

from iomm.kernels import native


@torch.library.custom_op("iomm::image_patches", mutates_args=(), device_types=("cpu", "cuda"))
def image_patches_compiled(
    pixels_BHWC: torch.Tensor, patch: int, mean: list[float], std: list[float], dtype: torch.dtype
) -> torch.Tensor:
    batch, height, width, _ = pixels_BHWC.shape
    shape = batch, (height // patch) * (width // patch), 3 * patch * patch
    patches = torch.empty(shape, dtype=dtype, device=pixels_BHWC.device)
    native.launch(pixels_BHWC.device, "iomm_image_patches", pixels_BHWC, batch, height, width, patch,
                  *(255.0 * m for m in mean), *(1 / (255.0 * s) for s in std), int(dtype == torch.bfloat16), patches)
    return patches


@image_patches_compiled.register_fake
def _(pixels_BHWC, patch, mean, std, dtype):
    batch, height, width, _ = pixels_BHWC.shape
    return pixels_BHWC.new_empty(batch, (height // patch) * (width // patch), 3 * patch * patch, dtype=dtype)
