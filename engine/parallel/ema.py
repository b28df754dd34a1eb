"""Exponential moving average of the fp32 masters, sharded as they are."""

import torch
from torch import Tensor


class Ema:
    """Keep average <- decay * average + (1 - decay) * master, updated by each applied step.

    Needs no communication. With decay 0 there is no average and `flats` is empty.
    """

    def __init__(self, masters: list[Tensor], decay: float) -> None:
        self.masters = masters
        self.decay = decay
        self.flats = [m.detach().clone() for m in masters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after step `step` (from 0) was applied.

        The decay rises as (1 + step) / (10 + step) up to its value, which makes the average forget
        the random initialization.
        """
        if self.flats:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.flats, [m.detach() for m in self.masters], 1 - decay)
