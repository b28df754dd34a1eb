"""Algorithm 1: hide most tokens of an image and compute the loss of generating all of it.

`IOMM.prepare` does everything that needs no trained weight (steps 1 to 5 and the gradient-free part
of step 7). `IOMM.forward` does the rest. iomm/README.md lists the steps.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iomm import lora
from iomm.alignment import AlignmentHead, alignment_loss, on_grid
from iomm.config import (
    AdapterConfig,
    AlignConfig,
    LoraConfig,
    MaskConfig,
    PromptConfig,
    RouteConfig,
)
from iomm.flow import sample_time, velocity_loss
from iomm.kernels.noisy_tokens import noisy_tokens
from iomm.kernels.philox import CAPTION_DROP, PROMPT, TIME, VAE, normal, uniform
from iomm.layers import use_fp8
from iomm.masking import kept_tokens, visible_mask
from iomm.mllm import MLLM, Cache, Condition
from iomm.mmdit import Route
from iomm.profiling import named
from iomm.turns import Turns


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
    route: RouteConfig = field(default_factory=RouteConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    # Share of the samples of a global batch that are aligned. The alignment loss is their mean,
    # however the batch is cut into micro-batches.
    align_share: float = 1.0
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True, kw_only=True)
class PreparedBatch:
    """The part of Algorithm 1's state that depends on no trained weight.

    R = B x noise draws. The draws of a sample are consecutive rows.

    Attributes:
        noisy_RNK: noisy latent tokens x_t.
        target_RNK: velocity targets, noise - image.
        t_R: times in [0, 1].
        n_R: number of each draw, `IOMM.draw_numbers`.
        grid: (rows, columns) of latent tokens.
        condition: packed condition tokens of the B samples.
        prefix: keys and values of every MLLM layer, and the MLLM's outputs or None.
        kept_RK: ascending indices of the latent tokens that run through all blocks; None without
            routing.
        align_IND: alignment targets on the latent grid; None without an alignment head.
        aligned_I: batch rows of the aligned samples; None if all are aligned.
    """

    noisy_RNK: Tensor
    target_RNK: Tensor
    t_R: Tensor
    n_R: Tensor
    grid: tuple[int, int]
    condition: Condition
    prefix: tuple[Cache, Tensor | None]
    kept_RK: Tensor | None = None
    align_IND: Tensor | None = None
    aligned_I: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch, to hand them from one CUDA stream to another."""
        cache, outputs_TD = self.prefix
        values = (
            self.noisy_RNK,
            self.target_RNK,
            self.t_R,
            self.n_R,
            *vars(self.condition).values(),
            *chain(*cache),
            outputs_TD,
            self.kept_RK,
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
        turns: Turns | None = None,
    ) -> PreparedBatch:
        """Run the part of Algorithm 1 that needs no trained weight.

        It may run while the generator still trains on the previous batch. Nothing is drawn from a
        global random generator: mask, time, noise and dropped captions depend only on (seed, n).
        The host waits for nothing that the device computes.

        Args:
            pixels_BCHW: VAE pixels in [-1, 1]. May be None with cached latents.
            vit_pixels_I: ViT pixels as `MLLM.vit_states` takes them, in order, of the samples
                conditioned on their image (of all samples if pairs are aligned too). May be None
                with cached image tokens.
            n_B: sample numbers, best on the CPU, where masks are drawn.
            latents_BCHW: cached latents.
            captions: B texts, needed if some samples are pairs. A pair is conditioned on its
                caption.
            has_image: B bools, False for a pair. None if there are no pairs.
            image_tokens_IPD: cached image tokens.
            turns: what `draw_turns` returned ahead of time for these samples. Drawn again if they
                are of another recipe.
        """
        mllm, vae = self.frozen
        if turns is None or turns.source != self.recipe:
            turns = self.turns(n_B, captions, has_image)
        turns = turns.to(mllm.device)
        seed, n_B = self.recipe.seed, turns.parts().n_B

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
                vit_pixels_I, tokens_IPD, turns, latent_grid
            )
        condition = self.embed(turns, vit_pixels_I, tokens_IPD)
        return PreparedBatch(
            noisy_RNK=noisy_RNK,
            target_RNK=target_RNK,
            t_R=t_R,
            n_R=n_R,
            grid=latent_grid,
            condition=condition,
            # The part of step 7 that sees no query.
            prefix=self.prefix(condition),
            kept_RK=kept_tokens(self.recipe.route, seed, n_R, math.prod(latent_grid)),
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
        options = {"n_R": batch.n_R, "route": self.route(batch)}
        if self.alignment is None:
            velocity_RNK = self.velocity(*generator_inputs, **options)
            loss, loss_R = velocity_loss(velocity_RNK, batch.target_RNK)
            return loss, loss_R.detach(), batch.t_R
        align = self.recipe.align
        velocity_RNK, latents_RND = self.velocity(
            *generator_inputs, tap=align.block_in(self.generator.config.depth), **options
        )
        loss, loss_R = velocity_loss(velocity_RNK, batch.target_RNK)
        align_I = self.align(latents_RND, batch)
        num_aligned = self.recipe.align_share * batch.condition.batch
        loss = loss + align.weight / num_aligned * align_I.sum()
        return loss, loss_R.detach(), batch.t_R, align_I.detach()

    def route(self, batch: PreparedBatch) -> Route | None:
        """Return which latent tokens run through all blocks, or None without routing."""
        if batch.kept_RK is None:
            return None
        first, last = self.recipe.route.blocks_in(self.generator.config)
        return Route(batch.kept_RK, batch.noisy_RNK.shape[1], first, last)

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
        turns: Turns,
        latent_grid: tuple[int, int],
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Run the ViT once on the whole images, for the condition and for the alignment.

        Returns:
            The image tokens of the samples conditioned on their image (None if there are none), and
            `align_IND` and `aligned_I` of PreparedBatch.
        """
        mllm, align = self.frozen[0], self.recipe.align
        device, rows_I = mllm.device, None
        if turns.num_images < len(turns.lengths):
            rows_I = turns.parts().sample_I
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
        """Return the condition of all samples: steps 3 to 5.

        With `tokens_IPD`, the image tokens, the ViT does not run.
        """
        turns = self.turns(n_B, captions, has_image).to(self.frozen[0].device)
        return self.embed(turns, vit_pixels_I, tokens_IPD)

    def turns(
        self,
        n_B: Tensor,
        captions: list[str] | None = None,
        has_image: list[bool] | None = None,
    ) -> Turns:
        """Draw what the condition of these samples consists of, see `draw_turns`."""
        return draw_turns(self.recipe, self.frozen[0], n_B, captions, has_image)

    def embed(
        self, turns: Turns, vit_pixels_I: Tensor | None, tokens_IPD: Tensor | None = None
    ) -> Condition:
        """Return the condition of packed turns: step 3, unless `tokens_IPD` are given, and 5."""
        mllm, _ = self.frozen
        if not turns.num_images:
            tokens_IPD = None
        elif tokens_IPD is None:
            with named("vit"):
                tokens_IPD = mllm.image_tokens(vit_pixels_I)
        return mllm.embed(turns, tokens_IPD)

    def reconstruct_prompts(self, n_B: Tensor) -> list[str]:
        """Return the prompt of each image, see `draw_prompts`."""
        return draw_prompts(self.recipe, n_B)

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
            hidden_BCD, lengths_B = pad_outputs(outputs_TD, condition, hidden_BCD)
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

    def add_lora(self, check: bool = True) -> None:
        """Freeze all weights and add the recipe's LoRA to the generator. Call once.

        `check` is as in lora.add_lora.
        """
        lora.freeze(self)
        patch = self.frozen[1].patch
        lora.add_lora(
            self.generator, self.recipe.lora, seed=self.recipe.seed, patch=patch, check=check
        )

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
        # Every access to `leaves` walks over all modules, of which Qwen-Image with LoRA has 4,000.
        leaves = self.leaves
        blocks = [module for module in self.modules() if isinstance(module, leaves)]
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
        n_R: Tensor | None = None,
        route: Route | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the generator's velocity in its weights' dtype.

        With `tap`, return the latents after that block as well. `n_R` numbers the rows in training;
        LoRA has no dropout without it. `route` is as in MMDiT.forward.
        """
        if self.recipe.lora.dropout:
            lora.number_rows(self.generator, n_R)
        options = {} if route is None else {"route": route}
        with named("generator"):
            return self.generator(
                noisy_BNK.to(self.dtype),
                t_B,
                condition_BCD.to(self.dtype),
                grid,
                lengths_B,
                tap,
                **options,
            )


def draw_turns(
    recipe: Recipe,
    mllm: MLLM,
    n_B: Tensor,
    captions: list[str] | None = None,
    has_image: list[bool] | None = None,
) -> Turns:
    """Draw mask and texts of samples on the host, and pack their turns (step 4).

    An image's condition is the reconstruction prompt and its visible image tokens. A pair's
    condition is its caption, replaced by the empty prompt with probability caption_drop.

    Args:
        recipe: seed, mask and prompts.
        mllm: its tokenizer is used, and no weight.
        n_B: sample numbers.
        captions: as in `IOMM.prepare`.
        has_image: as in `IOMM.prepare`.
    """
    mask, prompt, n_B = recipe.mask, recipe.prompt, n_B.cpu()
    texts, image_n = draw_prompts(recipe, n_B), n_B
    if has_image is None:
        has_image = [True] * len(n_B)
    if not all(has_image):
        dropped = uniform(recipe.seed, CAPTION_DROP, n_B, 1)[:, 0] < recipe.caption_drop
        texts = [
            text if image else prompt.empty if drop else prompt.text_of(caption)
            for text, image, drop, caption in zip(
                texts, has_image, dropped.tolist(), captions, strict=True
            )
        ]
        image_n = n_B[torch.tensor(has_image)]
    visible = None
    if len(image_n):
        visible = visible_mask(mask, recipe.seed, image_n, mllm.num_image_tokens)
    return mllm.turns(
        texts,
        has_image,
        visible,
        mode=mask.mode,
        positions=mask.positions,
        n_B=n_B,
        source=recipe,
    )


def draw_prompts(recipe: Recipe, n_B: Tensor) -> list[str]:
    """Return the prompt of each image. With several to draw from, it depends on (seed, n)."""
    prompts = recipe.prompt.reconstruct
    if len(prompts) == 1:
        return [prompts[0]] * len(n_B)
    index_B = uniform(recipe.seed, PROMPT, n_B.cpu(), 1)[:, 0].mul(len(prompts)).long()
    # Rounding of the product may reach len(prompts).
    return [prompts[min(i, len(prompts) - 1)] for i in index_B.tolist()]


def pad_outputs(
    outputs_TD: Tensor, condition: Condition, hidden_BQD: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Unpack each sample's outputs, append its queries' outputs, zero-pad: (B, C, D).

    The outputs of skipped tokens are left out. Returns the lengths (B,) as well, or None if all
    samples have the same length.
    """
    rows = [
        row[skip:]
        for row, skip in zip(outputs_TD.split(condition.lengths), condition.skipped, strict=True)
    ]
    lengths, num = {len(row) for row in rows}, 0
    if hidden_BQD is not None:
        num = hidden_BQD.shape[1]
        rows = [torch.cat((row, hidden)) for row, hidden in zip(rows, hidden_BQD, strict=True)]
    padded_BCD = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if len(lengths) == 1:
        return padded_BCD, None
    return padded_BCD, condition.offsets.diff().long() - condition.skipped_B + num


def grid(latents_BCHW: Tensor, patch: int) -> tuple[int, int]:
    """Return the (rows, columns) of latent tokens."""
    return latents_BCHW.shape[-2] // patch, latents_BCHW.shape[-1] // patch
