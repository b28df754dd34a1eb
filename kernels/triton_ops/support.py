"""Whether Triton kernels can run here, and how an op is told about it.

Without a GPU `TRITON_INTERPRET=1`, set before Python starts, runs them on CPU tensors: for tests, thousands of times
slower. Right in float32 and float16; its bf16 products are garbage (Triton 3.7.1), so bf16 is for GPUs alone.

Tile sizes are tables in the kernels' files, the first entry is used: Triton's own autotuner picks by timing, so two
runs of one config could add in another order and differ in their bits. `benchmarks/ops.py --gpu` times the candidates.
"""

import importlib.metadata
import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
# Halves alone: in float32 attention and two of the row kernels spill, and nobody trains in it on a GPU.
DTYPES = (torch.float32,) if INTERPRETED else (torch.bfloat16, torch.float16)

# Why these bodies are not first; see dispatch.py.
NOTE = "not timed on a GPU yet"


def why_not():
    """Why Triton's bodies cannot run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if (
        not INTERPRETED
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() < (8, 0)
    ):
        return "needs compute capability 8.0 (A100) or later"
    return None


def power_of_2(n):
    """The least power of 2 that is at least n and 1."""
    return 1 << max(0, n - 1).bit_length()


def warps_for(width):
    """Warps of a program that holds a row of `width` values: 8 values a thread, one warp at least, 16 at most.

    With 16 a thread, Triton 3.9 spilled in the backward pass of a simpler op of this kind on sm_90 (3.7 did not).
    """
    return min(16, max(1, power_of_2(width) // 256))


def version():
    """Triton's version, or None where it is not installed."""
    return (
        None if importlib.util.find_spec("triton") is None else importlib.metadata.version("triton")
    )
