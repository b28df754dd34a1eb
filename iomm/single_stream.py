"""Single-stream diffusion transformer with Z-Image's blocks.

It maps noisy latent tokens, times and condition tokens to a velocity. The architecture is Z-Image's
(arXiv 2511.22699): each modality passes through a few refiner layers, then both form one sequence,
latents first. iomm/layout.py maps it to diffusers' ZImageTransformer2DModel, whose conventions
differ from ours in two ways: its time is 1 - t (0 noise, 1 image), and its output is image - noise,
our velocity negated. `forward` converts both.

Like Z-Image, the model pads both sequences to multiples of 32 with learned pad tokens that
everything attends to. If all samples of a batch have the same lengths, as the interface requires,
it equals Z-Image at every size. It does not for ragged batches, where Z-Image also pads each sample
to the longest and masks that padding. If both lengths are multiples of 32, as in the preset at 512
px, the pad tokens get no gradient.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iomm.config import GeneratorConfig, RouteConfig
from iomm.flops import attention_flops, attention_products, linear_flops
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

# Epsilon of every RMS norm, as in Z-Image.
EPS = 1e-5
# Epsilon of the final layer norm.
FINAL_EPS = 1e-6
PAD_MULTIPLE = 32
TIME_WIDTH, TIME_HIDDEN = 256, 1024


def time_width(width: int) -> int:
    """Return the width of the time vector: 256, or the model's width if that is smaller."""
    return min(width, TIME_WIDTH)


class Modulation(NamedTuple):
    """Factors (B, 1, D) of a layer's two branches, or 1.0 if the layer is not modulated."""

    scale: Tensor | float
    gate: Tensor | float
    mlp_scale: Tensor | float
    mlp_gate: Tensor | float


class Layer(nn.Module):
    """Attention and SwiGLU, each with a norm before and after it.

    With `modulated`, the time vector yields a scale for each branch's input and a tanh gate for its
    output.
    """

    def __init__(self, config: GeneratorConfig, modulated: bool = True):
        super().__init__()
        width, hidden = config.width, int(config.width / 3 * 8)
        self.num_heads = config.num_heads

        def norm(size: int) -> nn.RMSNorm:
            return nn.RMSNorm(size, eps=EPS, elementwise_affine=config.norm_affine)

        self.attention_norm_in = norm(width)
        self.attention_norm_out = norm(width)
        self.qkv = FusedLinear(width, (width, width, width), bias=False)
        self.q_norm = norm(config.head_dim)
        self.k_norm = norm(config.head_dim)
        self.out = TokenLinear(width, width, bias=False)
        self.mlp_norm_in = norm(width)
        self.mlp_norm_out = norm(width)
        # Gate and value of the SwiGLU.
        self.mlp_in = FusedLinear(width, (hidden, hidden), bias=False)
        self.mlp_out = TokenLinear(hidden, width, bias=False)
        self.modulation = nn.Linear(time_width(width), 4 * width) if modulated else None

    def forward(
        self, x_BLD: Tensor, cos_LF: Tensor, sin_LF: Tensor, time_BW: Tensor | None = None
    ) -> Tensor:
        scale, gate, mlp_scale, mlp_gate = self.modulate(time_BW)
        attended = self.attention(self.attention_norm_in(x_BLD) * scale, cos_LF, sin_LF)
        x_BLD = x_BLD + gate * self.attention_norm_out(attended)
        switch, value = self.mlp_in(self.mlp_norm_in(x_BLD) * mlp_scale).chunk(2, dim=-1)
        return x_BLD + mlp_gate * self.mlp_norm_out(self.mlp_out(F.silu(switch) * value))

    def modulate(self, time_BW: Tensor | None) -> Modulation:
        """Return the scales and gates for this time vector."""
        if self.modulation is None:
            return Modulation(1.0, 1.0, 1.0, 1.0)
        scale, gate, mlp_scale, mlp_gate = self.modulation(time_BW)[:, None].chunk(4, dim=-1)
        return Modulation(1 + scale, gate.tanh(), 1 + mlp_scale, mlp_gate.tanh())

    def attention(self, x_BLD: Tensor, cos_LF: Tensor, sin_LF: Tensor) -> Tensor:
        """Return joint self-attention (B, L, D) with normed and rotated queries and keys."""
        qkv = self.qkv(x_BLD).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qk_norm_rope(qkv, self.q_norm.weight, self.k_norm.weight, cos_LF, sin_LF, eps=EPS)
        return self.out(attend(q, k, v))

    def flops(self, num_tokens: float, training: bool = False) -> float:
        """Return the FLOPs on one sequence: 2 m n k of every matrix product."""
        linears = linear_flops(self, num_tokens, training)
        # The modulation runs on one row per sample, not on every token.
        if self.modulation is not None:
            linears -= linear_flops(self.modulation, num_tokens - 1, training)
        attention = attention_flops(num_tokens, num_tokens, self.out.in_features)
        return linears + attention_products(self, training) * attention


