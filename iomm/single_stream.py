"""Single-stream diffusion transformer with Z-Image's blocks: noisy latent tokens + condition tokens -> velocity.

The architecture is Z-Image's (arXiv 2511.22699): each modality passes a few refiner layers, then one sequence, latents
first. iomm/layout.py maps it to diffusers' ZImageTransformer2DModel, whose conventions differ from ours in two ways:
its time is 1 - t (0 noise, 1 image) and its output is image - noise, our velocity negated. `forward` converts both.

Lengths: like Z-Image, both sequences are filled up to multiples of 32 with learned pad tokens that everything attends
to. So equality with it holds at every size while all samples of a batch have the same lengths, as they do here by
contract. It is not defined for ragged batches, where Z-Image also fills up samples to the longest and masks that. Where
both lengths are multiples of 32, as in the preset at 512 px, the pad tokens get no gradient.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from iomm.flops import attention_flops, linear_flops
from iomm.kernels.qk_norm_rope import qk_norm_rope
from iomm.layers import (
    FusedLinear,
    TimeEmbedding,
    TokenLinear,
    at_least_float32,
    attend,
    generator_for,
    grid_positions,
    init_weights,
    rope_tables,
)

# Of every RMS norm, Z-Image's.
EPS = 1e-5
# Of the last layer norm.
FINAL_EPS = 1e-6
PAD_MULTIPLE = 32
TIME_WIDTH, TIME_HIDDEN = 256, 1024


def time_width(width):
    """Width of the time vector: 256, or the model's width where that is less."""
    return min(width, TIME_WIDTH)


class Layer(nn.Module):
    """Attention and SwiGLU between norms before and after; with `modulated`, scales and tanh gates from the time.

    (x_BLD, cos_LF, sin_LF, time_BW or None) -> x_BLD.
    """

    def __init__(self, config, modulated=True):
        super().__init__()
        width, hidden = config.width, int(config.width / 3 * 8)
        self.num_heads = config.num_heads

        def norm(size):
            return nn.RMSNorm(size, eps=EPS, elementwise_affine=config.norm_affine)

        self.attention_norm_in, self.attention_norm_out = norm(width), norm(width)
        self.qkv = FusedLinear(width, (width, width, width), bias=False)
        self.q_norm, self.k_norm = norm(config.head_dim), norm(config.head_dim)
        self.out = TokenLinear(width, width, bias=False)
        self.mlp_norm_in, self.mlp_norm_out = norm(width), norm(width)
        # gate, value
        self.mlp_in = FusedLinear(width, (hidden, hidden), bias=False)
        self.mlp_out = TokenLinear(hidden, width, bias=False)
        self.modulation = nn.Linear(time_width(width), 4 * width) if modulated else None

    def forward(self, x_BLD, cos_LF, sin_LF, time_BW=None):
        scale, gate, mlp_scale, mlp_gate = self.scales_and_gates(time_BW)
        attended = self.attention(self.attention_norm_in(x_BLD) * scale, cos_LF, sin_LF)
        x_BLD = x_BLD + gate * self.attention_norm_out(attended)
        switch, value = self.mlp_in(self.mlp_norm_in(x_BLD) * mlp_scale).chunk(2, dim=-1)
        return x_BLD + mlp_gate * self.mlp_norm_out(self.mlp_out(F.silu(switch) * value))

    def scales_and_gates(self, time_BW):
        """Scale, gate, MLP scale, MLP gate: (B, 1, D) each, or ones where nothing is modulated."""
        if self.modulation is None:
            return 1.0, 1.0, 1.0, 1.0
        scale, gate, mlp_scale, mlp_gate = self.modulation(time_BW)[:, None].chunk(4, dim=-1)
        return 1 + scale, gate.tanh(), 1 + mlp_scale, mlp_gate.tanh()

    def attention(self, x_BLD, cos_LF, sin_LF):
        qkv = self.qkv(x_BLD).unflatten(-1, (3, self.num_heads, -1))
        return self.out(
            attend(
                *qk_norm_rope(qkv, self.q_norm.weight, self.k_norm.weight, cos_LF, sin_LF, eps=EPS)
            )
        )

    def flops(self, num_tokens):
        """Forward FLOPs on one sequence."""
        linears = linear_flops(self, num_tokens)
        if self.modulation is not None:
            linears -= linear_flops(self.modulation, num_tokens - 1)
        return linears + attention_flops(num_tokens, num_tokens, self.out.in_features)


