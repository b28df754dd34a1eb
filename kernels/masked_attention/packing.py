"""What the library bodies must know about a batch on the host, kept for all layers that ask for the same batch."""

import torch

_recent = []


def remembered(make, offsets, prefix_offsets, *key):
    """make(offsets, prefix_offsets, *key), kept for the last batches: making it waits for the GPU."""
    if any(x is not None and x.is_inference() for x in (offsets, prefix_offsets)):
        # Inference tensors carry no version: they may have changed.
        return make(offsets, prefix_offsets, *key)
    key = (
        make,
        offsets._version,
        None if prefix_offsets is None else prefix_offsets._version,
        *key,
    )
    for known_offsets, known_prefix, known_key, plan in _recent:
        if known_offsets is offsets and known_prefix is prefix_offsets and known_key == key:
            return plan
    plan = make(offsets, prefix_offsets, *key[3:])
    _recent.insert(0, (offsets, prefix_offsets, key, plan))
    del _recent[4:]
    return plan


def lengths_of(name, offsets, num_rows=None):
    """Lengths of the samples as a list. Raises ValueError unless offsets start at 0, never fall and end by num_rows."""
    bounds = offsets.tolist()
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:])]
    if bounds[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"{name} must start at 0 and never fall, got {bounds}")
    if num_rows is not None and bounds[-1] > num_rows:
        raise ValueError(f"{name} end at {bounds[-1]}, but there are {num_rows} rows")
    return lengths


def rows_in(lengths, strides, first, device):
    """Row of each packed token when sample b starts at strides[b] + first[b]; both a list, or one number for all."""
    sample = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64)
    )
    starts = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    base = torch.as_tensor(strides).expand(len(lengths)) + torch.as_tensor(first)
    return (base[sample] + torch.arange(len(sample)) - starts[sample]).to(device)
