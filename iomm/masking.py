"""Which image tokens the MLLM sees: a pure function of (seed, sample number)."""

import torch

from iomm.kernels.visible_tokens import visible_tokens


def visible_mask(config, seed, n_B, num_tokens):
    """MaskConfig, seed, sample numbers (B,) -> (B * P,) bool, True where the token stays visible.

    The same for sample n in whatever batch, on whatever rank it is drawn.
    """
    index_V, _, _ = visible_tokens(seed, n_B, num_tokens, config.ratio, config.count)
    visible = torch.zeros(len(n_B) * num_tokens, dtype=torch.bool, device=n_B.device)
    visible[index_V] = True
    return visible
