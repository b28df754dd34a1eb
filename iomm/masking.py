"""Which tokens the MLLM and the generator see, as a pure function of (seed, sample number)."""

import torch
from torch import Tensor

from iomm.config import MaskConfig, RouteConfig
from iomm.kernels.philox import ROUTE, uniform
from iomm.kernels.visible_tokens import visible_tokens


def visible_mask(config: MaskConfig, seed: int, n_B: Tensor, num_tokens: int) -> Tensor:
    """Return a bool mask (B * P,) of the image tokens of samples n_B, True where visible.

    The mask of sample n does not depend on the batch or the rank.
    """
    index_V, _, _ = visible_tokens(seed, n_B, num_tokens, config.ratio, config.count)
    visible = torch.zeros(len(n_B) * num_tokens, dtype=torch.bool, device=n_B.device)
    visible[index_V] = True
    return visible


def kept_tokens(config: RouteConfig, seed: int, n_R: Tensor, num_latents: int) -> Tensor | None:
    """Return the ascending indices (R, K) of the latent tokens that run through all blocks.

    They depend only on (seed, n). None if all tokens do.
    """
    num_kept = config.num_kept(num_latents)
    if num_kept == num_latents:
        return None
    order_RN = uniform(seed, ROUTE, n_R, num_latents).argsort(dim=1, stable=True)
    return order_RN[:, :num_kept].sort(dim=1).values
