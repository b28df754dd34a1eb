"""Noisy tokens and their velocity targets, made from latents.

The token order is FLUX's, "c (h p) (w q) -> (h w) (c p q)", with N = H/p * W/p tokens of K = C p
p values. `unpatch` is the inverse of this packing.
"""

import torch
from torch import Tensor

from iomm.kernels import native
from iomm.kernels.dispatch import pick, register
from iomm.kernels.philox import NOISE, checked_seed, philox_reference


def _check_latents(latents_BCHW: Tensor, patch: int) -> None:
    if latents_BCHW.dim() != 4 or not latents_BCHW.is_floating_point():
        raise ValueError(
            f"latents must be a floating-point tensor (B, C, H, W), "
            f"got {latents_BCHW.dtype} of shape {tuple(latents_BCHW.shape)}"
        )
    height, width = latents_BCHW.shape[2:]
    if patch < 1 or height % patch or width % patch:
        raise ValueError(
            f"latents of {height} x {width} cannot be cut into patches of {patch}: "
            f"both sides must be multiples of {patch}"
        )


def noisy_tokens(
    latents_BCHW: Tensor, t_B: Tensor, seed: int, n_B: Tensor, patch: int = 2
) -> tuple[Tensor, Tensor]:
    """Return (noisy_BNK, target_BNK) as tokens in the latents' dtype. Has no gradient.

    noisy is (1 - t) x + t z and target is z - x, where x are the latents and z = normal(seed,
    NOISE, n, C * H * W) in latent order. Arithmetic is float32 (float64 for float64 latents).

    Args:
        latents_BCHW: Latents x.
        t_B: Times in [0, 1]. 1 is pure noise.
        seed: Seed of the noise, in [0, 2^64).
        n_B: Sample numbers, int64.
        patch: Side p of a patch in latent pixels.

    Raises:
        ValueError: Shapes, dtypes or devices do not match.
    """
    _check_latents(latents_BCHW, patch)
    seed = checked_seed(seed, n_B)
    num_samples = latents_BCHW.shape[0]
    if t_B.shape != (num_samples,) or n_B.shape != (num_samples,):
        raise ValueError(
            f"t and n must have shape ({num_samples},), one entry per latent, "
            f"got {tuple(t_B.shape)} and {tuple(n_B.shape)}"
        )
    if not t_B.device == n_B.device == latents_BCHW.device:
        raise ValueError(
            f"latents, t and n must be on the same device, "
            f"got {latents_BCHW.device}, {t_B.device} and {n_B.device}"
        )
    run = pick("noisy_tokens", latents_BCHW.device, latents_BCHW.dtype)
    return run(
        latents_BCHW.detach().contiguous(), t_B.detach().contiguous(), seed, n_B.contiguous(), patch
    )


def patch_tokens(latents_BCHW: Tensor, patch: int = 2) -> Tensor:
    """Return latents (B, C, H, W) as tokens (B, N, K), differentiable.

    Raises:
        ValueError: H or W is not a multiple of the patch size.
    """
    _check_latents(latents_BCHW, patch)
    return patch_tokens_reference(latents_BCHW, patch)


def unpatch(tokens_BNK: Tensor, height: int, width: int, patch: int = 2) -> Tensor:
    """Return tokens (B, N, K) as latents (B, C, H, W), differentiable.

    This is the inverse of `patch_tokens`.

    Args:
        tokens_BNK: Tokens.
        height: H of the latents.
        width: W of the latents.
        patch: Side of a patch in latent pixels.

    Raises:
        ValueError: The sizes do not match.
    """
    if tokens_BNK.dim() != 3:
        raise ValueError(f"tokens must have shape (B, N, K), got {tuple(tokens_BNK.shape)}")
    num_samples, num_tokens, token_dim = tokens_BNK.shape
    rows, columns = height // patch, width // patch
    if height % patch or width % patch or num_tokens != rows * columns or token_dim % patch**2:
        raise ValueError(
            f"{num_tokens} tokens of {token_dim} values do not form latents of {height} x {width} "
            f"with patches of {patch}"
        )
    channels = token_dim // patch**2
    tokens = tokens_BNK.reshape(num_samples, rows, columns, channels, patch, patch)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(num_samples, channels, height, width)


def patch_tokens_reference(latents_BCHW: Tensor, patch: int) -> Tensor:
    """Return (B, N, K) in the order "c (h p) (w q) -> (h w) (c p q)"."""
    num_samples, channels, height, width = latents_BCHW.shape
    rows, columns = height // patch, width // patch
    cut = latents_BCHW.reshape(num_samples, channels, rows, patch, columns, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(
        num_samples, rows * columns, channels * patch * patch
    )


def noisy_tokens_reference(
    latents_BCHW: Tensor, t_B: Tensor, seed: int, n_B: Tensor, patch: int
) -> tuple[Tensor, Tensor]:
    """Return (noisy_BNK, target_BNK) as defined by `noisy_tokens`."""
    x = latents_BCHW.to(torch.promote_types(latents_BCHW.dtype, torch.float32))
    z = philox_reference("normal", seed, NOISE, n_B, x.shape[1:].numel()).view_as(x).to(x.dtype)
    t = t_B.to(x.dtype)[:, None, None, None]
    noisy = (1 - t) * x + t * z
    target = z - x
    return tuple(patch_tokens_reference(y, patch).to(latents_BCHW.dtype) for y in (noisy, target))


@torch.library.custom_op("iomm::noisy_tokens", mutates_args=(), device_types=("cpu", "cuda"))
def noisy_tokens_compiled(
    latents_BCHW: Tensor, t_B: Tensor, seed: int, n_B: Tensor, patch: int
) -> tuple[Tensor, Tensor]:
    """Return (noisy_BNK, target_BNK) from the C++ or CUDA library, chosen by the device.

    The noise is never stored.
    """
    num_samples, channels, height, width = latents_BCHW.shape
    shape = num_samples, (height // patch) * (width // patch), channels * patch * patch
    noisy_BNK = torch.empty(shape, dtype=latents_BCHW.dtype, device=latents_BCHW.device)
    target_BNK = torch.empty_like(noisy_BNK)
    native.launch(
        latents_BCHW.device,
        "iomm_noisy_tokens",
        latents_BCHW,
        t_B.float(),
        seed,
        n_B,
        num_samples,
        channels,
        height,
        width,
        patch,
        int(latents_BCHW.dtype == torch.bfloat16),
        noisy_BNK,
        target_BNK,
    )
    return noisy_BNK, target_BNK


@noisy_tokens_compiled.register_fake
def _(
    latents_BCHW: Tensor, t_B: Tensor, seed: int, n_B: Tensor, patch: int
) -> tuple[Tensor, Tensor]:
    num_samples, channels, height, width = latents_BCHW.shape
    noisy_BNK = latents_BCHW.new_empty(
        num_samples, (height // patch) * (width // patch), channels * patch * patch
    )
    return noisy_BNK, torch.empty_like(noisy_BNK)


_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
register(
    "noisy_tokens",
    "cpp",
    noisy_tokens_compiled,
    devices=("cpu",),
    dtypes=_NATIVE_DTYPES,
    why_not=lambda: native.why_not("cpu"),
)
register(
    "noisy_tokens",
    "cuda",
    noisy_tokens_compiled,
    devices=("cuda",),
    dtypes=_NATIVE_DTYPES,
    why_not=lambda: native.why_not("cuda"),
)
register("noisy_tokens", "reference", noisy_tokens_reference)