def padded(length):
    """The next multiple of 32."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def fill_up(x_BLD, pad_1D):
    """Appends the pad token until the length is a multiple of 32. Where none is missing it is in the graph all the same: a
    parameter without a gradient is one that ZeRO-3 gives that of the step before.
    """
    batch, length, width = x_BLD.shape
    return torch.cat(
        (x_BLD, pad_1D.to(x_BLD.dtype).expand(batch, padded(length) - length, width)), dim=1
    )


@lru_cache(maxsize=64)
# A table first made while sampling is used in training too, where autograd saves it.
@torch.inference_mode(False)
def joint_tables(grid, num_condition, axes, theta, device, dtype):
    """Cosines and sines (L, E / 2) of the padded latents, then of the `num_condition` (C) padded condition tokens.

    Condition token i sits at (1 + i, 0, 0), pads too; a latent at (1 + C, row, column), its pads at (0, 0, 0).
    """
    latents_N3 = grid_positions(1 + num_condition, *grid)
    pads = latents_N3.new_zeros(padded(len(latents_N3)) - len(latents_N3), 3)
    condition_C3 = F.pad(torch.arange(1, 1 + num_condition)[:, None], (0, 2))
    return rope_tables(torch.cat((latents_N3, pads, condition_C3)), axes, theta, device, dtype)


class SingleStream(nn.Module):
    """(noisy_BNK, t_B in [0, 1], condition_BCD, grid (rows, columns)) -> velocity_BNK = noise - image.

    lengths_B, for ragged conditions only: how many of a sample's C tokens are its own; the others become pad tokens.
    tap: block, counted from 1 behind the refiners, whose latents are returned too, pad tokens left out; 0: none.
    """

    # Each gathered whole under ZeRO-3 and compiled as one graph.
    block_classes = (Layer,)

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.config = config
        self.latents_in = nn.Linear(config.token_dim, width)
        self.condition_norm = nn.RMSNorm(
            config.condition_dim, eps=EPS, elementwise_affine=config.norm_affine
        )
        self.condition_in = nn.Linear(config.condition_dim, width)
        self.latent_pad_1D = nn.Parameter(torch.empty(1, width))
        self.condition_pad_1D = nn.Parameter(torch.empty(1, width))
        self.time_in = TimeEmbedding(TIME_HIDDEN, time_width(width))
        self.latent_refiners = nn.ModuleList(
            Layer(config) for _ in range(config.num_refiner_blocks)
        )
        self.condition_refiners = nn.ModuleList(
            Layer(config, modulated=False) for _ in range(config.num_refiner_blocks)
        )
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.num_blocks))
        self.final_modulation = nn.Linear(time_width(width), width)
        self.final = nn.Linear(width, config.token_dim)

    def forward(self, noisy_BNK, t_B, condition_BCD, grid, lengths_B=None, tap=0):
        num_latents, (rows, columns) = noisy_BNK.shape[1], grid
        assert num_latents == rows * columns, (
            f"{num_latents} latent tokens do not fill a grid of {rows} x {columns}"
        )
        latents = fill_up(self.latents_in(noisy_BNK), self.latent_pad_1D)
        condition = self.condition_in(self.condition_norm(condition_BCD))
        if lengths_B is not None:
            own_BC = torch.arange(condition.shape[1], device=lengths_B.device) < lengths_B[:, None]
            condition = torch.where(
                own_BC[..., None], condition, self.condition_pad_1D.to(condition.dtype)
            )
        condition = fill_up(condition, self.condition_pad_1D)
        config = self.config
        cos, sin = joint_tables(
            (rows, columns),
            condition.shape[1],
            config.rope_axes,
            config.rope_theta,
            latents.device,
            at_least_float32(latents[:0]).dtype,
        )
        time_BW = self.time_in(1 - at_least_float32(t_B))
        split = latents.shape[1]
        for layer in self.latent_refiners:
            latents = layer(latents, cos[:split], sin[:split], time_BW)
        for layer in self.condition_refiners:
            condition = layer(condition, cos[split:], sin[split:])
        joint = torch.cat((latents, condition), dim=1)
        tapped_BND = None
        for number, layer in enumerate(self.blocks, 1):
            joint = layer(joint, cos, sin, time_BW)
            if number == tap:
                tapped_BND = joint[:, :num_latents]
        scale = 1 + self.final_modulation(F.silu(time_BW))
        latents = (
            F.layer_norm(joint[:, :num_latents], joint.shape[-1:], eps=FINAL_EPS) * scale[:, None]
        )
        velocity_BNK = -self.final(latents)
        return (velocity_BNK, tapped_BND) if tap else velocity_BNK

    @torch.no_grad()
    def init_weights(self, seed):
        """Fresh weights, a function of the seed; every modulated layer starts as the identity, the velocity as 0.

        Pad tokens are normal with standard deviation 0.02: at zero, an RMS norm would multiply their gradient by
        1 / sqrt(eps) = 316.
        """
        init_weights(self, seed)
        for name in ("latent_pad_1D", "condition_pad_1D"):
            pad_1D = getattr(self, name)
            pad_1D.copy_(
                torch.empty(pad_1D.shape).normal_(std=0.02, generator=generator_for(seed, name))
            )

    def flops_per_image(self, grid, num_condition):
        """Forward FLOPs of one image: 2 m n k of every matrix product, pad tokens included, nothing else."""
        num_latents = grid[0] * grid[1]
        latents, condition = padded(num_latents), padded(num_condition)
        total = linear_flops(self.time_in, 1) + linear_flops(self.final_modulation, 1)
        total += linear_flops(self.condition_in, num_condition)
        total += linear_flops(self.latents_in, num_latents) + linear_flops(self.final, num_latents)
        total += sum(layer.flops(latents) for layer in self.latent_refiners)
        total += sum(layer.flops(condition) for layer in self.condition_refiners)
        return total + sum(layer.flops(latents + condition) for layer in self.blocks)
