"""Pixels to latents and back, frozen: the FLUX autoencoder through diffusers (this file is its only door), or pixels as they are."""


from torch import nn

from iomm.config import InputError


def to_tokens(latents_BCHW, patch):
    """(B, C, H, W) -> (B, N, K): patches of patch x patch, rows first; inside a token channel, row, column, as FLUX packs them.

    Raises InputError unless patch divides H and W."""
    batch, channels, height, width = latents_BCHW.shape
    if height % patch or width % patch:
        raise InputError(f"a latent of {height} x {width} does not divide into patches of {patch} x {patch}: choose another image size")
    latents = latents_BCHW.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return latents.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def from_tokens(tokens_BNK, grid, patch):
    """(B, N, K) and grid (rows, columns) -> (B, C, H, W): the inverse of to_tokens."""
    (batch, _, token_dim), (rows, columns) = tokens_BNK.shape, grid
    latents = tokens_BNK.reshape(batch, rows, columns, token_dim // (patch * patch), patch, patch)
    return latents.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * patch, columns * patch)


class Latents:
    """What every VAE says of its latents: `channels`, `factor` (pixels per latent), `patch` (latents per token side)."""

    @property
    def token_dim(self):
        """K, numbers in one latent token."""
        return self.channels * self.patch**2

    def grid(self, height_px, width_px):
        """Image size -> (rows, columns) of latent tokens. Raises InputError unless factor x patch divides both."""
        side = self.factor * self.patch
        if height_px % side or width_px % side or min(height_px, width_px) < side:
            raise InputError(f"image size must be a positive multiple of {side} px, got {height_px} x {width_px}")
        return height_px // side, width_px // side


class PixelVAE(Latents, nn.Module):
    """The identity: latents are the pixels (B, 3, H, W) in [-1, 1]. For small worlds that need no autoencoder."""

    channels, factor = 3, 1

    def __init__(self, patch):
        super().__init__()
        self.patch = patch

    def encode(self, pixels_BCHW, noise_BCHW=None):
        return pixels_BCHW

    def decode(self, latents_BCHW):
        return latents_BCHW

    def flops_per_image(self, size_px, decode=False):
        return 0


def load_vae(name):
    """`pixel:<patch>` -> the VAE. Raises InputError for anything else."""
    kind, _, patch = name.partition(":")
    if kind == "pixel" and patch.isdigit() and int(patch) > 0:
        return PixelVAE(int(patch))
    raise InputError(f"model.vae must be pixel:<patch>, for example pixel:4; got {name!r}")
