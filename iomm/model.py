"""Algorithm 1: hide most tokens of an image and compute the loss of generating all of it.

`IOMM.prepare` does everything that needs no trained weight (steps 1 to 5 and the gradient-free part
of step 7). `IOMM.forward` does the rest. iomm/README.md lists the steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iomm.alignment import AlignmentHead, alignment_loss, on_grid
from iomm.config import AdapterConfig, AlignConfig, MaskConfig, PromptConfig
from iomm.flow import sample_time, velocity_loss
from iomm.kernels.noisy_tokens import noisy_tokens
from iomm.kernels.philox import CAPTION_DROP, PROMPT, TIME, VAE, normal, uniform
from iomm.layers import use_fp8
from iomm.masking import visible_mask
from iomm.mllm import MLLM, Cache, Condition
from iomm.profiling import named


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a sample is conditioned and noised.

    With the seed, the recipe makes the loss a pure function of the sample.
    """

    seed: int = 0
    prompt: PromptConfig = field(default_factory=PromptConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    # Keyword arguments of flow.sample_time.
    time: dict = field(default_factory=dict)
    # Sample latents from the VAE's posterior instead of taking its mean.
    sample_latents: bool = False
    # Share of captions replaced by the empty prompt, for classifier-free guidance.
    caption_drop: float = 0.1
    # Number of times and noises drawn for each sample.
    noise_draws: int = 1
    align: AlignConfig = field(default_factory=AlignConfig)
    # Share of the samples of a global batch that are aligned. The alignment loss is their mean,
    # however the batch is cut into micro-batches.
    align_share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PreparedBatch:
    """The part of Algorithm 1's state that depends on no trained weight.

    R = B x noise draws. The draws of a sample are consecutive rows.

    Attributes:
        noisy_RNK: noisy latent tokens x_t.
        target_RNK: velocity targets, noise - image.
        t_R: times in [0, 1].
        grid: (rows, columns) of latent tokens.
        condition: packed condition tokens of the B samples.
        prefix: keys and values of every MLLM layer, and the MLLM's outputs or None.
        align_IND: alignment targets on the latent grid; None without an alignment head.
        aligned_I: batch rows of the aligned samples; None if all are aligned.
    """

    noisy_RNK: Tensor
    target_RNK: Tensor
    t_R: Tensor
    grid: tuple[int, int]
    condition: Condition
    prefix: tuple[Cache, Tensor | None]
    align_IND: Tensor | None = None
    aligned_I: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch, to hand them from one CUDA stream to another."""
        cache, outputs_TD = self.prefix
        values = (
            self.noisy_RNK,
            self.target_RNK,
            self.t_R,
            *vars(self.condition).values(),
            *chain(*cache),
            outputs_TD,
            self.align_IND,
            self.aligned_I,
        )
        return [value for value in values if isinstance(value, Tensor)]


class IOMM(nn.Module):
    """The generator and adapter (trained) with the MLLM and VAE (frozen).

    The frozen modules are held in a tuple. Code that walks the module tree to partition, cast or
    save weights therefore does not find them.
    """

    def __init__(
        self,
        generator: nn.Module,
        adapter: nn.Module | None,
        mllm: MLLM,
        vae: nn.Module,
        recipe: Recipe,
        connector: nn.Module | None = None,
        alignment: AlignmentHead | None = None,
    ):
        """Assemble the model. `adapter` is None for adapter.kind "none"."""
        super().__init__()
        self.generator = generator
        self.adapter = adapter
        self.connector = connector
        self.alignment = alignment
        self.frozen = (mllm, vae)
        self.recipe = recipe

    @torch.no_grad()
    def prepare(
        self,
        pixels_BCHW: Tensor | None,
        vit_pixels_I: Tensor | None,
        n_B: Tensor,
        latents_BCHW: Tensor | None = None,
        captions: list[str] | None = None,
        has_image: list[bool] | None = None,
        image_tokens_IPD: Tensor | None = None,
    ) -> PreparedBatch:
        """Run the part of Algorithm 1 that needs no trained weight.

        It may run while the generator still trains on the previous batch. Nothing is drawn from a
        global random generator: mask, time, noise and dropped captions depend only on (seed, n).

        Args:
            pixels_BCHW: VAE pixels in [-1, 1]. May be None with cached latents.
            vit_pixels_I: ViT pixels as `MLLM.vit_states` takes them, in order, of the samples
                conditioned on their image (of all samples if pairs are aligned too). May be None
                with cached image tokens.
            n_B: sample numbers.
            latents_BCHW: cached latents.
            captions: B texts, needed if some samples are pairs. A pair is conditioned on its
                caption.
            has_image: B bools, False for a pair. None if there are no pairs.
            image_tokens_IPD: cached image tokens.
        """
        mllm, vae = self.frozen
        seed, n_B = self.recipe.seed, n_B.to(mllm.device)

        # Steps 1 and 2: latents, time, noise, velocity target.
        if latents_BCHW is None:
            with named("vae"):
                latents_BCHW = self.encode(pixels_BCHW, n_B)
        n_R, latents_RCHW = self.draw_numbers(n_B), self.repeat_draws(latents_BCHW)
        t_R = sample_time(uniform(seed, TIME, n_R, 1)[:, 0], **self.recipe.time)
        noisy_RNK, target_RNK = noisy_tokens(latents_RCHW, t_R, seed, n_R, vae.patch)

        # Steps 3 to 5: image tokens, mask, packed condition.
        latent_grid = grid(latents_BCHW, vae.patch)
        tokens_IPD, align_IND, aligned_I = image_tokens_IPD, None, None
        if self.alignment is not None:
            tokens_IPD, align_IND, aligned_I = self.image_tokens_and_target(
                vit_pixels_I, tokens_IPD, has_image, latent_grid
            )
        condition = self.condition(vit_pixels_I, n_B, captions, has_image, tokens_IPD)
        return PreparedBatch(
            noisy_RNK=noisy_RNK,
            target_RNK=target_RNK,
            t_R=t_R,
            grid=latent_grid,
            condition=condition,
            # The part of step 7 that sees no query.
            prefix=self.prefix(condition),
            align_IND=align_IND,
            aligned_I=aligned_I,
        )

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Return (mean loss, loss_R, t_R), where R = B x noise draws.

        With an alignment head, weight x the alignment loss is added to the mean loss, and the
        alignment loss (I,) is a fourth result, averaged over the draws of each sample.

        Args:
            inputs: the arguments of `prepare`, or the PreparedBatch that it returned.
        """
        # Steps 1 to 5.
        batch = inputs[0] if isinstance(inputs[0], PreparedBatch) else self.prepare(*inputs)
        # Steps 6 and 7.
        hidden_BCD, lengths_B = self.encode_condition(batch.condition, batch.prefix)
        hidden_RCD, lengths_R = self.repeat_draws(hidden_BCD), self.repeat_draws(lengths_B)
        # Step 8.
        generator_inputs = batch.noisy_RNK, batch.t_R, hidden_RCD, lengths_R, batch.grid
        if self.alignment is None:
            loss, loss_R = velocity_loss(self.velocity(*generator_inputs), batch.target_RNK)
            return loss, loss_R.detach(), batch.t_R
        align = self.recipe.align
        velocity_RNK, latents_RND = self.velocity(
            *generator_inputs, tap=align.block_in(self.generator.config.depth)
        )
        loss, loss_R = velocity_loss(velocity_RNK, batch.target_RNK)
        align_I = self.align(latents_RND, batch)
        num_aligned = self.recipe.align_share * batch.condition.batch
        loss = loss + align.weight / num_aligned * align_I.sum()
        return loss, loss_R.detach(), batch.t_R, align_I.detach()

    def draw_numbers(self, n_B: Tensor) -> Tensor:
        """Return the numbers (R,) that key each draw's time and noise: n x draws + k."""
        draws = self.recipe.noise_draws
        if draws == 1:
            return n_B
        return (n_B[:, None] * draws + torch.arange(draws, device=n_B.device)).flatten()

    def repeat_draws(self, x_B: Tensor | None) -> Tensor | None:
        """Repeat each row of a tensor (B, ...) once per noise draw: (R, ...). Pass None through."""
        if x_B is None or self.recipe.noise_draws == 1:
            return x_B
        return x_B.repeat_interleave(self.recipe.noise_draws, 0)

    def align(self, latents_RND: Tensor, batch: PreparedBatch) -> Tensor:
        """Return the alignment loss (I,) after the aligned block, averaged over noise draws.

        Without aligned samples an empty batch passes through the head, because under ZeRO-3 all
        ranks must call the same modules.
        """
        with named("align"):
            if batch.aligned_I is not None:
                latents_RND = latents_RND.index_select(0, self.draw_numbers(batch.aligned_I))
            loss_R = alignment_loss(self.alignment(latents_RND), self.repeat_draws(batch.align_IND))
            return loss_R.unflatten(0, (-1, self.recipe.noise_draws)).mean(1)

    def image_tokens_and_target(
        self,
        vit_pixels_I: Tensor | None,
        tokens_IPD: Tensor | None,
        has_image: list[bool] | None,
        latent_grid: tuple[int, int],
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Run the ViT once on the whole images, for the condition and for the alignment.

        Returns:
            The image tokens of the samples conditioned on their image (None if there are none), and
            `align_IND` and `aligned_I` of PreparedBatch.
        """
        mllm, align = self.frozen[0], self.recipe.align
        device, rows_I = mllm.device, None
        if has_image is not None and not all(has_image):
            rows = [row for row, image in enumerate(has_image) if image]
            rows_I = torch.tensor(rows, dtype=torch.int64, device=device)
        aligned_I = None if align.pairs else rows_I
        # Cached image tokens. The config allows them only with align.target=projector.
        if tokens_IPD is not None and len(tokens_IPD):
            return tokens_IPD, on_grid(tokens_IPD, latent_grid), aligned_I
        # A batch of unaligned pairs needs no ViT.
        if tokens_IPD is not None or not len(vit_pixels_I):
            shape = 0, math.prod(latent_grid), self.alignment.target_width
            return None, torch.empty(shape, dtype=mllm.dtype, device=device), aligned_I
        with named("vit"):
            states = mllm.vit_states(vit_pixels_I)
            target = states if align.target == "vit" else mllm.project(states)
            tokens_IPD = target[rows_I] if align.pairs and rows_I is not None else target
            if align.target == "vit":
                tokens_IPD = mllm.project(tokens_IPD) if len(tokens_IPD) else None
            return tokens_IPD, on_grid(target, latent_grid), aligned_I

    def condition(
        self,
        vit_pixels_I: Tensor | None,
        n_B: Tensor,
        captions: list[str] | None = None,
        has_image: list[bool] | None = None,
        tokens_IPD: Tensor | None = None,
    ) -> Condition:
        """Pack the condition of all samples: steps 3 to 5.

        An image's condition is the reconstruction prompt and its visible image tokens. A pair's
        condition is its caption, replaced by the empty prompt with probability caption_drop. With
        `tokens_IPD`, the image tokens, the ViT does not run.
        """
        mllm, _ = self.frozen
        mask, prompt, image_n = self.recipe.mask, self.recipe.prompt, n_B
        texts = self.reconstruct_prompts(n_B)
        if has_image is not None and not all(has_image):
            dropped = (
                uniform(self.recipe.seed, CAPTION_DROP, n_B, 1)[:, 0] < self.recipe.caption_drop
            ).tolist()
            texts = [
                text if image else prompt.empty if drop else prompt.text_of(caption)
                for text, image, drop, caption in zip(
                    texts, has_image, dropped, captions, strict=True
                )
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

    def reconstruct_prompts(self, n_B: Tensor) -> list[str]:
        """Return the prompt of each image. With several to draw from, it depends on (seed, n)."""
        prompts = self.recipe.prompt.reconstruct
        if len(prompts) == 1:
            return [prompts[0]] * len(n_B)
        index_B = uniform(self.recipe.seed, PROMPT, n_B, 1)[:, 0].mul(len(prompts)).long()
        # Rounding of the product may reach len(prompts).
        return [prompts[min(i, len(prompts) - 1)] for i in index_B.tolist()]

    def encode(self, pixels_BCHW: Tensor, n_B: Tensor) -> Tensor:
        """Return latents (B, channels, H / factor, W / factor) of pixels.

        A sample of the posterior uses noise that depends only on (seed, n).
        """
        _, vae = self.frozen
        if not self.recipe.sample_latents:
            return vae.encode(pixels_BCHW)
        shape = (vae.channels, *(side // vae.factor for side in pixels_BCHW.shape[-2:]))
        noise_BCHW = normal(self.recipe.seed, VAE, n_B, math.prod(shape)).unflatten(1, shape)
        return vae.encode(pixels_BCHW, noise_BCHW)

    def prefix(self, condition: Condition) -> tuple[Cache, Tensor | None]:
        """Run the part of step 7 that depends on no query.

        Returns keys and values of every MLLM layer (none if there is no adapter), and the MLLM's
        outputs if adapter.conditions is "all" (else None).
        """
        mllm, _ = self.frozen
        with named("prefix"):
            return mllm.prefix(
                condition,
                outputs=self.recipe.adapter.conditions == "all",
                cached=self.adapter is not None,
            )

    def encode_condition(
        self, condition: Condition, prefix: tuple[Cache, Tensor | None] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the generator's condition (B, C, D) and its lengths (B,) or None: steps 6 and 7.

        With adapter.conditions "query" these are the MLLM's outputs at the queries, so C = Q. With
        "all" they are all outputs of each sample but the skipped ones, zero-padded to the longest
        sample. The lengths are None if all samples have the same length. `prefix` defaults to
        `self.prefix(condition)`.
        """
        mllm, _ = self.frozen
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
        if self.recipe.adapter.conditions == "all":
            hidden_BCD, lengths_B = pad_outputs(
                outputs_TD, condition.offsets, hidden_BCD, condition.skipped
            )
        if self.connector is not None:
            with named("connector"):
                hidden_BCD = self.connector(hidden_BCD.to(self.dtype), lengths_B)
        return hidden_BCD, lengths_B

    @property
    def leaves(self) -> tuple[type[nn.Module], ...]:
        """Classes of the blocks that ZeRO-3 gathers whole, if the model has any of that class."""
        classes = self.generator.block_classes
        if self.connector is not None:
            classes = (*classes, *self.connector.block_classes)
        return tuple(c for c in classes if any(isinstance(module, c) for module in self.modules()))

    def prepare_blocks(
        self, *, compiled: bool = False, recompute: int = 0, fp8: bool = False
    ) -> None:
        """Set how blocks execute. Call once, before the weights are partitioned.

        Args:
            compiled: compile every block into one graph with torch.compile, and also the ViT, the
                VAE encoder and the decoder layers.
            recompute: number of blocks, from the first, that keep no activations and run their
                forward pass twice.
            fp8: compute the matrix products of the generator's blocks in fp8.
        """
        if fp8:
            use_fp8(self.generator)
        # The graphs of a function count together over all its callers. Beyond the limit (8 by
        # default), fullgraph compilation fails.
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
    def dtype(self) -> torch.dtype:
        """Dtype in which the trained parts compute."""
        return self.generator.final.weight.dtype

    def velocity(
        self,
        noisy_BNK: Tensor,
        t_B: Tensor,
        condition_BCD: Tensor,
        lengths_B: Tensor | None,
        grid: tuple[int, int],
        tap: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the generator's velocity in its weights' dtype.

        With `tap`, return the latents after that block as well.
        """
        with named("generator"):
            return self.generator(
                noisy_BNK.to(self.dtype), t_B, condition_BCD.to(self.dtype), grid, lengths_B, tap
            )


def pad_outputs(
    outputs_TD: Tensor, offsets: Tensor, hidden_BQD: Tensor | None, skipped: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Unpack each sample's outputs, append its queries' outputs, zero-pad: (B, C, D).

    The first skipped[b] outputs of sample b are left out. Returns the lengths (B,) as well, or None
    if all samples have the same length.
    """
    rows = [
        outputs_TD[start + skip : stop]
        for (start, stop), skip in zip(pairwise(offsets.tolist()), skipped, strict=True)
    ]
    if hidden_BQD is not None:
        rows = [torch.cat((row, hidden)) for row, hidden in zip(rows, hidden_BQD, strict=True)]
    lengths = [len(row) for row in rows]
    padded_BCD = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if len(set(lengths)) == 1:
        return padded_BCD, None
    return padded_BCD, torch.tensor(lengths, device=outputs_TD.device)


def grid(latents_BCHW: Tensor, patch: int) -> tuple[int, int]:
    """Return the (rows, columns) of latent tokens."""
    return latents_BCHW.shape[-2] // patch, latents_BCHW.shape[-1] // patch
