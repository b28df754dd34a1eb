"""Row layouts of a batch for the library backends, cached.

Sizes come from lengths that the host knows, so nothing is read from the GPU; rows are computed on
the device of the offsets. Without host lengths the offsets are read, which waits for the GPU.
"""

from collections.abc import Callable, Hashable
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

# Lengths of the samples, or None to read them from the offsets.
Lengths = tuple[int, ...] | None

_recent = []


def cached_layout(
    make: Callable[..., Any], offsets: Tensor, prefix_offsets: Tensor | None, *key: Hashable
) -> Any:
    """Return make(offsets, prefix_offsets, *key), cached for the last four batches.

    All layers of a model need the same layout.

    Args:
        make: Computes the layout.
        offsets: Offsets of the samples.
        prefix_offsets: Offsets of the prefixes, or None.
        *key: Further arguments of `make`.
    """
    if any(x is not None and x.is_inference() for x in (offsets, prefix_offsets)):
        # Inference tensors have no version counter, so changes to them cannot be detected.
        return make(offsets, prefix_offsets, *key)
    key = (
        make,
        offsets._version,
        None if prefix_offsets is None else prefix_offsets._version,
        *key,
    )
    for known_offsets, known_prefix, known_key, layout in _recent:
        if known_offsets is offsets and known_prefix is prefix_offsets and known_key == key:
            return layout
    layout = make(offsets, prefix_offsets, *key[3:])
    _recent.insert(0, (offsets, prefix_offsets, key, layout))
    del _recent[4:]
    return layout


def sample_lengths(
    name: str, offsets: Tensor, num_rows: int | None = None, lengths: Lengths = None
) -> tuple[int, ...]:
    """Return the lengths of the samples, read from the offsets unless they are given.

    Raises:
        ValueError: Offsets do not start at 0, decrease, or exceed `num_rows`, or given lengths
            contradict them. The latter is only checked on a CPU, where reading is free.
    """
    given = lengths is not None and offsets.device.type != "cpu"
    bounds = [0, *accumulate(lengths)] if given else offsets.tolist()
    found = tuple(stop - start for start, stop in pairwise(bounds))
    if bounds[0] != 0 or min(found, default=0) < 0:
        raise ValueError(f"{name} must start at 0 and never decrease, got {bounds}")
    if lengths is not None and found != tuple(lengths):
        raise ValueError(f"lengths of {name} must be {found}, got {tuple(lengths)}")
    if num_rows is not None and bounds[-1] > num_rows:
        raise ValueError(f"{name} end at {bounds[-1]}, but there are only {num_rows} rows")
    return found


def target_rows(offsets: Tensor, total: int, first_B: Tensor) -> Tensor:
    """Return the row of each of `total` packed tokens if sample b starts at row first_B[b]."""
    starts_B = offsets[:-1].long()
    sample = torch.repeat_interleave(
        torch.arange(len(starts_B), device=offsets.device), offsets.diff(), output_size=total
    )
    return (first_B - starts_B)[sample] + torch.arange(total, device=offsets.device)
