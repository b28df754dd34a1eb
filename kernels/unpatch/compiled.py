"""The C++ and CUDA bodies: one custom op, the library is chosen by the device."""

import torch

from iomm.kernels import native


@torch.library.custom_op("iomm::unpatch", mutates_args=(), device_types=("cpu", "cuda"))
def unpatch_compiled(tokens_BNK: torch.Tensor, height: int, width: int, patch: int) -> torch.Tensor:
    num_samples, channels = tokens_BNK.shape[0], tokens_BNK.shape[2] // patch**2
    latents = torch.empty(num_samples, channels, height, width, dtype=tokens_BNK.dtype, device=tokens_BNK.device)
    native.launch(tokens_BNK.device, "iomm_unpatch", tokens_BNK, num_samples, channels, height, width, patch,
                  tokens_BNK.element_size(), latents)
    return latents


@unpatch_compiled.register_fake
def _(tokens_BNK, height, width, patch):
    return tokens_BNK.new_empty(tokens_BNK.shape[0], tokens_BNK.shape[2] // patch**2, height, width)


def _save(ctx, inputs, output):
    ctx.patch = inputs[3]


def _differentiate(ctx, grad_BCHW):
    """The packing is a permutation: its inverse, applied to the gradient."""
    batch, channels, height, width = grad_BCHW.shape
    patch = ctx.patch
    cut = grad_BCHW.reshape(batch, channels, height // patch, patch, width // patch, patch)
    tokens = cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)
    return tokens, None, None, None


unpatch_compiled.register_autograd(_differentiate, setup_context=_save)
