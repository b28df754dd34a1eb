"""Algorithm 1: an image and most of its tokens hidden -> the loss of drawing the whole."""

from dataclasses import dataclass, field

import torch
from torch import nn

from iomm.config import AdapterConfig, InputError, MaskConfig
from iomm.flow import sample_time, velocity_loss
from iomm.kernels.noisy_tokens import noisy_tokens
from iomm.kernels.philox import TIME, uniform
from iomm.masking import visible_mask
from iomm.mllm import IMAGE, RECONSTRUCT, TURN


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a sample is conditioned and noised; with the seed it makes the loss a pure function of the sample."""

    seed: int = 0
    mask: MaskConfig = field(default_factory=MaskConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    time: dict = field(default_factory=dict)      # keyword arguments of flow.sample_time


class IOMM(nn.Module):
    """Generator and adapter (trained), MLLM and VAE (frozen, held in a tuple so that nothing that walks the modules
    partitions, casts or saves them)."""

    def __init__(self, generator, adapter, mllm, vae, recipe):
        super().__init__()
        if recipe.adapter.kind == "none" or recipe.adapter.conditions == "all":
            raise InputError("adapter.kind=none and adapter.conditions=all are not built yet: use rqa or metaquery, and query")
        self.generator, self.adapter = generator, adapter
        self.frozen = (mllm, vae)
        self.recipe = recipe

    def forward(self, pixels_BCHW, vit_pixels_BCHW, n_B):
        """VAE pixels in [-1, 1], normalised ViT pixels, sample numbers -> (mean loss, loss_B, t_B).

        Draws nothing from a global generator: mask, time and noise belong to (seed, n)."""
        mllm, vae = self.frozen
        seed, n_B = self.recipe.seed, n_B.to(pixels_BCHW.device)
        latents_BCHW = vae.encode(pixels_BCHW)                                            # step 2
        t_B = sample_time(uniform(seed, TIME, n_B, 1)[:, 0], **self.recipe.time)
        noisy_BNK, target_BNK = noisy_tokens(latents_BCHW, t_B, seed, n_B, vae.patch)
        tokens_BPD = mllm.image_tokens(vit_pixels_BCHW)                                   # step 3
        visible = visible_mask(self.recipe.mask, seed, n_B, mllm.num_image_tokens)        # step 4
        condition = mllm.condition([RECONSTRUCT] * len(n_B), tokens_BPD, visible=visible,  # step 5
                                   mode=self.recipe.mask.mode, positions=self.recipe.mask.positions)
        velocity_BNK = self.velocity(noisy_BNK, t_B, self.read(condition), grid(latents_BCHW, vae.patch))
        loss, loss_B = velocity_loss(velocity_BNK, target_BNK)                            # step 8
        return loss, loss_B.detach(), t_B

    def flops_per_image(self, size_px):
        """FLOPs that one image of a training step needs: frozen encoders forward, prefix forward, queries forward and
        backward to their inputs, adapter and generator forward and backward (3 x forward)."""
        mllm, vae = self.frozen
        text = len(mllm.token_ids("".join(TURN) + "".join(IMAGE) + RECONSTRUCT))
        shown = mllm.num_image_tokens * (1 if self.recipe.mask.mode == "zero" else 1 - self.recipe.mask.ratio)
        num_prefix, num_queries = text + shown, self.adapter.queries_QD.shape[0]
        trained = self.adapter.flops(num_prefix) + self.generator.flops_per_image(vae.grid(size_px, size_px), num_queries)
        return vae.flops_per_image(size_px) + mllm.vit_flops() + sum(mllm.decoder_flops(num_prefix, num_queries)) + 3 * trained

    def read(self, condition):
        """Condition -> what conditions the generator, (B, C, D): steps 6 and 7."""
        mllm, _ = self.frozen
        queries_BQD = self.adapter(condition)
        cache = mllm.prefix(condition)
        return mllm.queries(queries_BQD.to(mllm.dtype), condition, cache,
                            causal=self.recipe.adapter.attention == "causal")

    def velocity(self, noisy_BNK, t_B, condition_BCD, grid):
        """The generator's velocity, in whatever dtype its weights are."""
        dtype = self.adapter.queries_QD.dtype
        return self.generator(noisy_BNK.to(dtype), t_B, condition_BCD.to(dtype), grid)


def grid(latents_BCHW, patch):
    """(rows, columns) of latent tokens."""
    return latents_BCHW.shape[-2] // patch, latents_BCHW.shape[-1] // patch
