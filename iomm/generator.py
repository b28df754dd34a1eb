"""One contract for every generator: (noisy_BNK, t_B, condition_BCD, grid, lengths_B=None, tap=0) -> velocity_BNK.

grid is (rows, columns) of latent tokens, t runs from 1 (noise) to 0 (image), the velocity is noise - image. With tap,
the number from 1 of a block, the result is (velocity_BNK, latents_BND after that block). A generator also has `config`,
`block_classes`, `init_weights(seed)` and `flops_per_image(grid, num_condition)`.
"""

import torch

from iomm.mmdit import MMDiT
from iomm.single_stream import SingleStream

GENERATORS = {"mmdit": MMDiT, "single_stream": SingleStream}


def empty_generator(config, *, device="cpu", dtype=torch.float32):
    """The generator of this shape with unset weights, on any device, meta included. Draws no random number."""
    with torch.device("meta"):
        generator = GENERATORS[config.kind](config)
    return generator.to(dtype).to_empty(device=device)


def new_generator(config, seed, *, device="cpu", dtype=torch.float32):
    """The generator of this shape with fresh weights: a pure function of config and seed."""
    generator = empty_generator(config, device=device, dtype=dtype)
    generator.init_weights(seed)
    return generator
