"""Rows of each tile of a ragged batch, and the candidate tile sizes of each kernel.

Sample b owns the slots offsets[b] // BLOCK + b to offsets[b + 1] // BLOCK + b, both included.
This is never fewer than its number of tiles. A grid of rows // BLOCK + samples + 1 slots
therefore covers every batch, and the host does not need to know the lengths. The program of an
excess slot returns at once. Rows after offsets[B] form one more sample, which has no keys.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Tile:
    """Tile size of an attention kernel."""

    # Rows of the operand that a program owns.
    own: int
    # Rows per step of the operand that a program loops over.
    walk: int
    warps: int
    # Pipeline stages.
    stages: int


# (minimum compute capability, kernel, head dim) -> candidates, the default first. They are chosen
# so that nothing spills in bf16. On sm_80 every 128 x 64 tile of head dim 128 spills. Shared
# memory stays below the 163 KB that a block has there (227 KB on sm_90).
# tests/kernels/test_triton_compiles.py checks both. Speed has not been measured yet.
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


def tile_for(kernel: str, head_dim: int, device: torch.device) -> Tile:
    """Return the tile of a kernel ("forward", "queries" or "keys") on a device."""
    if device.type != "cuda":
        return INTERPRETED_TILE
    newer = torch.cuda.get_device_capability(device) >= (9, 0)
    return CANDIDATES[90 if newer else 80, kernel, head_dim][0]


def num_slots(num_rows: int, num_samples: int, block: int) -> int:
    """Return the number of slots that cover all packed rows, with or without a sample."""
    return num_rows // block + num_samples + 1


@triton.jit
def tile_bounds(slot, offsets, num_samples, num_rows, BLOCK: tl.constexpr, SAMPLES: tl.constexpr):
    """Return (sample, first row of the sample, first row of the tile, end of the sample).

    SAMPLES is a power of 2 above num_samples.
    """
    b = tl.arange(0, SAMPLES)
    starts = tl.load(offsets + b, mask=b <= num_samples, other=0)
    started = (b <= num_samples) & (starts // BLOCK + b <= slot)
    sample = tl.sum(started.to(tl.int32), axis=0) - 1
    start = tl.load(offsets + sample)
    end = tl.load(offsets + sample + 1, mask=sample < num_samples, other=num_rows)
    return sample, start, start + (slot - start // BLOCK - sample) * BLOCK, end


@triton.jit
def segment_bounds(offsets, sample, num_samples):
    """Return (first, end) of a sample in the other tensor.

    The segment is empty for rows that belong to no sample.
    """
    valid = sample < num_samples
    return tl.load(offsets + sample, mask=valid, other=0), tl.load(
        offsets + sample + 1, mask=valid, other=0
    )


@triton.jit
def load_tile(pointer, rows, end, head, HEADS: tl.constexpr, E: tl.constexpr):
    """Load rows of one head of a (rows, HEADS, E) tensor. Rows from `end` on are zeros."""
    e = tl.arange(0, E)
    index = (rows.to(tl.int64)[:, None] * HEADS + head) * E + e[None, :]
    return tl.load(pointer + index, mask=(rows < end)[:, None], other=0.0)


@triton.jit
def store_tile(pointer, value, rows, end, head, HEADS: tl.constexpr, E: tl.constexpr):
    """Store rows of one head, cast to the tensor's dtype. Rows from `end` on are not written."""
    e = tl.arange(0, E)
    index = (rows.to(tl.int64)[:, None] * HEADS + head) * E + e[None, :]
    tl.store(pointer + index, value.to(pointer.dtype.element_ty), mask=(rows < end)[:, None])
