"""Algorithm 1 as the paper writes it, in plain PyTorch.

This is the baseline of benchmarks/throughput.py and benchmarks/studies/time_to_quality.py.

Written the way a good engineer would in an afternoon: transformers' decoder forward with an
attention mask and ordinary autograd (hidden tokens stay in the sequence but are masked, and
position ids are the original ones), diffusers' FLUX transformer, scaled_dot_product_attention,
bf16 autocast over fp32 weights, fused AdamW, torch.compile on the blocks. It runs in one process
without partitioning, so DeepSpeed's overhead on one GPU counts against our engine. Captioned
samples are padded to the longest of their batch.

It computes the same function as iomm/model.py: with the same weights (`load`), pixels and draws,
losses and gradients agree (tests/benchmarks/test_baseline.py). The frozen modules are the same
objects as in our model.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from iomm.config import RECONSTRUCT, AdapterConfig, GeneratorConfig
from iomm.engine.config import OptimSection, RunConfig
from iomm.engine.data.source import Batch
from iomm.engine.parallel.optim import STACK_BYTES, orthogonal_stack, stacks_of
from iomm.flow import sample_time
from iomm.kernels.philox import CAPTION_DROP, NOISE, TIME, normal, uniform
from iomm.layout import Layout, to_diffusers_config
from iomm.masking import visible_mask
from iomm.mllm import IMAGE, MLLM, TURN
from iomm.vae import Latents


class Adapter(nn.Module):
    """Residual query adapter: learned queries, pre-norm cross-attention and feed-forward."""

    def __init__(self, num_queries: int, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.queries_QD = nn.Parameter(torch.randn(num_queries, width) * width**-0.5)
        self.query_norm, self.condition_norm, self.mlp_norm = (
            nn.LayerNorm(width) for _ in range(3)
        )
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, condition_BCD: Tensor, visible_BC: Tensor | None) -> Tensor:
        """Return the queries after attending to the condition (B, Q, D).

        visible_BC: bool, True for condition tokens that may be attended to; None for all.
        """
        x_BQD = self.queries_QD.expand(len(condition_BCD), -1, -1)
        normed_BCD = self.condition_norm(condition_BCD)
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y in (
                self.to_q(self.query_norm(x_BQD)),
                self.to_k(normed_BCD),
                self.to_v(normed_BCD),
            )
        )
        mask = None if visible_BC is None else visible_BC[:, None, None]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x_BQD = x_BQD + self.to_out(read)
        return x_BQD + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BQD)), approximate="tanh"))


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random draws for a batch.

    visible_BP: bool, True for image tokens that stay visible; t_B: times in [0, 1]; noise_BCHW:
    noise of the latents.
    """

    visible_BP: Tensor
    t_B: Tensor
    noise_BCHW: Tensor


