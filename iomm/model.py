"""Algorithm 1: an image and most of its tokens hidden -> the loss of drawing the whole."""

import math
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from iomm.alignment import alignment_loss, on_grid
from iomm.config import AdapterConfig, AlignConfig, MaskConfig
from iomm.flow import sample_time, velocity_loss
from iomm.kernels.noisy_tokens import noisy_tokens
from iomm.kernels.philox import CAPTION_DROP, TIME, VAE, normal, uniform
from iomm.layers import use_fp8
from iomm.masking import visible_mask
from iomm.mllm import RECONSTRUCT, Condition
from iomm.profiling import named


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a sample is conditioned and noised; with the seed it makes the loss a pure function of the sample."""

    seed: int = 0
    mask: MaskConfig = field(default_factory=MaskConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    # Keyword arguments of flow.sample_time.
    time: dict = field(default_factory=dict)
    # From the VAE's posterior, not its mean.
    sample_latents: bool = False
    # Share of captions replaced by the empty prompt, for guidance.
    caption_drop: float = 0.1
    # Times and noises for each sample.
    noise_draws: int = 1
    align: AlignConfig = field(default_factory=AlignConfig)
    # Share of a global batch's samples that are aligned: its loss is their mean, whatever the micro-batches.
    align_share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What Algorithm 1 makes of a batch without a trained weight. R = B x noise draws: a sample's draws are consecutive
    rows. grid: (rows, columns) of latent tokens; prefix: keys and values of every layer of the MLLM, and its outputs or
    None. align_IND: target of the alignment, or None without a head; aligned_I: the rows of the batch that it is of, or
    None for all.
    """

    noisy_RNK: torch.Tensor
    target_RNK: torch.Tensor
    t_R: torch.Tensor
    grid: tuple
    condition: Condition
    prefix: tuple
    align_IND: torch.Tensor | None = None
    aligned_I: torch.Tensor | None = None

    def tensors(self):
        """All of them, for whoever hands them from one CUDA stream to another."""
        cache, outputs_TD = self.prefix
        held = (
            self.noisy_RNK,
            self.target_RNK,
            self.t_R,
            *vars(self.condition).values(),
            *chain(*cache),
            outputs_TD,
            self.align_IND,
            self.aligned_I,
        )
        return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]


