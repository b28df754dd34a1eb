"""Algorithm 1 as the paper writes it, in plain PyTorch: what benchmarks/throughput.py --against plain measures us against.

The way a good engineer would in an afternoon: transformers' decoder forward with an attention mask and ordinary autograd
(hidden tokens stay in the sequence and nobody sees them, position ids are the original ones), diffusers' FLUX transformer,
scaled_dot_product_attention, bf16 autocast over fp32 weights, fused AdamW, torch.compile on the blocks. One process, no
partitioning: what DeepSpeed costs on one GPU is ours to bear.

It computes the same function as iomm/model.py: with the same weights (`load`), the same pixels and the same draws the
losses and the gradients agree (tests/test_plain.py). The frozen modules are the very ones that ours holds."""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import nn

from iomm.layout import Layout, describe
from iomm.mllm import IMAGE, RECONSTRUCT, TURN


class Adapter(nn.Module):
    """Residual query adapter: learned queries cross-attend to the condition, then a feed-forward; pre-norm."""

    def __init__(self, num_queries, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.queries_QD = nn.Parameter(torch.randn(num_queries, width) * width**-0.5)
        self.query_norm, self.condition_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, condition_BCD, shown_BC):
        """shown_BC: bool, condition tokens that may be seen; None for all."""
        x_BQD = self.queries_QD.expand(len(condition_BCD), -1, -1)
        seen_BCD = self.condition_norm(condition_BCD)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (
            self.to_q(self.query_norm(x_BQD)), self.to_k(seen_BCD), self.to_v(seen_BCD)))
        mask = None if shown_BC is None else shown_BC[:, None, None]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x_BQD = x_BQD + self.to_out(read)
        return x_BQD + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BQD)), approximate="tanh"))


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of a batch: which image tokens stay visible, the times in [0, 1], the noise of the latents."""

    visible_BP: torch.Tensor
    t_B: torch.Tensor
    noise_BCHW: torch.Tensor


class Plain(nn.Module):
    """Generator and adapter, trained; MLLM and VAE, frozen, shared with ours, whose compiled ViT and encoder it runs too.

    every: all MLLM outputs condition the generator and hidden tokens are zeros that are seen, as the text of Algorithm 1
    reads; else the outputs at the queries do, and nobody sees a hidden token."""

    def __init__(self, shape, adapter, mllm, vae, *, ratio, every=False, autocast=False):
        """shape: GeneratorConfig; adapter: AdapterConfig; mllm, vae: MLLM and FluxVAE, whose modules it takes."""
        super().__init__()
        self.shape, self.ratio, self.every, self.autocast = shape, ratio, every, autocast
        self.frozen = mllm, vae                              # in a tuple: parameters() gives what trains
        self.patch, self.num_image = vae.patch, mllm.num_image_tokens
        self.before = mllm.token_ids(TURN[0] + RECONSTRUCT + IMAGE[0])
        self.after = mllm.token_ids(IMAGE[1] + TURN[1])
        self.generator = FluxTransformer2DModel(**{k: v for k, v in describe(shape, vae.patch).items() if k != "_class_name"})
        self.adapter = Adapter(adapter.num_queries, mllm.width, mllm.width // adapter.head_dim)

    @torch.no_grad()
    def load(self, state):
        """Takes the weights of an IOMM without a connector: name -> tensor, as its state_dict has them."""
        parts = {part: {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(part)}
                 for part in ("generator", "adapter")}
        self.generator.load_state_dict(Layout(self.shape, self.patch).to_theirs(parts["generator"]))
        self.adapter.load_state_dict(parts["adapter"])

    def compile_blocks(self):
        """Every block one graph; ViT and VAE are compiled by their owner."""
        for block in (*self.generator.transformer_blocks, *self.frozen[0].backbone.language_model.layers):
            block.compile(dynamic=False)         # a graph for lengths in general would take the place of those for one length

    def draw(self, batch, latents_BCHW):
        device = latents_BCHW.device
        return Draws(visible_BP=torch.rand(batch, self.num_image, device=device) >= self.ratio,
                     t_B=torch.rand(batch, device=device), noise_BCHW=torch.randn_like(latents_BCHW))

    def loss(self, pixels_BCHW, vit_pixels_BCHW, draws=None):
        """Mean squared error of the velocity; `draws` default to fresh ones."""
        mllm, vae = self.frozen
        latents_BCHW, image_BPD = vae.encode(pixels_BCHW), mllm.image_tokens(vit_pixels_BCHW)
        draws = draws or self.draw(len(pixels_BCHW), latents_BCHW)
        with self.arithmetic(latents_BCHW.device):
            condition_BCD = self.condition(image_BPD, draws.visible_BP)
            t = draws.t_B.to(latents_BCHW.dtype)[:, None, None, None]
            noisy_BCHW = (1 - t) * latents_BCHW + t * draws.noise_BCHW
            velocity_BNK = self.velocity(noisy_BCHW, condition_BCD, draws.t_B)
        return F.mse_loss(velocity_BNK.to(latents_BCHW.dtype), self.tokens(draws.noise_BCHW - latents_BCHW))

    def arithmetic(self, device):
        return torch.autocast(device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()

    def condition(self, image_BPD, visible_BP):
        """[prompt, image tokens, prompt, RQA's queries] through the whole MLLM -> what conditions the generator (B, C, D)."""
        mllm, batch, device = self.frozen[0].backbone, len(image_BPD), image_BPD.device
        with torch.no_grad():
            before, after = (mllm.get_input_embeddings()(torch.tensor(ids, device=device)).expand(batch, -1, -1)
                             for ids in (self.before, self.after))
            if self.every:
                image_BPD = image_BPD * visible_BP[..., None]
            condition_BCD = torch.cat((before, image_BPD, after), dim=1)
        shown_BC = None if self.every else F.pad(visible_BP, (len(self.before), len(self.after)), value=True)
        queries_BQD = self.adapter(condition_BCD, shown_BC)
        whole_BLD = torch.cat((condition_BCD, queries_BQD.to(condition_BCD.dtype)), dim=1)
        mask = None
        if not self.every:
            shown_BL = F.pad(shown_BC, (0, queries_BQD.shape[1]), value=True)
            length = shown_BL.shape[1]
            mask = shown_BL[:, None, None] & torch.ones(length, length, dtype=torch.bool, device=device).tril()
        # As a dict transformers takes a mask as it is; None is causal. Otherwise it would look at positions on the host.
        hidden_BLD = mllm.language_model(inputs_embeds=whole_BLD, attention_mask={"full_attention": mask},
                                         use_cache=False).last_hidden_state
        return hidden_BLD if self.every else hidden_BLD[:, -queries_BQD.shape[1]:]

    def velocity(self, noisy_BCHW, condition_BCD, t_B):
        rows, columns = (side // self.patch for side in noisy_BCHW.shape[-2:])
        device = noisy_BCHW.device
        places = torch.cartesian_prod(torch.arange(1.0), torch.arange(float(rows)), torch.arange(float(columns))).to(device)
        pooled = noisy_BCHW.new_zeros(len(noisy_BCHW), self.generator.config.pooled_projection_dim)
        return self.generator(self.tokens(noisy_BCHW), condition_BCD, pooled, t_B, places,
                              torch.zeros(condition_BCD.shape[1], 3, device=device), return_dict=False)[0]

    def tokens(self, x_BCHW):
        """2 x 2 latents -> one token, FLUX's order."""
        x = F.pixel_unshuffle(x_BCHW, self.patch)
        return x.flatten(2).transpose(1, 2)


class Trainer:
    """Optimizer and average around a Plain; `step` is one optimizer step on a batch."""

    def __init__(self, plain, optim, decay):
        """optim: OptimSection; decay: of the average, 0 for none."""
        self.plain, self.clip, self.decay = plain, optim.clip, decay
        self.parameters = [p for p in plain.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps,
                                           weight_decay=optim.weight_decay, fused=True)
        self.average = [p.detach().clone() for p in self.parameters] if decay else []

    def step(self, batches, num):
        """Over `num` micro-batches (engine's Batch), each asked for when it is due -> their mean loss."""
        losses = []
        for batch in batches:
            loss = self.plain.loss(batch.pixels_BCHW, batch.vit_pixels_BCHW) / num
            loss.backward()
            losses.append(loss.detach())
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - self.decay)
        return torch.stack(losses).sum()
