"""Random numbers that are a pure function of (seed, stream, n): the same on every device and rank.

Philox4x32-10 with counter words (block, stream, n low 32, n high 32) and key (seed low 32, seed high 32). Element e of
sample n is lane e % 4 of block e // 4.

    uniform   (word >> 8) * 2^-24, in [0, 1)
    normal    Box-Muller on the word pairs (0, 1) and (2, 3) = (a, b): u1 = ((a >> 8) + 1) * 2^-24,
              u2 = (b >> 8) * 2^-24, r = sqrt(-2 ln u1); the even lane is r cos(2 pi u2), the odd one r sin(2 pi u2).
              u2 is reduced to an eighth of a turn exactly, so that bodies agree to 2 ulp. No value exceeds
              sqrt(48 ln 2) = 5.77.

`n` counts the samples of the run over all epochs and ranks; `stream` says what the numbers are for.
"""

import torch

from iomm.kernels import native
from iomm.kernels.dispatch import pick, register
from iomm.kernels.philox.compiled import philox_compiled
from iomm.kernels.philox.reference import philox_reference

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
WORLD = 10
EDIT = 11

register("philox", "cpp", philox_compiled, devices=("cpu",), why_not=lambda: native.why_not("cpu"))
register("philox", "cuda", philox_compiled, devices=("cuda",), why_not=lambda: native.why_not("cuda"))
register("philox", "reference", philox_reference)


def checked_seed(seed, n_B):
    """The seed as signed 64-bit int. Raises ValueError unless it is in [0, 2^64) and `n_B` a vector of int64."""
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an int in [0, 2^64), got {seed!r}")
    if n_B.dtype != torch.int64 or n_B.dim() != 1:
        raise ValueError(f"n must be a one-dimensional int64 tensor, got {n_B.dtype} of shape {tuple(n_B.shape)}")
    return seed - (seed >> 63 << 64)


def _draw(distribution, seed, stream, n_B, count):
    seed = checked_seed(seed, n_B)
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream must be in [0, 2^32), got {stream}")
    if not 0 <= count <= 2**34:
        raise ValueError(f"count must be in [0, 2^34], got {count}")
    return pick("philox", n_B.device)(distribution, seed, stream, n_B.contiguous(), count)


def uniform(seed, stream, n_B, count):
    """(B, count) float32 in [0, 1), on the device of `n_B` (B,) int64: row b belongs to sample n_B[b].

    Raises ValueError on bad input."""
    return _draw("uniform", seed, stream, n_B, count)


def normal(seed, stream, n_B, count):
    """(B, count) float32, standard normal, on the device of `n_B` (B,) int64: row b belongs to sample n_B[b].

    Raises ValueError on bad input."""
    return _draw("normal", seed, stream, n_B, count)
