"""How a tile of a ragged batch finds its rows, and which tile sizes each kernel may have.

Sample b owns the slots offsets[b] // BLOCK + b up to offsets[b + 1] // BLOCK + b, the last one included: never fewer
than its tiles. So a grid of rows // BLOCK + samples + 1 slots covers every batch, and the host need not know the
lengths. A slot too many ends at once. What lies behind offsets[B] is one more sample, which has no keys.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Tile:
    """Rows of the operand that a program owns, rows of the one that it walks over, warps, pipeline stages."""

    own: int
    walk: int
    warps: int
    stages: int


# (compute capability from, kernel, head dim) -> candidates, the default first. Chosen so that nothing spills in bf16;
# on sm_80 every 128 x 64 tile of head dim 128 does. Shared memory stays below the
# 163 KB that a block has there (227 KB on sm_90). tests/kernels/test_triton_compiles.py holds both. Speed is not measured yet.
CANDIDATES = {
    (80, "forward", 32): [Tile(64, 64, 4, 3), Tile(128, 64, 4, 3)],
    (80, "forward", 64): [Tile(64, 64, 4, 3), Tile(128, 64, 8, 2)],
    (80, "forward", 128): [Tile(128, 32, 8, 3), Tile(64, 32, 4, 3), Tile(64, 64, 8, 3)],
    (80, "queries", 32): [Tile(64, 64, 4, 2)],
    (80, "queries", 64): [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)],
    (80, "queries", 128): [Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)],
    (80, "keys", 32): [Tile(64, 32, 4, 2)],
    (80, "keys", 64): [Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)],
    (80, "keys", 128): [Tile(64, 32, 8, 2)],
    (90, "forward", 32): [Tile(64, 64, 4, 3), Tile(128, 64, 4, 3)],
    (90, "forward", 64): [Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 128, 8, 2)],
    (90, "forward", 128): [Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)],
    (90, "queries", 32): [Tile(64, 64, 4, 2)],
    (90, "queries", 64): [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)],
    (90, "queries", 128): [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)],
    (90, "keys", 32): [Tile(64, 64, 4, 2)],
    (90, "keys", 64): [Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)],
    (90, "keys", 128): [Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(128, 32, 8, 2)],
}
INTERPRETED_TILE = Tile(64, 32, 4, 1)


def tile_for(kernel, head_dim, device):
    """The tile of a kernel ("forward", "queries" or "keys") on this torch.device."""
    if device.type != "cuda":
        return INTERPRETED_TILE
    newer = torch.cuda.get_device_capability(device) >= (9, 0)
    return CANDIDATES[90 if newer else 80, kernel, head_dim][0]


def num_slots(num_rows, num_samples, block):
    """Slots that cover `num_rows` packed rows of `num_samples` samples, and the rows behind them."""
    return num_rows // block + num_samples + 1


@triton.jit
def tile_of(slot, offsets, num_samples, num_rows, BLOCK: tl.constexpr, SAMPLES: tl.constexpr):
    """(sample, its first row, the tile's first row, the sample's end). SAMPLES: a power of 2 above num_samples."""
    b = tl.arange(0, SAMPLES)
    starts = tl.load(offsets + b, mask=b <= num_samples, other=0)
    mine = (b <= num_samples) & (starts // BLOCK + b <= slot)
    sample = tl.sum(mine.to(tl.int32), axis=0) - 1
    start = tl.load(offsets + sample)
    end = tl.load(offsets + sample + 1, mask=sample < num_samples, other=num_rows)
    return sample, start, start + (slot - start // BLOCK - sample) * BLOCK, end


@triton.jit
def rows_of(offsets, sample, num_samples):
    """(first, end) of a sample in the other tensor; empty for the rows that belong to no sample."""
    real = sample < num_samples
    return tl.load(offsets + sample, mask=real, other=0), tl.load(
        offsets + sample + 1, mask=real, other=0
    )


@triton.jit
def load_tile(pointer, rows, end, head, HEADS: tl.constexpr, E: tl.constexpr):
    """Rows of one head of a (rows, HEADS, E) tensor, zeros from `end` on."""
    e = tl.arange(0, E)
    places = (rows.to(tl.int64)[:, None] * HEADS + head) * E + e[None, :]
    return tl.load(pointer + places, mask=(rows < end)[:, None], other=0.0)


@triton.jit
def store_tile(pointer, value, rows, end, head, HEADS: tl.constexpr, E: tl.constexpr):
    """The inverse of `load_tile`, cast to the tensor's type."""
    e = tl.arange(0, E)
    places = (rows.to(tl.int64)[:, None] * HEADS + head) * E + e[None, :]
    tl.store(pointer + places, value.to(pointer.dtype.element_ty), mask=(rows < end)[:, None])
