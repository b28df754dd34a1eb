"""The specification of the mask."""

import torch

from iomm.kernels.philox import MASK
from iomm.kernels.philox.reference import philox_reference


def visible_tokens_reference(seed, n_B, num_tokens, ratio, fixed, capacity):
    """(index, offsets, position, overflow) as `visible_tokens_packed` describes them; capacity None: as many as there
    are, and overflow None."""
    draw = philox_reference("uniform", seed, MASK, n_B, num_tokens).double()
    if fixed:
        best = draw.sort(dim=1, descending=True, stable=True).indices[:, : round((1 - ratio) * num_tokens)]
        visible = torch.zeros_like(draw, dtype=torch.bool).scatter_(1, best, True)
    else:
        visible = draw >= ratio
    index_V = visible.flatten().nonzero().squeeze(1)
    offsets = torch.zeros(len(n_B) + 1, dtype=torch.int32, device=n_B.device)
    offsets[1:] = visible.sum(1).cumsum(0)
    if capacity is None:
        return index_V, offsets, index_V % num_tokens, None
    overflow = (offsets[-1:] - capacity).clamp(min=0).long()
    packed = index_V.new_zeros(capacity)
    packed[: len(index_V)] = index_V[:capacity]
    return packed, offsets.clamp(max=capacity), packed % num_tokens, overflow
