"""Row layouts of a batch for the library backends, computed on the host and cached."""

from collections.abc import Callable, Hashable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_recent = []


def cached_layout(
    make: Callable[..., Any], offsets: Tensor, prefix_offsets: Tensor | None, *key: Hashable
) -> Any:
    """Return make(offsets, prefix_offsets, *key), cached for the last four batches.

    Computing a layout waits for the GPU, and all layers of a model need the same one.

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


def sample_lengths(name: str, offsets: Tensor, num_rows: int | None = None) -> list[int]:
    """Return the lengths of the samples.

    Raises:
        ValueError: Offsets do not start at 0, decrease, or exceed `num_rows`.
    """
    bounds = offsets.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if bounds[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"{name} must start at 0 and never decrease, got {bounds}")
    if num_rows is not None and bounds[-1] > num_rows:
        raise ValueError(f"{name} end at {bounds[-1]}, but there are only {num_rows} rows")
    return lengths


def target_rows(
    lengths: list[int], strides: Tensor, first: Tensor | int, device: torch.device
) -> Tensor:
    """Return the row of each packed token if sample b starts at strides[b] + first[b].

    Args:
        lengths: Lengths of the samples.
        strides: First row of each sample's slots.
        first: First slot within the sample, per sample or one for all.
        device: Device of the result.
    """
    sample = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64)
    )
    starts = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    base = torch.as_tensor(strides).expand(len(lengths)) + torch.as_tensor(first)
    return (base[sample] + torch.arange(len(sample)) - starts[sample]).to(device)
