"""The specification of image_patches."""

import torch


def normalised(pixels_BHWC, mean, std):
    """Return uint8 pixels (B, H, W, 3) as float32 (B, 3, H, W): (v - mean) / std per channel with v in [0, 1].

    Computed as (value - 255 mean) x 1 / (255 std), each rounded to float32."""
    subtracted = torch.tensor([255 * m for m in mean], device=pixels_BHWC.device)[:, None, None]
    factor = torch.tensor([1 / (255 * s) for s in std], device=pixels_BHWC.device)[:, None, None]
    values_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return (values_BCHW - subtracted) * factor


def image_patches_reference(pixels_BHWC, patch, mean, std, dtype):
    """(B, P, 3 p p) as `image_patches` describes it."""
    values = normalised(pixels_BHWC, mean, std)
    batch, channels, height, width = values.shape
    cut = values.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch).to(dtype)
