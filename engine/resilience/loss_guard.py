"""Count skipped steps, detect loss spikes, and stop a run that no longer trains.

All decisions are the same on all ranks, and each is logged in one line.
"""

import logging
import math
import statistics
from collections import deque
from typing import Any

from iomm.config import InputError

logger = logging.getLogger("iomm")


class LossGuard:
    """Count skipped steps and detect spikes of the loss.

    A loss is a spike if it is more than `sigmas` robust standard deviations (1.4826 x median
    absolute deviation) above the median of the last WINDOW losses that were not spikes. Spikes
    never enter these statistics. After WINDOW spikes in a row the loss has reached a new level, and
    the statistics start again, empty.

    `total` and `spikes` count skipped steps and spikes over the whole run.
    """

    # Number of losses remembered, which is OLMo's.
    WINDOW = 128
    # Number of losses needed before any loss can be a spike.
    LEAST = 32

    def __init__(self, max_skips: int, sigmas: float = 6.0, skip_spikes: bool = False) -> None:
        self.max_skips = max_skips
        self.sigmas = sigmas
        self.skip_spikes = skip_spikes
        self.total = 0
        self.spikes = 0
        self.skips_in_a_row = 0
        self.spikes_in_a_row = 0
        self.losses: deque[float] = deque(maxlen=self.WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Return whether a mean loss over all ranks is a spike. Does not record it."""
        if len(self.losses) < self.LEAST or not math.isfinite(loss):
            return False
        median = statistics.median(self.losses)
        spread = 1.4826 * statistics.median(abs(x - median) for x in self.losses)
        # With losses that hardly vary (one image over and over), any deviation would be a spike.
        # The spread therefore counts as at least a thousandth of the level.
        return loss > median + self.sigmas * max(spread, 1e-3 * abs(median))

    def record(self, step: int, loss: float, samples: str, applied: bool) -> None:
        """Record the outcome of a step. Call it once per step.

        Args:
            step: The step, from 1.
            loss: Its mean loss over all ranks.
            samples: The samples to inspect, in words.
            applied: The step changed weights.

        Raises:
            InputError: More than max_skips steps in a row were skipped.
        """
        if self.is_spike(loss):
            self.spikes += 1
            self.spikes_in_a_row += 1
            if self.spikes_in_a_row == 1 or not applied:
                logger.warning(
                    "step %d: loss %.4g is a spike (median of the last %d: %.4g); %s",
                    step,
                    loss,
                    len(self.losses),
                    statistics.median(self.losses),
                    samples,
                )
            if self.spikes_in_a_row == self.WINDOW:
                logger.warning(
                    "step %d: %d spikes in a row are taken as a new level of the loss",
                    step,
                    self.spikes_in_a_row,
                )
                self.losses.clear()
                self.spikes_in_a_row = 0
        elif math.isfinite(loss):
            self.losses.append(loss)
            self.spikes_in_a_row = 0
        if applied:
            self.skips_in_a_row = 0
            return
        self.total += 1
        self.skips_in_a_row += 1
        logger.warning("step %d skipped on all ranks, weights unchanged; %s", step, samples)
        if self.skips_in_a_row > self.max_skips:
            raise InputError(
                f"{self.skips_in_a_row} steps in a row up to step {step} had a non-finite loss or "
                f"gradient and were skipped (last: {samples}). Inspect these samples. To lower "
                "optim.lr, choose a new run.dir and pass "
                f"--resume OLD/checkpoints/step-{step:08d}, where OLD is this run.dir"
            )

    def state(self) -> dict[str, Any]:
        """Return the JSON-serializable state, with which a resumed run detects the same spikes."""
        return {
            "total": self.total,
            "row": self.skips_in_a_row,
            "spikes": self.spikes,
            "rejected": self.spikes_in_a_row,
            "losses": list(self.losses),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what state() returned."""
        self.total = state["total"]
        self.skips_in_a_row = state["row"]
        self.spikes = state["spikes"]
        self.spikes_in_a_row = state["rejected"]
        self.losses = deque(state["losses"], maxlen=self.WINDOW)
