"""From a condition to a picture: the trained parts, the MLLM and the sampler together."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from iomm.kernels.noisy_tokens import unpatch
from iomm.sampler import image_noise, sample


@torch.no_grad()
def draw(model, condition, image_B, *, size_px, steps=20, guidance=1.0, seed=0, shift=1.0):
    """Condition (packed, B samples) -> pixels (B, 3, size_px, size_px) in [-1, 1], float32.

    image_B: int64 numbers of the images; image i of a seed has the same noise in whatever batch it is drawn. guidance
    above 1 needs a model that has seen empty prompts (stage 2)."""
    mllm, vae = model.frozen
    rows, columns = grid = vae.grid(size_px, size_px)
    read_BCD, lengths_B = model.read(condition)
    empty_BCD = None
    if guidance != 1.0:
        empty_BCD, _ = model.read(mllm.condition([""] * condition.batch))
        if lengths_B is not None or empty_BCD.shape != read_BCD.shape:   # conditions "all": as long as the prompt
            own_B = torch.full((len(read_BCD),), read_BCD.shape[1], device=read_BCD.device) if lengths_B is None else lengths_B
            lengths_B = torch.cat((own_B, torch.full_like(own_B, empty_BCD.shape[1])))
            longest = max(read_BCD.shape[1], empty_BCD.shape[1])
            read_BCD, empty_BCD = (F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in (read_BCD, empty_BCD))
    noise_BNK = image_noise(seed, image_B, rows * columns, vae.token_dim)

    def velocity(x_BNK, t_B, condition_BCD):
        return model.velocity(x_BNK, t_B, condition_BCD, lengths_B, grid)
    tokens_BNK = sample(velocity, noise_BNK, read_BCD, empty_BCD, steps=steps, guidance=guidance, shift=shift)
    return vae.decode(unpatch(tokens_BNK, rows * vae.patch, columns * vae.patch, vae.patch)).float()


def to_images(pixels_BCHW):
    """Pixels (B, 3, H, W) in [-1, 1] -> list of PIL images."""
    array = ((pixels_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(a)) for a in array]


def image_grid(images, columns, pad_px=2):
    """Images of one size -> one image, row by row, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + pad_px) - pad_px, rows * (height + pad_px) - pad_px), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + pad_px), (i // columns) * (height + pad_px)))
    return sheet
