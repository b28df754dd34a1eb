"""Parts that both generators are made of: linears, rotary tables, time embedding, attention, fresh weights."""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn

from iomm.kernels.fp8_linear import MULTIPLE, fp8_linear
from iomm.kernels.masked_attention.sdpa import dense_attention

# Names of linears: blocks start closed, velocity at 0
ZERO_AT_START = ("modulation", "final_modulation", "final")


class TokenLinear(nn.Linear):
    """Linear on every token of a block, which is where a generator's work is: (..., in) -> (..., out).

    `fp8`: forward and backward products take their sides in fp8. Linears on one row a sample (times) or at either end of
    the generator stay nn.Linear: they cost nothing, and what they round the whole model sees.
    """

    fp8 = False

    def forward(self, x):
        return fp8_linear(x, self.weight, self.bias) if self.fp8 else super().forward(x)


def use_fp8(model):
    """Turns fp8 on in every TokenLinear whose sizes its products can have."""
    for part in model.modules():
        if isinstance(part, TokenLinear):
            part.fp8 = part.in_features % MULTIPLE == 0 and part.out_features % MULTIPLE == 0


class FusedLinear(TokenLinear):
    """Linear (..., in) -> (..., sum(parts)): several matrices of one input as one product.

    `parts` are the output sizes. Fresh weights and exports treat each part as a matrix of its own.
    """

    def __init__(self, in_features, parts, bias=True):
        super().__init__(in_features, sum(parts), bias=bias)
        self.parts = tuple(parts)


def at_least_float32(x):
    """`x` in float32, or in float64 if it comes so: half types lose too much in sines, norms and sums."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sinusoids(t_B, num_features):
    """Times (B,), unitless -> (B, num_features): cosines, then sines, of t times frequencies from 1 to 1/10000.

    FLUX's and Z-Image's features. The frequencies are float32 as theirs are, the rest at least float32.
    """
    half = num_features // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
    angles_BF = at_least_float32(t_B)[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat((angles_BF.cos(), angles_BF.sin()), dim=-1)


class TimeEmbedding(nn.Module):
    """Times (B,) in [0, 1] -> vectors (B, width_out): 256 sinusoids of 1000 t, linear, SiLU, linear.

    t is scaled and turned into sinusoids in float32 even in a bf16 model, where t alone would be off by up to
    0.2 % (diffusers rounds it; the difference is gone in float32).
    """

    num_features = 256

    def __init__(self, width_hidden, width_out):
        super().__init__()
        self.linear_in = nn.Linear(self.num_features, width_hidden)
        self.linear_out = nn.Linear(width_hidden, width_out)

    def forward(self, t_B):
        features = sinusoids(at_least_float32(t_B) * 1000, self.num_features)
        return self.linear_out(F.silu(self.linear_in(features.to(self.linear_in.weight.dtype))))


def rope_tables(positions_LX, axes, theta, device, dtype):
    """Integer positions (L, axes) -> cosines, sines (L, E / 2); axis a turns axes[a] / 2 pairs. RoPE, arXiv 2104.09864.

    The angles are float64 and only the results are rounded to `dtype`.
    """
    angles_LF = torch.cat(
        [
            positions_LX[:, axis, None]
            * theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            for axis, dim in enumerate(axes)
        ],
        dim=1,
    )
    return angles_LF.cos().to(device, dtype), angles_LF.sin().to(device, dtype)


def grid_positions(index, rows, columns):
    """(N, 3) positions (index, row, column) of a grid of latent tokens, rows first."""
    return torch.cartesian_prod(torch.tensor([index]), torch.arange(rows), torch.arange(columns))


def attend(q_BLAE, k_BLAE, v_BLAE, shown_BL=None):
    """Softmax attention, (B, L, A, E) -> (B, L, D). `shown_BL`: bool, keys that may be seen; None, the rule, for all.

    A mask is for ragged conditions only.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLAE, k_BLAE, v_BLAE))
    heads_BALE = dense_attention(q, k, v, None if shown_BL is None else shown_BL[:, None, None])
    return heads_BALE.transpose(1, 2).flatten(2)


def gate_residual(x_BLD, gate_BD, y_BLD):
    """Return x + gate y (B, L, D): a branch joins the residual stream, by one gate per sample."""
    return x_BLD + gate_BD[:, None] * y_BLD


def generator_for(seed, name):
    """A CPU generator for the parameter `name`: its numbers depend on seed and name, not on any order or rank."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def init_weights(model, seed):
    """Sets every linear and norm: Xavier-uniform matrices, zero biases, unit norm scales; ZERO_AT_START all zero.

    This is DiT's start (arXiv 2212.09748, section 3 "adaLN-Zero", and its released code), with the time embedding
    Xavier-uniform like the rest. Draws on the CPU in float32, so that the device and the dtype do not matter.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.RMSNorm) and module.weight is not None:
            module.weight.fill_(1.0)
        if not isinstance(module, nn.Linear):
            continue
        if module.bias is not None:
            module.bias.zero_()
        if name.split(".")[-1] in ZERO_AT_START:
            module.weight.zero_()
            continue
        random = generator_for(seed, name)
        for rows in module.weight.split(getattr(module, "parts", module.out_features)):
            bound = math.sqrt(6.0 / sum(rows.shape))
            rows.copy_(torch.empty(rows.shape).uniform_(-bound, bound, generator=random))