class IOMM(nn.Module):
    """Generator and adapter (trained), MLLM and VAE (frozen, held in a tuple so that nothing that walks the modules
    partitions, casts or saves them).
    """

    def __init__(self, generator, adapter, mllm, vae, recipe, connector=None, alignment=None):
        """adapter: None for adapter.kind "none"; connector, alignment (AlignmentHead): None without one."""
        super().__init__()
        self.generator, self.adapter, self.connector, self.alignment = (
            generator,
            adapter,
            connector,
            alignment,
        )
        self.frozen = (mllm, vae)
        self.recipe = recipe

    @torch.no_grad()
    def prepare(
        self,
        pixels_BCHW,
        vit_pixels_I,
        n_B,
        latents_BCHW=None,
        captions=None,
        has_image=None,
        image_tokens_IPD=None,
    ):
        """VAE pixels in [-1, 1], ViT pixels as MLLM.vit_states takes them, sample numbers -> Prepared, on which `forward` goes
        on. No trained weight takes part, so it may run while the generator still works on the batch before.

        captions and has_image (B texts, B bools), where some samples are pairs: those are conditioned on their caption and
        vit_pixels_I are of the others, in order (of all samples where pairs are aligned too). With cached latents_BCHW the
        VAE pixels may be None, with cached image_tokens_IPD the ViT pixels. Draws nothing from a global generator: mask, time,
        noise and dropped captions belong to (seed, n).
        """
        mllm, vae = self.frozen
        seed, n_B = self.recipe.seed, n_B.to(mllm.device)
        if latents_BCHW is None:
            with named("vae"):
                # step 2
                latents_BCHW = self.encode(pixels_BCHW, n_B)
        n_R, latents_RCHW = self.drawn_numbers(n_B), self.for_each_draw(latents_BCHW)
        t_R = sample_time(uniform(seed, TIME, n_R, 1)[:, 0], **self.recipe.time)
        noisy_RNK, target_RNK = noisy_tokens(latents_RCHW, t_R, seed, n_R, vae.patch)
        shape, tokens_IPD, aligned = grid(latents_BCHW, vae.patch), image_tokens_IPD, {}
        if self.alignment is not None:
            # step 3
            tokens_IPD, aligned = self.look(vit_pixels_I, tokens_IPD, has_image, shape)
        # steps 3, 4, 5
        condition = self.condition(vit_pixels_I, n_B, captions, has_image, tokens_IPD)
        return Prepared(
            noisy_RNK=noisy_RNK,
            target_RNK=target_RNK,
            t_R=t_R,
            grid=shape,
            condition=condition,
            # Of step 7, what sees no query.
            prefix=self.prefix(condition),
            **aligned,
        )

    def forward(self, *sample):
        """The arguments of `prepare`, or what it made of them -> (mean loss, loss_R, t_R); R = B x noise draws.

        With an alignment head the mean has weight x its loss added, and a fourth result is the alignment loss (I,), the
        mean over a sample's draws.
        """
        # steps 2, 3, 4, 5
        given = sample[0] if isinstance(sample[0], Prepared) else self.prepare(*sample)
        # steps 6, 7
        hidden_BCD, lengths_B = self.encode_condition(given.condition, given.prefix)
        hidden_RCD, lengths_R = self.for_each_draw(hidden_BCD), self.for_each_draw(lengths_B)
        inputs = given.noisy_RNK, given.t_R, hidden_RCD, lengths_R, given.grid
        if self.alignment is None:
            # step 8
            loss, loss_R = velocity_loss(self.velocity(*inputs), given.target_RNK)
            return loss, loss_R.detach(), given.t_R
        align = self.recipe.align
        velocity_RNK, latents_RND = self.velocity(
            *inputs, tap=align.block_in(self.generator.config.depth)
        )
        loss, loss_R = velocity_loss(velocity_RNK, given.target_RNK)
        align_I = self.align(latents_RND, given)
        loss = (
            loss + align.weight / (self.recipe.align_share * given.condition.batch) * align_I.sum()
        )
        return loss, loss_R.detach(), given.t_R, align_I.detach()

    def drawn_numbers(self, n_B):
        """Return the numbers (R,) by which the draws of the samples n_B get their times and noises: n x draws + k."""
        draws = self.recipe.noise_draws
        return (
            n_B
            if draws == 1
            else (n_B[:, None] * draws + torch.arange(draws, device=n_B.device)).flatten()
        )

    def for_each_draw(self, x_B):
        """Return a tensor (B, ...), or None, with its rows repeated for each draw: (R, ...)."""
        return (
            x_B
            if x_B is None or self.recipe.noise_draws == 1
            else x_B.repeat_interleave(self.recipe.noise_draws, 0)
        )

    def align(self, latents_RND, given):
        """Return the alignment loss (I,) of the latents after the aligned block, the mean over a sample's draws.

        Without such samples an empty batch passes through the head: under ZeRO-3 all ranks call the same modules.
        """
        with named("align"):
            if given.aligned_I is not None:
                latents_RND = latents_RND.index_select(0, self.drawn_numbers(given.aligned_I))
            loss_R = alignment_loss(
                self.alignment(latents_RND), self.for_each_draw(given.align_IND)
            )
            return loss_R.unflatten(0, (-1, self.recipe.noise_draws)).mean(1)

    def look(self, vit_pixels_I, tokens_IPD, has_image, latent_grid):
        """Run the ViT on the whole images, once for both uses.

        Returns the image tokens of the samples that are conditioned on their image (None without any) and what Prepared
        holds for the alignment: its target on the latent grid and the rows of the batch that it belongs to.
        """
        mllm, align = self.frozen[0], self.recipe.align
        device, rows_I = self.frozen[0].device, None
        if has_image is not None and not all(has_image):
            rows = [row for row, image in enumerate(has_image) if image]
            rows_I = torch.tensor(rows, dtype=torch.int64, device=device)
        aligned_I = None if align.pairs else rows_I
        # Read from memory, and config allows this target alone.
        if tokens_IPD is not None and len(tokens_IPD):
            return tokens_IPD, {
                "align_IND": on_grid(tokens_IPD, latent_grid),
                "aligned_I": aligned_I,
            }
        # Pairs alone, for which no ViT need run.
        if tokens_IPD is not None or not len(vit_pixels_I):
            shape = 0, math.prod(latent_grid), self.alignment.target_width
            empty_IND = torch.empty(shape, dtype=mllm.dtype, device=device)
            return None, {"align_IND": empty_IND, "aligned_I": aligned_I}
        with named("vit"):
            states = mllm.vit_states(vit_pixels_I)
            target = states if align.target == "vit" else mllm.project(states)
            tokens_IPD = target[rows_I] if align.pairs and rows_I is not None else target
            if align.target == "vit":
                tokens_IPD = mllm.project(tokens_IPD) if len(tokens_IPD) else None
            return tokens_IPD, {"align_IND": on_grid(target, latent_grid), "aligned_I": aligned_I}

    def condition(self, vit_pixels_I, n_B, captions=None, has_image=None, tokens_IPD=None):
        """One packed condition for both kinds of samples: [fixed prompt, visible image tokens] or [caption]; a caption is
        dropped with probability caption_drop. tokens_IPD: the image tokens, where the ViT has run already.
        """
        mllm, _ = self.frozen
        mask, texts, image_n = self.recipe.mask, [RECONSTRUCT] * len(n_B), n_B
        if has_image is not None and not all(has_image):
            dropped = (
                uniform(self.recipe.seed, CAPTION_DROP, n_B, 1)[:, 0] < self.recipe.caption_drop
            ).tolist()
            texts = [
                RECONSTRUCT if image else "" if drop else caption
                for image, drop, caption in zip(has_image, dropped, captions, strict=True)
            ]
            image_n = n_B[torch.tensor(has_image, device=n_B.device)]
        else:
            has_image = [True] * len(n_B)
        visible = None
        if not len(image_n):
            tokens_IPD = None
        else:
            if tokens_IPD is None:
                with named("vit"):
                    tokens_IPD = mllm.image_tokens(vit_pixels_I)
            visible = visible_mask(mask, self.recipe.seed, image_n, mllm.num_image_tokens)
        return mllm.condition(
            texts,
            tokens_IPD,
            has_image=has_image,
            visible=visible,
            mode=mask.mode,
            positions=mask.positions,
        )

    def encode(self, pixels_BCHW, n_B):
        """Pixels -> latents (B, channels, H / factor, W / factor); a posterior's noise belongs to (seed, n) too."""
        _, vae = self.frozen
        if not self.recipe.sample_latents:
            return vae.encode(pixels_BCHW)
        shape = (vae.channels, *(side // vae.factor for side in pixels_BCHW.shape[-2:]))
        noise_BCHW = normal(self.recipe.seed, VAE, n_B, math.prod(shape)).unflatten(1, shape)
        return vae.encode(pixels_BCHW, noise_BCHW)

    def prefix(self, condition):
        """Keys and values of every layer, and outputs if they are wanted: the part of step 7 that depends on no query."""
        mllm, _ = self.frozen
        with named("prefix"):
            return mllm.prefix(condition, outputs=self.recipe.adapter.conditions == "all")

    def encode_condition(self, condition, prefix=None):
        """Condition (and its `prefix`, if that is there) -> what conditions the generator, (B, C, D), and its lengths (B,) or
        None: steps 6 and 7.

        conditions "query": the outputs at the queries, C = Q. "all": every output, each sample's in a row, filled up with
        zeros to the longest; lengths is None where all are alike.
        """
        mllm, _ = self.frozen
        every = self.recipe.adapter.conditions == "all"
        queries_BQD = hidden_BCD = lengths_B = None
        if self.adapter is not None:
            with named("adapter"):
                queries_BQD = self.adapter(condition)
        cache, outputs_TD = self.prefix(condition) if prefix is None else prefix
        if queries_BQD is not None:
            with named("suffix"):
                hidden_BCD = mllm.queries(
                    queries_BQD.to(mllm.dtype),
                    condition,
                    cache,
                    causal=self.recipe.adapter.attention == "causal",
                )
        if every:
            hidden_BCD, lengths_B = joined(outputs_TD, condition.offsets, hidden_BCD)
        if self.connector is not None:
            with named("connector"):
                hidden_BCD = self.connector(hidden_BCD.to(self.dtype), lengths_B)
        return hidden_BCD, lengths_B

    @property
    def leaves(self):
        """Classes of the blocks that ZeRO-3 gathers whole; only those that the model has."""
        classes = (
            *self.generator.block_classes,
            *(() if self.connector is None else self.connector.block_classes),
        )
        return tuple(c for c in classes if any(isinstance(module, c) for module in self.modules()))

    def prepare_blocks(self, *, compiled=False, recompute=0, fp8=False):
        """Call once, before weights are partitioned. compiled: every block becomes one graph of torch.compile, and so do ViT,
        VAE encoder and the layers of the decoder. recompute: the first blocks keep no activations and run forward twice.
        fp8: the products of the generator's blocks take their sides in fp8.
        """
        if fp8:
            use_fp8(self.generator)
        # Graphs of a function are counted together, whoever calls it; beyond the limit (8)
        # fullgraph fails.
        if compiled:
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        blocks = [module for module in self.modules() if isinstance(module, self.leaves)]
        for i, block in enumerate(blocks):
            forward = torch.compile(block.forward, fullgraph=True) if compiled else block.forward
            block.forward = (
                partial(checkpoint, forward, use_reentrant=False) if i < recompute else forward
            )
        if compiled:
            for part in self.frozen:
                part.compile_parts()

    @property
    def dtype(self):
        """Of the trained parts' arithmetic."""
        return self.generator.final.weight.dtype

    def velocity(self, noisy_BNK, t_B, condition_BCD, lengths_B, grid, tap=0):
        """The generator's velocity, in whatever dtype its weights are; with `tap` the latents after that block too."""
        with named("generator"):
            return self.generator(
                noisy_BNK.to(self.dtype), t_B, condition_BCD.to(self.dtype), grid, lengths_B, tap
            )


def joined(outputs_TD, offsets, hidden_BQD):
    """Packed outputs and (B, Q, D) or None -> each sample's in a row (B, C, D), zeros after them, lengths (B,) or None."""
    bounds = offsets.tolist()
    rows = [outputs_TD[start:stop] for start, stop in zip(bounds, bounds[1:])]
    if hidden_BQD is not None:
        rows = [torch.cat((row, hidden)) for row, hidden in zip(rows, hidden_BQD)]
    lengths = [len(row) for row in rows]
    ragged = len(set(lengths)) > 1
    return (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        torch.tensor(lengths, device=outputs_TD.device) if ragged else None,
    )


def grid(latents_BCHW, patch):
    """(rows, columns) of latent tokens."""
    return latents_BCHW.shape[-2] // patch, latents_BCHW.shape[-1] // patch
