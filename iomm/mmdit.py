"""Dual-stream diffusion transformer (MM-DiT) with FLUX blocks.

It maps noisy latent tokens, times and condition tokens to a velocity. The architecture is FLUX.1's
(github.com/black-forest-labs/flux) without the pooled text vector: two streams with separate
weights meet in joint attention, condition tokens first. With `condition_norm` and centred
`positions` it is Qwen-Image's. iomm/layout.py maps it to diffusers' FluxTransformer2DModel or
QwenImageTransformer2DModel.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iomm.config import GeneratorConfig, RouteConfig
from iomm.flops import attention_flops, attention_products, linear_flops
from iomm.kernels.norm_modulate import norm_modulate
from iomm.kernels.qk_norm_rope import qk_norm_rope
from iomm.layers import (
    FusedLinear,
    TimeEmbedding,
    TokenLinear,
    at_least_float32,
    attend,
    gate_residual,
    grid_positions,
    init_weights,
    project_parts,
    rope_tables,
)

# Epsilon of every norm, as in FLUX and Qwen-Image.
EPS = 1e-6

# What qk_norm_rope takes of one stream: qkv or kv (B, L, 3 or 2, A, E), the scale of the queries'
# norm (None if the stream has no queries) and the scale of the keys' norm.
Projections = tuple[Tensor, Tensor | None, Tensor]


class Route(NamedTuple):
    """Which latent tokens run through all blocks in a training step (`RouteConfig`).

    kept_BK are the ascending indices (int64) of the K tokens, out of num_latents. The others skip
    the blocks from `first` to `last`, counted from 1.
    """

    kept_BK: Tensor
    num_latents: int
    first: int
    last: int

    def take(self, x_BNX: Tensor) -> Tensor:
        """Return the rows of the kept tokens."""
        return x_BNX.gather(1, self.kept_BK[..., None].expand(-1, -1, x_BNX.shape[-1]))

    def take_inputs(
        self, cos: Tensor, sin: Tensor, key_mask_BL: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return rotary tables and key mask of the kept tokens, one table per sample.

        Rows for condition tokens, which come first, stay.
        """
        batch, num_kept = self.kept_BK.shape
        tables = []
        for table in (cos, sin):
            first, last = table.split((len(table) - self.num_latents, self.num_latents))
            tables.append(torch.cat((first.expand(batch, -1, -1), last[self.kept_BK]), dim=1))
        if key_mask_BL is not None:
            key_mask_BL = key_mask_BL[:, : key_mask_BL.shape[1] - self.num_latents + num_kept]
        return *tables, key_mask_BL

    def merge(self, whole_BND: Tensor, kept_BKD: Tensor) -> Tensor:
        """Return all tokens: the kept ones after the blocks, the others as they were before."""
        index = self.kept_BK[..., None].expand(-1, -1, whole_BND.shape[-1])
        return whole_BND.scatter(1, index, kept_BKD)


