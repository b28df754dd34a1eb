"""Alignment of the generator with the frozen ViT, beyond the paper.

This is REPA (arXiv 2410.06940). A small head projects the latents of one block and pulls them
towards the ViT's tokens of the clean image, which are computed anyway for a sample conditioned on
its image. The head exists only in training; sampling and exports do not use it.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from iomm.config import AlignConfig
from iomm.flops import linear_flops
from iomm.layers import at_least_float32, init_weights
from iomm.mllm import MLLM

# Prefix of the head's parameters in the state dict of an IOMM.
PREFIX = "alignment."


class AlignmentHead(nn.Module):
    """Project latents (I, N, D) to the target's width: linear, SiLU, linear, SiLU, linear.

    This is REPA's head with hidden layers of the generator's width. For IOMM-B it has 6.3 M
    parameters and takes 0.5 % of the FLOPs of a sample.
    """

    def __init__(self, config: AlignConfig, width: int, mllm: MLLM):
        """Build the head for a generator of this width and the MLLM that provides the target."""
        super().__init__()
        self.target_width = mllm.vit_width if config.target == "vit" else mllm.width
        self.linear_in = nn.Linear(width, width)
        self.linear_hidden = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, self.target_width)

    def init_weights(self, seed: int) -> None:
        """Draw Xavier-uniform matrices on the CPU, as a function of the seed; zero the biases."""
        init_weights(self, seed)

    def forward(self, latents_IND: Tensor) -> Tensor:
        """Return the projected latents (I, N, width of the target).

        I may be 0, in which case the weights get zero gradients.
        """
        hidden = F.silu(self.linear_hidden(F.silu(self.linear_in(latents_IND))))
        return self.linear_out(hidden)

    def flops(self, num_tokens: int) -> float:
        """Return the forward FLOPs of one image: 2 m n k of every matrix product."""
        return linear_flops(self, num_tokens)


def on_grid(tokens_IPD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample a square of P tokens to `grid` (rows, columns): (I, P, D) -> (I, N, D).

    In training the ViT sees exactly the crop that the VAE sees, stretched to a square, in every
    bucket (engine/data/decode.py). So equal fractions of the sides of both grids are the same place
    in the image, and each axis is resampled independently. Where the tokens are finer than the
    latents, this is adaptive average pooling; where they are coarser, bilinear interpolation
    (corners not aligned).
    """
    side = math.isqrt(tokens_IPD.shape[1])
    if tuple(grid) == (side, side):
        return tokens_IPD
    maps = tokens_IPD.transpose(1, 2).unflatten(2, (side, side))
    maps = F.adaptive_avg_pool2d(maps, [min(side, length) for length in grid])
    maps = F.interpolate(maps, size=list(grid), mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


def alignment_loss(projected_IND: Tensor, target_IND: Tensor) -> Tensor:
    """Return 1 - cosine similarity (I,), averaged over a sample's tokens, at least float32."""
    projected, target = at_least_float32(projected_IND), at_least_float32(target_IND)
    return (1 - F.cosine_similarity(projected, target, dim=-1)).mean(1)
