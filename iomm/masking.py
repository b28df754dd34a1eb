"""Which image tokens the MLLM sees, as a pure function of (seed, sample number)."""

import torch
from torch import Tensor

from iomm.config import MaskConfig
from iomm.kernels.visible_tokens import visible_tokens


def visible_mask(config: MaskConfig, seed: int, n_B: Tensor, num_tokens: int) -> Tensor:
    """Return a bool mask (B * P,) of the image tokens of samples n_B, True where visible.

    The mask of sample n does not depend on the batch or the rank.
    """
    index_V, _, _ = visible_tokens(seed, n_B, num_tokens, config.ratio, config.count)
    visible = torch.zeros(len(n_B) * num_tokens, dtype=torch.bool, device=n_B.device)
    visible[index_V] = True
    return visible