def engine_draws(
    config: RunConfig, batch: Batch, mllm: MLLM, vae: Latents
) -> tuple[Draws, list | None]:
    """Return the random numbers that IOMM draws for these samples, and their texts.

    The texts are the captions that condition the samples: "" for a dropped caption, None for a
    sample that is conditioned on its image. The list is None if all samples are.
    """
    n_B, seed = batch.n_B.to(batch.vit_pixels_BHWC.device), config.run.seed
    rows, columns = (side // vae.factor for side in batch.pixels_BCHW.shape[-2:])
    noise_BD = normal(seed, NOISE, n_B, vae.channels * rows * columns)
    visible = visible_mask(config.mask, seed, n_B, mllm.num_image_tokens)
    draws = Draws(
        visible_BP=visible.view(len(n_B), -1),
        t_B=sample_time(uniform(seed, TIME, n_B, 1)[:, 0], **asdict(config.time)),
        noise_BCHW=noise_BD.view(-1, vae.channels, rows, columns),
    )
    if all(batch.has_image):
        return draws, None
    dropped = uniform(seed, CAPTION_DROP, n_B, 1)[:, 0] < config.train.caption_drop
    texts = [
        None if image else "" if drop else caption
        for image, drop, caption in zip(
            batch.has_image, dropped.tolist(), batch.captions, strict=True
        )
    ]
    return draws, texts


class BaselineModel(nn.Module):
    """A trained generator and adapter on a frozen MLLM and VAE.

    The frozen modules are shared with our model, including its compiled ViT and VAE encoder.
    """

    def __init__(
        self,
        shape: GeneratorConfig,
        adapter: AdapterConfig,
        mllm: MLLM,
        vae: Latents,
        *,
        ratio: float,
        every: bool = False,
        autocast: bool = False,
    ):
        """Build the trained parts and take the frozen ones.

        Args:
            shape: shape of the generator.
            adapter: shape of the query adapter.
            mllm: the MLLM, whose modules are shared.
            vae: FluxVAE, whose modules are shared.
            ratio: share of hidden image tokens in fresh draws.
            every: condition the generator on all MLLM outputs and replace hidden tokens by visible
                zeros, as the text of Algorithm 1 reads. By default only the outputs at the queries
                condition it, and hidden tokens are masked.
            autocast: run in bf16 autocast.
        """
        super().__init__()
        self.shape, self.ratio, self.every, self.autocast = shape, ratio, every, autocast
        # In a tuple, so that parameters() yields only what trains.
        self.frozen = mllm, vae
        self.patch, self.num_image = vae.patch, mllm.num_image_tokens
        self.before = mllm.token_ids(TURN[0] + RECONSTRUCT + IMAGE[0])
        self.after = mllm.token_ids(IMAGE[1] + TURN[1])
        self.generator = FluxTransformer2DModel(
            **{k: v for k, v in to_diffusers_config(shape, vae.patch).items() if k != "_class_name"}
        )
        self.adapter = Adapter(adapter.num_queries, mllm.width, mllm.width // adapter.head_dim)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Load the state_dict of an IOMM without a connector."""
        parts = {
            part: {
                name.removeprefix(f"{part}."): tensor
                for name, tensor in state.items()
                if name.startswith(part)
            }
            for part in ("generator", "adapter")
        }
        self.generator.load_state_dict(Layout(self.shape, self.patch).to_theirs(parts["generator"]))
        self.adapter.load_state_dict(parts["adapter"])

    def compile_blocks(self) -> None:
        """Compile every block as one graph; our model compiles the ViT and the VAE."""
        for block in (
            *self.generator.transformer_blocks,
            *self.frozen[0].backbone.language_model.layers,
        ):
            # A dynamic-shape graph would replace the faster graphs for a fixed length.
            block.compile(dynamic=False)

    def draw(self, batch: int, latents_BCHW: Tensor) -> Draws:
        """Return fresh draws for a batch of this size."""
        device = latents_BCHW.device
        return Draws(
            visible_BP=torch.rand(batch, self.num_image, device=device) >= self.ratio,
            t_B=torch.rand(batch, device=device),
            noise_BCHW=torch.randn_like(latents_BCHW),
        )

    def loss(
        self,
        pixels_BCHW: Tensor,
        vit_pixels_ICHW: Tensor,
        draws: Draws | None = None,
        texts: list | None = None,
    ) -> Tensor:
        """Return the mean squared error of the velocity.

        Args:
            pixels_BCHW: pixels of the VAE in [-1, 1].
            vit_pixels_ICHW: pixels of the ViT for the samples conditioned on their image, in order.
            draws: random draws; fresh ones by default.
            texts: the captions that condition the samples, None for one conditioned on its image;
                no list if all samples are.
        """
        mllm, vae = self.frozen
        latents_BCHW = vae.encode(pixels_BCHW)
        image_IPD = mllm.image_tokens(vit_pixels_ICHW) if len(vit_pixels_ICHW) else None
        draws = draws or self.draw(len(pixels_BCHW), latents_BCHW)
        with self.arithmetic(latents_BCHW.device):
            condition_BCD = self.condition(image_IPD, draws.visible_BP, texts)
            t = draws.t_B.to(latents_BCHW.dtype)[:, None, None, None]
            noisy_BCHW = (1 - t) * latents_BCHW + t * draws.noise_BCHW
            velocity_BNK = self.velocity(noisy_BCHW, condition_BCD, draws.t_B)
        return F.mse_loss(
            velocity_BNK.to(latents_BCHW.dtype), self.tokens(draws.noise_BCHW - latents_BCHW)
        )

    def arithmetic(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16) if self.autocast else nullcontext()

    def condition(
        self, image_IPD: Tensor | None, visible_BP: Tensor, texts: list | None = None
    ) -> Tensor:
        """Return what conditions the generator (B, C, D).

        The whole MLLM reads [prompt, image tokens, prompt, RQA's queries], or for samples with a
        text [caption, RQA's queries].
        """
        mllm, batch, device = self.frozen[0].backbone, len(visible_BP), visible_BP.device
        positions_BL = None
        with torch.no_grad():
            if texts is not None:
                condition_BCD, visible_BC, end_B = self.mixed(image_IPD, visible_BP, texts)
                where_BC = torch.arange(visible_BC.shape[1], device=device).expand(batch, -1)
                after_BQ = end_B[:, None] + torch.arange(
                    len(self.adapter.queries_QD), device=device
                )
                positions_BL = torch.cat((where_BC, after_BQ), dim=1)
            else:
                before, after = (
                    mllm.get_input_embeddings()(torch.tensor(ids, device=device)).expand(
                        batch, -1, -1
                    )
                    for ids in (self.before, self.after)
                )
                if self.every:
                    image_IPD = image_IPD * visible_BP[..., None]
                condition_BCD = torch.cat((before, image_IPD, after), dim=1)
                visible_BC = (
                    None
                    if self.every
                    else F.pad(visible_BP, (len(self.before), len(self.after)), value=True)
                )
        queries_BQD = self.adapter(condition_BCD, visible_BC)
        whole_BLD = torch.cat((condition_BCD, queries_BQD.to(condition_BCD.dtype)), dim=1)
        mask = None
        if not self.every:
            visible_BL = F.pad(visible_BC, (0, queries_BQD.shape[1]), value=True)
            length = visible_BL.shape[1]
            mask = (
                visible_BL[:, None, None]
                & torch.ones(length, length, dtype=torch.bool, device=device).tril()
            )
        # transformers uses a mask in a dict unchanged, and None is causal. Otherwise it would read
        # the positions on the host.
        hidden_BLD = mllm.language_model(
            inputs_embeds=whole_BLD,
            attention_mask={"full_attention": mask},
            position_ids=positions_BL,
            use_cache=False,
        ).last_hidden_state
        return hidden_BLD if self.every else hidden_BLD[:, -queries_BQD.shape[1] :]

    def mixed(
        self, image_IPD: Tensor | None, visible_BP: Tensor, texts: list
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed a batch of images and captions.

        Rows are right-padded to the longest. Hidden tokens and padding are not visible.

        Returns:
            The condition tokens (B, C, D), which of them are visible (B, C), and each sample's
            position id after its own tokens (B,).
        """
        assert not self.every, "all outputs as condition are implemented for images only"
        mllm, device = self.frozen[0], visible_BP.device
        image_row = [*self.before, *[0] * self.num_image, *self.after]
        rows = [
            image_row if text is None else mllm.token_ids(TURN[0] + text) + mllm.token_ids(TURN[1])
            for text in texts
        ]
        longest = max(map(len, rows))
        end_B = torch.tensor([len(row) for row in rows], device=device)
        ids_BC = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        condition_BCD = mllm.backbone.get_input_embeddings()(ids_BC)
        visible_BC = torch.arange(longest, device=device) < end_B[:, None]
        images = [b for b, text in enumerate(texts) if text is None]
        if images:
            place = slice(len(self.before), len(self.before) + self.num_image)
            condition_BCD[images, place] = image_IPD.to(condition_BCD.dtype)
            visible_BC[images, place] = visible_BP[images]
        return condition_BCD, visible_BC, end_B

    def velocity(self, noisy_BCHW: Tensor, condition_BCD: Tensor, t_B: Tensor) -> Tensor:
        """Return the predicted velocity of noisy latents, as tokens."""
        rows, columns = (side // self.patch for side in noisy_BCHW.shape[-2:])
        device = noisy_BCHW.device
        places = torch.cartesian_prod(
            torch.arange(1.0), torch.arange(float(rows)), torch.arange(float(columns))
        ).to(device)
        pooled = noisy_BCHW.new_zeros(len(noisy_BCHW), self.generator.config.pooled_projection_dim)
        return self.generator(
            self.tokens(noisy_BCHW),
            condition_BCD,
            pooled,
            t_B,
            places,
            torch.zeros(condition_BCD.shape[1], 3, device=device),
            return_dict=False,
        )[0]

    def tokens(self, x_BCHW: Tensor) -> Tensor:
        """Fold 2 x 2 latents into one token, in FLUX's order."""
        x = F.pixel_unshuffle(x_BCHW, self.patch)
        return x.flatten(2).transpose(1, 2)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and an update as large as AdamW's.

    It orthogonalises with the engine's own function, in its stacks of equally shaped matrices
    (engine/parallel/optim.py), so neither side gains an advantage from it.
    """

    def __init__(
        self,
        matrices: list,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        newton_schulz_steps: int,
    ):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.stacks, self.newton_schulz_steps = (
            stacks_of(matrices, STACK_BYTES[matrices[0].device.type]),
            newton_schulz_steps,
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (group,) = self.param_groups
        for stack in self.stacks:
            with_gradient = [p for p in stack if p.grad is not None]
            updates = []
            for p in with_gradient:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                updates.append(p.grad.lerp(buffer, group["momentum"]))
            orthogonal = orthogonal_stack(updates, self.newton_schulz_steps) if updates else []
            for p, update in zip(with_gradient, orthogonal, strict=True):
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view_as(p), alpha=-group["lr"])


class Trainer:
    """The optimizers and the weight average of a BaselineModel."""

    def __init__(self, baseline: BaselineModel, optim: OptimSection, decay: float):
        """Create the optimizers.

        Args:
            baseline: the model to train.
            optim: with kind "muon", the matrices of blocks and adapter are trained by Muon.
            decay: decay of the average; 0 for none.
        """
        self.baseline, self.clip, self.decay, self.steps = baseline, optim.clip, decay, 0
        self.parameters = [p for p in baseline.parameters() if p.requires_grad]
        layers = {
            id(part.weight)
            for name, part in baseline.named_modules()
            if isinstance(part, nn.Linear)
            and any(where in name for where in ("transformer_blocks.", "adapter."))
            and "norm" not in name
        }
        matrices = [p for p in self.parameters if id(p) in layers] if optim.kind == "muon" else []
        others = [p for p in self.parameters if optim.kind != "muon" or id(p) not in layers]
        self.optimizers = [
            torch.optim.AdamW(
                others,
                lr=optim.lr,
                betas=optim.betas,
                eps=optim.eps,
                weight_decay=optim.weight_decay,
                fused=True,
            )
        ]
        if matrices:
            self.optimizers.append(
                Muon(
                    matrices,
                    lr=optim.lr,
                    momentum=optim.momentum,
                    weight_decay=optim.weight_decay,
                    newton_schulz_steps=optim.newton_schulz_steps,
                )
            )
        self.average = [p.detach().clone() for p in self.parameters] if decay else []

    def set_lr(self, lr: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def step(
        self, batches: Iterable[Batch], num: int, draws: Callable[[Batch], tuple] | None = None
    ) -> Tensor:
        """Take one optimizer step over `num` micro-batches and return their mean loss.

        draws: function from a batch to its draws and texts (engine_draws). By default the draws
        are fresh and all samples are conditioned on their image.
        """
        losses = []
        for batch in batches:
            given = draws(batch) if draws else ()
            loss = self.baseline.loss(batch.pixels_BCHW, batch.vit_pixels_BHWC, *given) / num
            loss.backward()
            losses.append(loss.detach())
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.average:
            # The decay ramps up as the engine's does (engine/parallel/ema.py).
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        self.steps += 1
        return torch.stack(losses).sum()