class Stream(nn.Module):
    """One modality's half of a dual-stream block, before and after the joint attention."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = FusedLinear(width, (width, width, width))
        self.q_norm = nn.RMSNorm(width // num_heads, eps=EPS)
        self.k_norm = nn.RMSNorm(width // num_heads, eps=EPS)
        self.out = TokenLinear(width, width)
        self.mlp_in = TokenLinear(width, 4 * width)
        self.mlp_out = TokenLinear(4 * width, width)

    def pre_attention(self, x_BLD: Tensor, time_BD: Tensor) -> tuple[Projections, list[Tensor]]:
        """Return the projections of the stream, and the modulation for `post_attention`."""
        shift, scale, *modulation = self.modulation(time_BD).chunk(6, dim=-1)
        qkv = self.qkv(norm_modulate(x_BLD, shift, scale, eps=EPS))
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        return (qkv, self.q_norm.weight, self.k_norm.weight), modulation

    def post_attention(self, x_BLD: Tensor, branch_BLD: Tensor, modulation: list[Tensor]) -> Tensor:
        """Add the gated attention and the gated MLP to the residual stream.

        `branch_BLD` is the attention after the projection `out`.
        """
        gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x_BLD = gate_residual(x_BLD, gate, branch_BLD)
        hidden = self.mlp_in(norm_modulate(x_BLD, mlp_shift, mlp_scale, eps=EPS))
        hidden = F.gelu(hidden, approximate="tanh")
        return gate_residual(x_BLD, mlp_gate, self.mlp_out(hidden))


class KeyValueStream(nn.Module):
    """The condition's half of the last block: keys and values for the latents, no output."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.modulation = nn.Linear(width, 2 * width)
        self.kv = FusedLinear(width, (width, width))
        self.k_norm = nn.RMSNorm(width // num_heads, eps=EPS)

    def pre_attention(self, x_BLD: Tensor, time_BD: Tensor) -> tuple[Projections, None]:
        """Return the projections of the stream, and None as nothing follows the attention."""
        shift, scale = self.modulation(time_BD).chunk(2, dim=-1)
        kv = self.kv(norm_modulate(x_BLD, shift, scale, eps=EPS))
        kv = kv.unflatten(-1, (2, self.num_heads, -1))
        return (kv, None, self.k_norm.weight), None


class DualBlock(nn.Module):
    """FLUX's dual-stream block: (latents_BND, condition_BCD) -> the same shapes.

    The `last` block returns None for the condition. FLUX computes that output too and discards it.
    Without it, IOMM-B's forward pass is 0.9 % cheaper and the model lacks 33 M parameters that
    would never receive a gradient.
    """

    def __init__(self, width: int, num_heads: int, last: bool = False):
        super().__init__()
        self.last = last
        self.latent_stream = Stream(width, num_heads)
        self.condition_stream = (KeyValueStream if last else Stream)(width, num_heads)

    def forward(
        self,
        latents_BND: Tensor,
        condition_BCD: Tensor,
        time_BD: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_mask_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the latents and the condition after the block.

        SiLU has already been applied to `time_BD`. In the joint sequence the condition tokens come
        before the latents. `cos` and `sin` are (N, E / 2) if the condition is not rotated, else
        (L, E / 2).
        """
        latents, latent_modulation = self.latent_stream.pre_attention(latents_BND, time_BD)
        condition, condition_modulation = self.condition_stream.pre_attention(
            condition_BCD, time_BD
        )
        q, k, v = qk_norm_rope(*latents, cos, sin, condition=condition, eps=EPS)
        attended = attend(q, k, v, key_mask_BL)
        if self.last:
            [branch_BND] = project_parts(attended, [(self.latent_stream.out, attended.shape[1])])
            latents_BND = self.latent_stream.post_attention(
                latents_BND, branch_BND, latent_modulation
            )
            return latents_BND, None
        branch_BCD, branch_BND = project_parts(
            attended,
            [
                (self.condition_stream.out, condition_BCD.shape[1]),
                (self.latent_stream.out, latents_BND.shape[1]),
            ],
        )
        condition_BCD = self.condition_stream.post_attention(
            condition_BCD, branch_BCD, condition_modulation
        )
        latents_BND = self.latent_stream.post_attention(latents_BND, branch_BND, latent_modulation)
        return latents_BND, condition_BCD


class SingleBlock(nn.Module):
    """FLUX's single-stream block: parallel attention and MLP on the joint sequence (B, L, D)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.modulation = nn.Linear(width, 3 * width)
        self.linear_in = FusedLinear(width, (width, width, width, 4 * width))
        self.q_norm = nn.RMSNorm(width // num_heads, eps=EPS)
        self.k_norm = nn.RMSNorm(width // num_heads, eps=EPS)
        self.linear_out = TokenLinear(5 * width, width)

    def forward(
        self,
        joint_BLD: Tensor,
        time_BD: Tensor,
        cos_LF: Tensor,
        sin_LF: Tensor,
        key_mask_BL: Tensor | None = None,
    ) -> Tensor:
        shift, scale, gate = self.modulation(time_BD).chunk(3, dim=-1)
        *qkv_sizes, mlp_size = self.linear_in.parts
        projected = self.linear_in(norm_modulate(joint_BLD, shift, scale, eps=EPS))
        qkv, hidden = projected.split((sum(qkv_sizes), mlp_size), dim=-1)
        q, k, v = qk_norm_rope(
            qkv.unflatten(-1, (3, self.num_heads, -1)),
            self.q_norm.weight,
            self.k_norm.weight,
            cos_LF,
            sin_LF,
            eps=EPS,
        )
        attended = attend(q, k, v, key_mask_BL)
        output = torch.cat((attended, F.gelu(hidden, approximate="tanh")), dim=-1)
        return gate_residual(joint_BLD, gate, self.linear_out(output))


@lru_cache(maxsize=64)
# Training also uses a table first created while sampling, and autograd saves it there.
@torch.inference_mode(False)
def grid_tables(
    grid: tuple[int, int],
    axes: tuple[int, ...],
    theta: float,
    device: torch.device,
    dtype: torch.dtype,
    centred: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return rotary cosines and sines (N, E / 2) of the latent tokens at (0, row, column).

    Rows and columns count from 0, or if `centred` from -(rows - rows // 2), so that the middle of
    the image is at 0. 1024 tokens with a head dim of 128 take 0.5 MB.
    """
    positions_NX = grid_positions(0, *grid)
    if centred:
        positions_NX -= torch.tensor([0, *(side - side // 2 for side in grid)])
    return rope_tables(positions_NX, axes, theta, device, dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def line_tables(
    length: int, axes: tuple[int, ...], theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return rotary cosines and sines (length, E / 2) of the positions (i, i, i)."""
    return rope_tables(torch.arange(length)[:, None].expand(-1, 3), axes, theta, device, dtype)


class MMDiT(nn.Module):
    """MM-DiT with FLUX blocks; see iomm/generator.py for the interface."""

    # Each of these is gathered whole under ZeRO-3 and compiled as one graph.
    block_classes = (DualBlock, SingleBlock)

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        width = config.width
        self.config = config
        self.latents_in = nn.Linear(config.token_dim, width)
        if config.condition_norm:
            self.condition_norm = nn.RMSNorm(config.condition_dim, eps=EPS)
        self.condition_in = nn.Linear(config.condition_dim, width)
        self.time_in = TimeEmbedding(width, width)
        self.blocks = nn.ModuleList(
            DualBlock(
                width,
                config.num_heads,
                last=index == config.num_blocks - 1 and not config.num_single_blocks,
            )
            for index in range(config.num_blocks)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(width, config.num_heads) for _ in range(config.num_single_blocks)
        )
        # Scale first, then shift, which is diffusers' order.
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, config.token_dim)

    def forward(
        self,
        noisy_BNK: Tensor,
        t_B: Tensor,
        condition_BCD: Tensor,
        grid: tuple[int, int],
        lengths_B: Tensor | None = None,
        tap: int = 0,
        route: Route | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the velocity (B, N, K) = noise - image.

        Args:
            noisy_BNK: noisy latent tokens.
            t_B: times in [0, 1].
            condition_BCD: condition tokens.
            grid: (rows, columns) of latent tokens.
            lengths_B: for ragged conditions, how many of the C tokens belong to each sample. The
                others are masked out.
            tap: number of a block, counted from 1 and on through the single-stream blocks, whose
                latents (B, N, D) are returned as well; 0 for none.
            route: the tokens that run through all blocks, and the first and last block that the
                others skip; None for all tokens in all blocks.
        """
        num_condition, (rows, columns) = condition_BCD.shape[1], grid
        assert noisy_BNK.shape[1] == rows * columns, (
            f"{noisy_BNK.shape[1]} latent tokens do not fill a grid of {rows} x {columns}"
        )
        if self.config.condition_norm:
            condition_BCD = self.condition_norm(condition_BCD)
        latents, condition = self.latents_in(noisy_BNK), self.condition_in(condition_BCD)
        time_BD = F.silu(self.time_in(t_B))
        cos, sin = self.rotary_tables(grid, num_condition, latents)
        key_mask_BL = None
        if lengths_B is not None:
            key_mask_BL = F.pad(
                torch.arange(num_condition, device=lengths_B.device) < lengths_B[:, None],
                (0, rows * columns),
                value=True,
            )
        tapped_BND, inputs = None, (cos, sin, key_mask_BL)
        for number, block in enumerate(self.blocks, 1):
            if route is not None and number == route.first:
                whole = latents
                latents, inputs = route.take(latents), route.take_inputs(cos, sin, key_mask_BL)
            latents, condition = block(latents, condition, time_BD, *inputs)
            if route is not None and number == route.last:
                latents, inputs = route.merge(whole, latents), (cos, sin, key_mask_BL)
            if number == tap:
                inside = route is not None and route.first <= number < route.last
                tapped_BND = route.merge(whole, latents) if inside else latents
        if self.single_blocks:
            joint = torch.cat((condition, latents), dim=1)
            # The identity rotation for condition tokens without a position: cosine 1, sine 0.
            unrotated = joint.shape[1] - len(cos)
            cos = F.pad(cos, (0, 0, unrotated, 0), value=1.0)
            sin = F.pad(sin, (0, 0, unrotated, 0))
            for number, block in enumerate(self.single_blocks, len(self.blocks) + 1):
                joint = block(joint, time_BD, cos, sin, key_mask_BL)
                if number == tap:
                    tapped_BND = joint[:, num_condition:]
            latents = joint[:, num_condition:]
        scale, shift = self.final_modulation(time_BD).chunk(2, dim=-1)
        velocity_BNK = self.final(norm_modulate(latents, shift, scale, eps=EPS))
        return (velocity_BNK, tapped_BND) if tap else velocity_BNK

    def rotary_tables(
        self, grid: tuple[int, int], num_condition: int, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return rotary cosines and sines, at least float32, on the device of `like`.

        They are (N, E / 2) of the latent tokens, or with centred positions (L, E / 2) of the
        condition and the latent tokens.
        """
        config, centred = self.config, self.config.positions == "centred"
        shared = (
            config.rope_axes,
            config.rope_theta,
            like.device,
            at_least_float32(like[:0]).dtype,
        )
        tables = grid_tables(tuple(grid), *shared, centred)
        if not centred:
            return tables
        start = max(grid[0] // 2, grid[1] // 2)
        # Conditions have many lengths. A table of the next power of two serves most of them.
        lines = line_tables(1 << (start + num_condition).bit_length(), *shared)
        return tuple(
            torch.cat((line[start : start + num_condition], table))
            for line, table in zip(lines, tables, strict=True)
        )

    def init_weights(self, seed: int) -> None:
        """Initialize all weights as a function of the seed.

        Every block starts as the identity and the velocity as 0 (adaLN-zero).
        """
        init_weights(self, seed)

    def flops_per_image(
        self,
        grid: tuple[int, int],
        num_condition: float,
        training: bool = False,
        route: RouteConfig | None = None,
    ) -> float:
        """Return the FLOPs of one image: 2 m n k of every matrix product.

        They are those of a forward pass, or with `training` of both passes. With `route`, tokens
        skip blocks, as they do in training only.
        """
        num_latents, width = grid[0] * grid[1], self.config.width
        num_joint = num_latents + num_condition
        routed = range(0)
        if route is not None and route.ratio:
            first, last = route.blocks_in(self.config)
            routed = range(first, last + 1)
        total = sum(
            linear_flops(part, 1, training) for part in (self.time_in, self.final_modulation)
        )
        total += linear_flops(self.condition_in, num_condition, training)
        total += sum(
            linear_flops(part, num_latents, training) for part in (self.latents_in, self.final)
        )
        # A modulation runs on one row per sample, not on every token.
        for number, block in enumerate(self.blocks, 1):
            num_inside = route.num_kept(num_latents) if number in routed else num_latents
            for stream, num_tokens in (
                (block.latent_stream, num_inside),
                (block.condition_stream, num_condition),
            ):
                total += linear_flops(stream, num_tokens, training)
                total -= linear_flops(stream.modulation, num_tokens - 1, training)
            num_keys = num_inside + num_condition
            num_queries = num_inside if block.last else num_keys
            attention = attention_flops(num_queries, num_keys, width)
            total += attention_products(block, training) * attention
        for block in self.single_blocks:
            total += linear_flops(block, num_joint, training)
            total -= linear_flops(block.modulation, num_joint - 1, training)
            attention = attention_flops(num_joint, num_joint, width)
            total += attention_products(block, training) * attention
        return total