def padded_length(length: int) -> int:
    """Return `length` rounded up to a multiple of 32."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def pad_tokens(x_BLD: Tensor, pad_1D: Tensor) -> Tensor:
    """Append the pad token until the length is a multiple of 32.

    If no token is missing, the pad token is in the graph all the same. ZeRO-3 gives a parameter
    without a gradient the gradient of the previous step.
    """
    batch, length, width = x_BLD.shape
    pads = pad_1D.to(x_BLD.dtype).expand(batch, padded_length(length) - length, width)
    return torch.cat((x_BLD, pads), dim=1)


@lru_cache(maxsize=64)
# Training also uses a table first created while sampling, and autograd saves it there.
@torch.inference_mode(False)
def joint_tables(
    grid: tuple[int, int],
    num_condition: int,
    axes: tuple[int, ...],
    theta: float,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return rotary cosines and sines (L, E / 2) of the joint sequence, latents first.

    Condition token i of C, pad tokens included, has position (1 + i, 0, 0). Latents have position
    (1 + C, row, column) and their pad tokens (0, 0, 0).

    Args:
        grid: (rows, columns) of latent tokens, before padding.
        num_condition: C, the number of condition tokens after padding.
        axes: head dims of the (index, row, column) axes.
        theta: base of the frequencies.
        device: device of the results.
        dtype: dtype of the results.
    """
    latents_N3 = grid_positions(1 + num_condition, *grid)
    pads = latents_N3.new_zeros(padded_length(len(latents_N3)) - len(latents_N3), 3)
    condition_C3 = F.pad(torch.arange(1, 1 + num_condition)[:, None], (0, 2))
    return rope_tables(torch.cat((latents_N3, pads, condition_C3)), axes, theta, device, dtype)


class SingleStream(nn.Module):
    """Z-Image's transformer; see iomm/generator.py for the interface."""

    # Each of these is gathered whole under ZeRO-3 and compiled as one graph.
    block_classes = (Layer,)

    def __init__(self, config: GeneratorConfig):
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

    def forward(
        self,
        noisy_BNK: Tensor,
        t_B: Tensor,
        condition_BCD: Tensor,
        grid: tuple[int, int],
        lengths_B: Tensor | None = None,
        tap: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the velocity (B, N, K) = noise - image.

        Args:
            noisy_BNK: noisy latent tokens.
            t_B: times in [0, 1].
            condition_BCD: condition tokens.
            grid: (rows, columns) of latent tokens.
            lengths_B: for ragged conditions, how many of the C tokens belong to each sample. The
                others are replaced by pad tokens.
            tap: number of a block, counted from 1 after the refiners, whose latents (B, N, D) are
                returned as well, without pad tokens; 0 for none.
        """
        num_latents, (rows, columns) = noisy_BNK.shape[1], grid
        assert num_latents == rows * columns, (
            f"{num_latents} latent tokens do not fill a grid of {rows} x {columns}"
        )
        latents = pad_tokens(self.latents_in(noisy_BNK), self.latent_pad_1D)
        condition = self.condition_in(self.condition_norm(condition_BCD))
        if lengths_B is not None:
            own_BC = torch.arange(condition.shape[1], device=lengths_B.device) < lengths_B[:, None]
            condition = torch.where(
                own_BC[..., None], condition, self.condition_pad_1D.to(condition.dtype)
            )
        condition = pad_tokens(condition, self.condition_pad_1D)
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
        latents = F.layer_norm(joint[:, :num_latents], joint.shape[-1:], eps=FINAL_EPS)
        velocity_BNK = -self.final(latents * scale[:, None])
        return (velocity_BNK, tapped_BND) if tap else velocity_BNK

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialize all weights as a function of the seed.

        Every modulated layer starts as the identity and the velocity as 0. Pad tokens are normal
        with standard deviation 0.02: at zero, an RMS norm would multiply their gradient by
        1 / sqrt(eps) = 316.
        """
        init_weights(self, seed)
        for name in ("latent_pad_1D", "condition_pad_1D"):
            pad_1D = getattr(self, name)
            pad_1D.copy_(
                torch.empty(pad_1D.shape).normal_(std=0.02, generator=generator_for(seed, name))
            )

    def flops_per_image(
        self,
        grid: tuple[int, int],
        num_condition: float,
        training: bool = False,
        route: RouteConfig | None = None,
    ) -> float:
        """Return the FLOPs of one image: 2 m n k of every matrix product.

        They are those of a forward pass, or with `training` of both passes. Pad tokens are
        included.
        """
        num_latents = grid[0] * grid[1]
        latents, condition = padded_length(num_latents), padded_length(num_condition)
        total = sum(
            linear_flops(part, 1, training) for part in (self.time_in, self.final_modulation)
        )
        total += linear_flops(self.condition_in, num_condition, training)
        total += sum(
            linear_flops(part, num_latents, training) for part in (self.latents_in, self.final)
        )
        total += sum(layer.flops(latents, training) for layer in self.latent_refiners)
        total += sum(layer.flops(condition, training) for layer in self.condition_refiners)
        return total + sum(layer.flops(latents + condition, training) for layer in self.blocks)
