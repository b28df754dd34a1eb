"""The specification of the mask."""

import torch

from iomm.kernels.philox import MASK
from iomm.kernels.philox.reference import philox_reference


def visible_tokens_reference(seed, n_B, num_tokens, ratio, fixed):
    """(index_V, offsets, position_V) as `visible_tokens` describes them."""
    draw = philox_reference("uniform", seed, MASK, n_B, num_tokens).double()
    if fixed:
        best = draw.sort(dim=1, descending=True, stable=True).indices[:, : round((1 - ratio) * num_tokens)]
        visible = torch.zeros_like(draw, dtype=torch.bool).scatter_(1, best, True)
    else:
        visible = draw >= ratio
    index_V = visible.flatten().nonzero().squeeze(1)
    offsets = torch.zeros(len(n_B) + 1, dtype=torch.int32, device=n_B.device)
    offsets[1:] = visible.sum(1).cumsum(0)
    return index_V, offsets, index_V % num_tokens
