"""Dual-stream diffusion transformer (MM-DiT) with FLUX blocks: noisy latent tokens + condition tokens -> velocity.

The architecture is FLUX.1's (github.com/black-forest-labs/flux) without the pooled text vector: two streams with
weights of their own meet in joint attention, condition tokens first. iomm/layout.py maps it to diffusers'
FluxTransformer2DModel.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from iomm.flops import attention_flops, linear_flops
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
    rope_tables,
)

# Of every norm, FLUX's.
EPS = 1e-6


class Stream(nn.Module):
    """One modality's half of a dual-stream block: `open` before the joint attention, `close` after it."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = FusedLinear(width, (width, width, width))
        self.q_norm = nn.RMSNorm(width // num_heads, eps=EPS)
        self.k_norm = nn.RMSNorm(width // num_heads, eps=EPS)
        self.out = TokenLinear(width, width)
        self.mlp_in = TokenLinear(width, 4 * width)
        self.mlp_out = TokenLinear(4 * width, width)

    def open(self, x_BLD, time_BD):
        """-> (qkv (B, L, 3, A, E), weights of the norms of q and k), and what `close` needs of the modulation."""
        shift, scale, *rest = self.modulation(time_BD).chunk(6, dim=-1)
        qkv = self.qkv(norm_modulate(x_BLD, shift, scale, eps=EPS)).unflatten(
            -1, (3, self.num_heads, -1)
        )
        return (qkv, self.q_norm.weight, self.k_norm.weight), rest

    def close(self, x_BLD, attended_BLD, rest):
        """Adds the gated attention and the gated MLP to the residual stream."""
        gate, mlp_shift, mlp_scale, mlp_gate = rest
        x_BLD = gate_residual(x_BLD, gate, self.out(attended_BLD))
        hidden = F.gelu(
            self.mlp_in(norm_modulate(x_BLD, mlp_shift, mlp_scale, eps=EPS)), approximate="tanh"
        )
        return gate_residual(x_BLD, mlp_gate, self.mlp_out(hidden))


class ReadStream(nn.Module):
    """The condition's half of the last block: the latents read its keys and values, and nothing reads its output."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.modulation = nn.Linear(width, 2 * width)
        self.kv = FusedLinear(width, (width, width))
        self.k_norm = nn.RMSNorm(width // num_heads, eps=EPS)

    def open(self, x_BLD, time_BD):
        """-> (kv (B, L, 2, A, E), no weight for queries, that of k), and nothing for a `close`."""
        shift, scale = self.modulation(time_BD).chunk(2, dim=-1)
        kv = self.kv(norm_modulate(x_BLD, shift, scale, eps=EPS)).unflatten(
            -1, (2, self.num_heads, -1)
        )
        return (kv, None, self.k_norm.weight), None


class DualBlock(nn.Module):
    """Two streams, one attention, condition first: (latents_BND, condition_BCD) -> the same.

    The `last` block gives None for the condition. FLUX computes that output too and drops it; without it IOMM-B's
    forward is 0.9 % cheaper and has no 33 M parameters that never see a gradient.
    """

    def __init__(self, width, num_heads, last=False):
        super().__init__()
        self.last = last
        self.latent_stream = Stream(width, num_heads)
        self.condition_stream = (ReadStream if last else Stream)(width, num_heads)

    def forward(self, latents_BND, condition_BCD, time_BD, cos_NF, sin_NF, shown_BL=None):
        """`time_BD` has been through SiLU. Condition tokens sit at position 0, where a rotation does nothing."""
        latents, rest = self.latent_stream.open(latents_BND, time_BD)
        condition, condition_rest = self.condition_stream.open(condition_BCD, time_BD)
        q, k, v = qk_norm_rope(*latents, cos_NF, sin_NF, condition=condition, eps=EPS)
        attended = attend(q, k, v, shown_BL)
        if self.last:
            return self.latent_stream.close(latents_BND, attended, rest), None
        num_condition = condition_BCD.shape[1]
        condition_BCD = self.condition_stream.close(
            condition_BCD, attended[:, :num_condition], condition_rest
        )
        return self.latent_stream.close(
            latents_BND, attended[:, num_condition:], rest
        ), condition_BCD


class SingleBlock(nn.Module):
    """FLUX's single-stream block: attention and MLP side by side on the joint sequence (B, L, D)."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.modulation = nn.Linear(width, 3 * width)
        self.linear_in = FusedLinear(width, (width, width, width, 4 * width))
        self.q_norm = nn.RMSNorm(width // num_heads, eps=EPS)
        self.k_norm = nn.RMSNorm(width // num_heads, eps=EPS)
        self.linear_out = TokenLinear(5 * width, width)

    def forward(self, joint_BLD, time_BD, cos_LF, sin_LF, shown_BL=None):
        shift, scale, gate = self.modulation(time_BD).chunk(3, dim=-1)
        *widths, mlp = self.linear_in.parts
        joined = self.linear_in(norm_modulate(joint_BLD, shift, scale, eps=EPS))
        qkv, hidden = joined.split((sum(widths), mlp), dim=-1)
        q, k, v = qk_norm_rope(
            qkv.unflatten(-1, (3, self.num_heads, -1)),
            self.q_norm.weight,
            self.k_norm.weight,
            cos_LF,
            sin_LF,
            eps=EPS,
        )
        both = torch.cat((attend(q, k, v, shown_BL), F.gelu(hidden, approximate="tanh")), dim=-1)
        return gate_residual(joint_BLD, gate, self.linear_out(both))


@lru_cache(maxsize=64)
# A table first made while sampling is used in training too, where autograd saves it.
@torch.inference_mode(False)
def grid_tables(grid, axes, theta, device, dtype):
    """Cosines and sines (N, E / 2) of the latent tokens at (0, row, column). 0.5 MB at 1024 tokens of 128."""
    return rope_tables(grid_positions(0, *grid), axes, theta, device, dtype)


class MMDiT(nn.Module):
    """(noisy_BNK, t_B in [0, 1], condition_BCD, grid (rows, columns)) -> velocity_BNK = noise - image.

    lengths_B, for ragged conditions only: how many of a sample's C tokens are its own; the others are never read.
    tap: block, counted from 1 (single-stream blocks go on counting), whose latents are returned too; 0: none.
    """

    # Each gathered whole under ZeRO-3 and compiled as one graph.
    block_classes = (DualBlock, SingleBlock)

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.config = config
        self.latents_in = nn.Linear(config.token_dim, width)
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
        # Scale first, then shift: diffusers' order.
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, config.token_dim)

    def forward(self, noisy_BNK, t_B, condition_BCD, grid, lengths_B=None, tap=0):
        num_condition, (rows, columns) = condition_BCD.shape[1], grid
        assert noisy_BNK.shape[1] == rows * columns, (
            f"{noisy_BNK.shape[1]} latent tokens do not fill a grid of {rows} x {columns}"
        )
        latents, condition = self.latents_in(noisy_BNK), self.condition_in(condition_BCD)
        time_BD = F.silu(self.time_in(t_B))
        cos, sin = grid_tables(
            (rows, columns),
            self.config.rope_axes,
            self.config.rope_theta,
            latents.device,
            at_least_float32(latents[:0]).dtype,
        )
        shown_BL = None
        if lengths_B is not None:
            shown_BL = F.pad(
                torch.arange(num_condition, device=lengths_B.device) < lengths_B[:, None],
                (0, rows * columns),
                value=True,
            )
        tapped_BND = None
        for number, block in enumerate(self.blocks, 1):
            latents, condition = block(latents, condition, time_BD, cos, sin, shown_BL)
            if number == tap:
                tapped_BND = latents
        if self.single_blocks:
            joint = torch.cat((condition, latents), dim=1)
            cos, sin = (
                F.pad(cos, (0, 0, num_condition, 0), value=1.0),
                F.pad(sin, (0, 0, num_condition, 0)),
            )
            for number, block in enumerate(self.single_blocks, len(self.blocks) + 1):
                joint = block(joint, time_BD, cos, sin, shown_BL)
                if number == tap:
                    tapped_BND = joint[:, num_condition:]
            latents = joint[:, num_condition:]
        scale, shift = self.final_modulation(time_BD).chunk(2, dim=-1)
        velocity_BNK = self.final(norm_modulate(latents, shift, scale, eps=EPS))
        return (velocity_BNK, tapped_BND) if tap else velocity_BNK

    def init_weights(self, seed):
        """Fresh weights, a function of the seed; every block starts as the identity, the velocity as 0 (adaLN-zero)."""
        init_weights(self, seed)

    def flops_per_image(self, grid, num_condition):
        """Forward FLOPs of one image: 2 m n k of every matrix product, nothing else."""
        num_latents, width = grid[0] * grid[1], self.config.width
        num_joint = num_latents + num_condition
        total = linear_flops(self.time_in, 1) + linear_flops(self.final_modulation, 1)
        total += linear_flops(self.condition_in, num_condition)
        total += linear_flops(self.latents_in, num_latents) + linear_flops(self.final, num_latents)
        for block in self.blocks:
            for stream, num_tokens in (
                (block.latent_stream, num_latents),
                (block.condition_stream, num_condition),
            ):
                total += linear_flops(stream, num_tokens) - linear_flops(
                    stream.modulation, num_tokens - 1
                )
            total += attention_flops(num_latents if block.last else num_joint, num_joint, width)
        for block in self.single_blocks:
            total += linear_flops(block, num_joint) - linear_flops(block.modulation, num_joint - 1)
            total += attention_flops(num_joint, num_joint, width)
        return total
