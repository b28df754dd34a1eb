"""Random numbers as a pure function of (seed, stream, n), equal on all devices and ranks.

The generator is Philox4x32-10 with the counter words (block, stream, n low 32, n high 32) and the
key (seed low 32, seed high 32). Element e of sample n is lane e % 4 of block e // 4.

    uniform   (word >> 8) * 2^-24, in [0, 1)
    normal    Box-Muller on the word pairs (0, 1) and (2, 3) = (a, b): u1 = ((a >> 8) + 1) * 2^-24,
              u2 = (b >> 8) * 2^-24, r = sqrt(-2 ln u1); the even lane is r cos(2 pi u2), the odd
              one r sin(2 pi u2). u2 is reduced to an eighth of a turn exactly, so backends agree
              to 2 ulp. No value exceeds sqrt(48 ln 2) = 5.77.

`n` counts the samples of the run over all epochs and ranks. `stream` identifies the purpose of
the numbers.
"""

import math

import torch
from torch import Tensor

from iomm.kernels import native
from iomm.kernels.dispatch import pick, register

# Streams. Changing a number changes what every run draws.
MASK = 0
TIME = 1
NOISE = 2
FLIP = 3
CAPTION_DROP = 4
CROP = 5
ORDER = 6
SAMPLER = 7
VAE = 8
INIT = 9
SCENE = 10
EDIT = 11
PROMPT = 12
ROUTE = 13
LORA_DROPOUT = 14


def checked_seed(seed: int, n_B: Tensor) -> int:
    """Return the seed as a signed 64-bit int.

    Raises:
        ValueError: The seed is not in [0, 2^64), or `n_B` is not a vector of int64.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an int in [0, 2^64), got {seed!r}")
    if n_B.dtype != torch.int64 or n_B.dim() != 1:
        raise ValueError(
            f"n must be a one-dimensional int64 tensor, got {n_B.dtype} of shape {tuple(n_B.shape)}"
        )
    return seed - (seed >> 63 << 64)


def _draw(distribution: str, seed: int, stream: int, n_B: Tensor, count: int) -> Tensor:
    seed = checked_seed(seed, n_B)
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream must be in [0, 2^32), got {stream}")
    if not 0 <= count <= 2**34:
        raise ValueError(f"count must be in [0, 2^34], got {count}")
    return pick("philox", n_B.device)(distribution, seed, stream, n_B.contiguous(), count)


def uniform(seed: int, stream: int, n_B: Tensor, count: int) -> Tensor:
    """Return uniform float32 numbers (B, count) in [0, 1), on the device of `n_B`.

    Args:
        seed: Seed in [0, 2^64).
        stream: Stream in [0, 2^32), one of the constants above.
        n_B: Sample numbers, int64. Row b of the result belongs to sample n_B[b].
        count: Numbers per sample.

    Raises:
        ValueError: An argument is out of range or has a wrong shape or dtype.
    """
    return _draw("uniform", seed, stream, n_B, count)


def normal(seed: int, stream: int, n_B: Tensor, count: int) -> Tensor:
    """Return standard normal float32 numbers (B, count), on the device of `n_B`.

    Args:
        seed: Seed in [0, 2^64).
        stream: Stream in [0, 2^32), one of the constants above.
        n_B: Sample numbers, int64. Row b of the result belongs to sample n_B[b].
        count: Numbers per sample.

    Raises:
        ValueError: An argument is out of range or has a wrong shape or dtype.
    """
    return _draw("normal", seed, stream, n_B, count)


WORD = 0xFFFFFFFF


def philox_words(seed: int, stream: int, n_B: Tensor, num_blocks: int) -> Tensor:
    """Return the 32-bit words of blocks 0 .. num_blocks - 1 as int64 (B, num_blocks, 4)."""
    # A product of two words wraps at 2^64 and may become negative. Its halves are correct after
    # masking.
    block = torch.arange(num_blocks, device=n_B.device).expand(len(n_B), num_blocks)
    n = n_B[:, None].expand_as(block)
    c0, c1, c2, c3 = block, torch.full_like(block, stream), n & WORD, (n >> 32) & WORD
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & WORD) ^ c1 ^ k0,
            p1 & WORD,
            ((p0 >> 32) & WORD) ^ c3 ^ k1,
            p0 & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def normal_from_words(words: Tensor) -> Tensor:
    """Return the Box-Muller transform over the last axis (a, b, a, b).

    Computed in float64 and rounded to float32.
    """
    a, turn = words[..., 0::2] >> 8, words[..., 1::2] >> 8
    radius = torch.sqrt(-2 * torch.log((a + 1).double() * 2.0**-24))
    quarter = (turn + 2**21) >> 22
    angle = (turn - (quarter << 22)).double() * (2 * math.pi * 2.0**-24)
    sine, cosine = torch.sin(angle), torch.cos(angle)
    odd_quarter = quarter % 2 == 1
    c, s = torch.where(odd_quarter, sine, cosine), torch.where(odd_quarter, cosine, sine)
    c, s = torch.where((quarter + 1) & 2 == 2, -c, c), torch.where(quarter & 2 == 2, -s, s)
    return torch.stack((radius * c, radius * s), dim=-1).flatten(-2).float()


def philox_reference(distribution: str, seed: int, stream: int, n_B: Tensor, count: int) -> Tensor:
    """Return float32 numbers (B, count) as defined by `uniform` or `normal`.

    Args:
        distribution: "uniform" or "normal".
        seed: Signed or unsigned 64-bit seed.
        stream: Stream in [0, 2^32).
        n_B: Sample numbers, int64.
        count: Numbers per sample.
    """
    words = philox_words(seed, stream, n_B, -(-count // 4))
    values = (
        (words >> 8).float() * 2.0**-24 if distribution == "uniform" else normal_from_words(words)
    )
    return values.flatten(1)[:, :count].contiguous()


@torch.library.custom_op("iomm::philox", mutates_args=(), device_types=("cpu", "cuda"))
def philox_compiled(distribution: str, seed: int, stream: int, n_B: Tensor, count: int) -> Tensor:
    """Return float32 numbers (B, count) from the C++ or CUDA library, chosen by the device."""
    out = torch.empty(len(n_B), count, dtype=torch.float32, device=n_B.device)
    native.launch(
        n_B.device, f"iomm_philox_{distribution}", seed, stream, n_B, len(n_B), count, out
    )
    return out


@philox_compiled.register_fake
def _(distribution: str, seed: int, stream: int, n_B: Tensor, count: int) -> Tensor:
    return n_B.new_empty(n_B.shape[0], count, dtype=torch.float32)


register("philox", "cpp", philox_compiled, devices=("cpu",), why_not=lambda: native.why_not("cpu"))
register(
    "philox", "cuda", philox_compiled, devices=("cuda",), why_not=lambda: native.why_not("cuda")
)
register("philox", "reference", philox_reference)
