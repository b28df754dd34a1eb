"""Where Triton kernels can run, and the dispatch options of their backends.

Without a GPU, `TRITON_INTERPRET=1` set before Python starts runs the kernels on CPU tensors. This
is meant for tests and is thousands of times slower. The interpreter is correct in float32 and
float16. Its bf16 products are garbage (Triton 3.7.1), so bf16 runs only on GPUs.

Tile sizes are tables in the kernels' files, and the first entry is used. Triton's autotuner
chooses by timing, so two runs of one config could sum in different orders and differ in their
bits. `benchmarks/ops.py --gpu` times the candidates.
"""

import importlib.metadata
import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
# float32 is excluded on GPUs because attention and two of the row kernels spill in it, and GPU
# training does not use it.
DTYPES = (torch.float32,) if INTERPRETED else (torch.bfloat16, torch.float16)

# Why these backends are not preferred; see dispatch.py.
NOTE = "not timed on a GPU yet"


def why_not() -> str | None:
    """Return why the Triton backends cannot run on this machine, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if (
        not INTERPRETED
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() < (8, 0)
    ):
        return "needs compute capability 8.0 (A100) or later"
    return None


def power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least max(n, 1)."""
    return 1 << max(0, n - 1).bit_length()


def warps_for(width: int) -> int:
    """Return the warps of a program that holds a row of `width` values, 1 to 16.

    Each thread holds 8 values. With 16 values per thread, Triton 3.9 spilled in the backward pass
    of a simpler op of this kind on sm_90 (3.7 did not).
    """
    return min(16, max(1, power_of_2(width) // 256))


def version() -> str | None:
    """Return Triton's version, or None if it is not installed."""
    return (
        None if importlib.util.find_spec("triton") is None else importlib.metadata.version("triton")
    )
