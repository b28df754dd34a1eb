"""Exponential moving average of the fp32 masters, split over the ranks exactly as they are."""

import torch


class Ema:
    """average <- decay * average + (1 - decay) * master, after every step that changed weights. No communication."""

    def __init__(self, masters, decay):
        self.masters, self.decay = masters, decay
        self.flats = [m.detach().clone() for m in masters] if decay else []

    @torch.no_grad()
    def update(self, step):
        """The decay rises as (1 + step) / (10 + step) up to its value, so that the average forgets the random start."""
        if self.flats:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.flats, [m.detach() for m in self.masters], 1 - decay)
