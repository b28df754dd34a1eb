"""Layers that both generators share.

Linear layers, rotary tables, time embedding, attention and weight initialization.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iomm.kernels.fp8_linear import MULTIPLE, RoundedWeight, fp8_linear, round_weight
from iomm.kernels.masked_attention.sdpa import dense_attention

# Linear layers that start at zero. Blocks then start as the identity and the velocity as 0.
ZERO_AT_START = ("modulation", "final_modulation", "final")


class TokenLinear(nn.Linear):
    """Linear layer applied to every token of a block: (..., in) -> (..., out).

    These layers do most of a generator's work. With `fp8`, the forward and backward products take
    fp8 operands. Linear layers on one row per sample (times) and at either end of the generator
    stay nn.Linear: they are cheap, and their rounding errors would affect the whole model.
    """

    fp8 = False

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.bias) if self.fp8 else super().forward(x)


def use_fp8(model: nn.Module) -> None:
    """Turn on fp8 in every TokenLinear whose sizes fp8 products support."""
    for part in model.modules():
        if isinstance(part, TokenLinear):
            part.fp8 = part.in_features % MULTIPLE == 0 and part.out_features % MULTIPLE == 0


class RoundedLinear(nn.Module):
    """A frozen linear layer whose weight is rounded to fp8 once: (..., in) -> (..., out).

    Args:
        linear: the layer to replace.
        backward: whether inputs need gradients, which takes a second copy of the fp8 weight.
    """

    def __init__(self, linear: nn.Linear, *, backward: bool):
        super().__init__()
        for name, value in round_weight(linear.weight, backward=backward)._asdict().items():
            self.register_buffer(name, value)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = RoundedWeight(self.values_OI, self.values_IO, self.scale)
        return fp8_linear(x, weight, self.bias)


@torch.no_grad()
def round_linears(model: nn.Module, *, backward: bool) -> None:
    """Replace every nn.Linear whose sizes fp8 products support by a RoundedLinear."""
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if type(part) is nn.Linear and not any(n % MULTIPLE for n in part.weight.shape):
                setattr(parent, name, RoundedLinear(part, backward=backward))


class FusedLinear(TokenLinear):
    """Several linear layers with the same input, computed as one product.

    It maps (..., in) to (..., sum(parts)). `parts` are the output sizes. Initialization and exports
    treat each part as a separate matrix.
    """

    def __init__(self, in_features: int, parts: Sequence[int], bias: bool = True):
        super().__init__(in_features, sum(parts), bias=bias)
        self.parts = tuple(parts)


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in float32, or unchanged in float64.

    16-bit types lose too much precision in sines, norms and sums.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sinusoids(t_B: Tensor, num_features: int) -> Tensor:
    """Return the features (B, num_features) of unitless times (B,): cosines, then sines.

    The arguments are t times frequencies from 1 to 1/10000, as in FLUX and Z-Image. The frequencies
    are float32, as theirs are; everything else is at least float32.
    """
    half = num_features // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
    angles_BF = at_least_float32(t_B)[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat((angles_BF.cos(), angles_BF.sin()), dim=-1)


class TimeEmbedding(nn.Module):
    """Embed times (B,) in [0, 1] as vectors (B, width_out).

    The layers are 256 sinusoids of 1000 t, linear, SiLU, linear. t is scaled and turned into
    sinusoids in float32 even in a bf16 model, where rounding t would change it by up to 0.2 %.
    diffusers rounds it; in float32 both agree.
    """

    num_features = 256

    def __init__(self, width_hidden: int, width_out: int):
        super().__init__()
        self.linear_in = nn.Linear(self.num_features, width_hidden)
        self.linear_out = nn.Linear(width_hidden, width_out)

    def forward(self, t_B: Tensor) -> Tensor:
        features = sinusoids(at_least_float32(t_B) * 1000, self.num_features)
        return self.linear_out(F.silu(self.linear_in(features.to(self.linear_in.weight.dtype))))


def rope_tables(
    positions_LX: Tensor,
    axes: Sequence[int],
    theta: float,
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return rotary cosines and sines (L, E / 2) of integer positions.

    Source: RoPE, arXiv 2104.09864. The angles are float64; only the results are rounded to `dtype`.

    Args:
        positions_LX: positions (L, number of axes).
        axes: head dims per axis. Axis a rotates axes[a] / 2 pairs.
        theta: base of the frequencies.
        device: device of the results.
        dtype: dtype of the results.
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


def grid_positions(index: int, rows: int, columns: int) -> Tensor:
    """Return the positions (index, row, column) of a row-major grid of latent tokens: (N, 3)."""
    return torch.cartesian_prod(torch.tensor([index]), torch.arange(rows), torch.arange(columns))


def attend(
    q_BLAE: Tensor, k_BLAE: Tensor, v_BLAE: Tensor, key_mask_BL: Tensor | None = None
) -> Tensor:
    """Return softmax attention (B, L, D) of q, k and v (B, L, A, E).

    It is sequence-first in memory if q is and PyTorch's kernel keeps the layout of q, as cuDNN's
    and FlashAttention do. `key_mask_BL` is True for keys that may be attended to. Only ragged
    conditions need it.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BLAE, k_BLAE, v_BLAE))
    mask = None if key_mask_BL is None else key_mask_BL[:, None, None]
    heads_BALE = dense_attention(q, k, v, mask)
    return heads_BALE.transpose(1, 2).flatten(2)


def project_parts(attended_BLD: Tensor, parts: Sequence[tuple[TokenLinear, int]]) -> list[Tensor]:
    """Apply a linear layer to each of the consecutive parts of a sequence.

    If `attended_BLD` is sequence-first in memory (L, B, D), as `attend` returns it on a GPU, a part
    is the rows of one matrix and nothing is copied. Slices of a batch-first tensor are no matrix,
    so their rows are copied. The gradient of a split is one concatenation, whose pieces
    torch.compile computes in place; that of slices would be sums of padded copies.

    Args:
        attended_BLD: the sequence.
        parts: (layer, number of tokens) of each part.
    """
    layers, lengths = zip(*parts, strict=True)
    if attended_BLD.stride(0) > attended_BLD.stride(1):
        split = attended_BLD.split(lengths, dim=1)
        return [layer(part_BLD) for layer, part_BLD in zip(layers, split, strict=True)]
    batch = attended_BLD.shape[0]
    rows_XD = attended_BLD.transpose(0, 1).flatten(0, 1)
    split = rows_XD.split([length * batch for length in lengths])
    return [
        layer(part_XD).unflatten(0, (-1, batch)).transpose(0, 1)
        for layer, part_XD in zip(layers, split, strict=True)
    ]


def gate_residual(x_BLD: Tensor, gate_BD: Tensor, y_BLD: Tensor) -> Tensor:
    """Add a branch to the residual stream: x + gate y (B, L, D), with one gate per sample."""
    return x_BLD + gate_BD[:, None] * y_BLD


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a CPU random generator for the parameter `name`.

    Its numbers depend on seed and name, not on the order of initialization or the rank.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Initialize every linear layer and RMS norm of `model` from `seed`.

    Matrices are Xavier-uniform, biases zero, norm scales one, and ZERO_AT_START layers all zero.
    This is DiT's initialization (arXiv 2212.09748, section 3 "adaLN-Zero", and its released code),
    except that the time embedding is Xavier-uniform like the rest. Numbers are drawn on the CPU in
    float32, so the result does not depend on the device, and on the dtype only by rounding.
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
