"""The interface that every generator implements, and how to create one.

A generator is called as (noisy_BNK, t_B, condition_BCD, grid, lengths_B=None, tap=0) and returns
velocity_BNK. grid is (rows, columns) of latent tokens, t runs from 1 (noise) to 0 (image), and the
velocity is noise - image. With tap, the number of a block counted from 1, the result is
(velocity_BNK, latents_BND after that block). An mmdit also takes a `Route`. A generator also has
`config`, `block_classes`, `init_weights(seed)` and `flops_per_image(grid, num_condition,
training=False, route=None)`.
"""

import torch
from torch import nn

from iomm.config import GeneratorConfig
from iomm.mmdit import MMDiT
from iomm.single_stream import SingleStream

GENERATORS = {"mmdit": MMDiT, "single_stream": SingleStream}


def empty_generator(
    config: GeneratorConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MMDiT | SingleStream:
    """Return a generator of this shape with uninitialized weights.

    Draws no random numbers. `device` may be meta.
    """
    with torch.device("meta"):
        generator = GENERATORS[config.kind](config)
    return generator.to(dtype).to_empty(device=device)


def blocks_of(generator: MMDiT | SingleStream) -> list[nn.Module]:
    """Return the blocks of a generator in the order of its forward pass."""
    return [m for m in generator.modules() if isinstance(m, generator.block_classes)]


def new_generator(
    config: GeneratorConfig,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MMDiT | SingleStream:
    """Return a generator of this shape with fresh weights.

    The weights are a pure function of config and seed.
    """
    generator = empty_generator(config, device=device, dtype=dtype)
    generator.init_weights(seed)
    return generator
