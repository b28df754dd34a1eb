"""The C++ and CUDA bodies: one custom op, the library is chosen by the device. The noise is never stored."""

import torch

from iomm.kernels import native


@torch.library.custom_op("iomm::noisy_tokens", mutates_args=(), device_types=("cpu", "cuda"))
def noisy_tokens_compiled(
    latents_BCHW: torch.Tensor, t_B: torch.Tensor, seed: int, n_B: torch.Tensor, patch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_samples, channels, height, width = latents_BCHW.shape
    shape = num_samples, (height // patch) * (width // patch), channels * patch * patch
    noisy_BNK = torch.empty(shape, dtype=latents_BCHW.dtype, device=latents_BCHW.device)
    target_BNK = torch.empty_like(noisy_BNK)
    native.launch(latents_BCHW.device, "iomm_noisy_tokens", latents_BCHW, t_B.float(), seed, n_B, num_samples, channels,
                  height, width, patch, int(latents_BCHW.dtype == torch.bfloat16), noisy_BNK, target_BNK)
    return noisy_BNK, target_BNK


@noisy_tokens_compiled.register_fake
def _(latents_BCHW, t_B, seed, n_B, patch):
    num_samples, channels, height, width = latents_BCHW.shape
    noisy_BNK = latents_BCHW.new_empty(num_samples, (height // patch) * (width // patch), channels * patch * patch)
    return noisy_BNK, torch.empty_like(noisy_BNK)
