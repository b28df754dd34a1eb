"""Steps that must not change weights, and requests to stop: decided alike on all ranks, counted, said in one line."""

import math
import statistics
from collections import deque

from iomm.config import InputError


class LossGuard:
    """Counts skipped steps and judges losses. `total` and `spikes` are over the whole run, `row` since the last good step.

    A loss is a spike if it lies more than `sigmas` robust standard deviations (1.4826 x median absolute deviation) above
    the median of the last WINDOW losses that were none. What is rejected never enters; after WINDOW rejected in a row the
    level itself has changed, and the statistics start anew, empty.
    """

    # Losses remembered (OLMo's number), and needed before anything is judged.
    WINDOW, LEAST = 128, 32

    def __init__(self, max_skips, sigmas=6.0, skip_spikes=False, say=print):
        self.max_skips, self.sigmas, self.skip_spikes, self.say = (
            max_skips,
            sigmas,
            skip_spikes,
            say,
        )
        self.total = self.row = self.spikes = self.rejected = 0
        self.losses = deque(maxlen=self.WINDOW)

    def is_spike(self, loss):
        """Judges a mean loss over all ranks; remembers nothing."""
        if len(self.losses) < self.LEAST or not math.isfinite(loss):
            return False
        middle = statistics.median(self.losses)
        spread = 1.4826 * statistics.median(abs(x - middle) for x in self.losses)
        # Losses that hardly vary (one image over and over) would make anything a spike: a thousandth of the level is none.
        return loss > middle + self.sigmas * max(spread, 1e-3 * abs(middle))

    def saw(self, step, loss, samples, applied):
        """Call once a step with the mean loss over all ranks, in words which samples to look at, and whether weights
        changed. Raises InputError after more than max_skips skipped steps in a row.
        """
        if self.is_spike(loss):
            self.spikes, self.rejected = self.spikes + 1, self.rejected + 1
            if self.rejected == 1 or not applied:
                self.say(
                    f"step {step}: loss {loss:.4g} is a spike, the median of the last {len(self.losses)} is "
                    f"{statistics.median(self.losses):.4g}; {samples}"
                )
            if self.rejected == self.WINDOW:
                self.say(f"step {step}: {self.rejected} spikes in a row: taken as the new level")
                self.losses.clear()
                self.rejected = 0
        elif math.isfinite(loss):
            self.losses.append(loss)
            self.rejected = 0
        if applied:
            self.row = 0
            return
        self.total, self.row = self.total + 1, self.row + 1
        self.say(f"step {step} skipped on all ranks, weights are as before it; {samples}")
        if self.row > self.max_skips:
            raise InputError(
                f"{self.row} steps in a row up to step {step} had a non-finite loss or gradient (last: {samples}); weights "
                "are as before them. Look at these samples; to lower optim.lr, choose a new run.dir and give --resume "
                f"OLD/checkpoints/step-{step:08d}, with OLD for this one"
            )

    def state(self):
        """What a checkpoint keeps, as JSON: judging goes on after a resume as if there had been none."""
        return {
            "total": self.total,
            "row": self.row,
            "spikes": self.spikes,
            "rejected": self.rejected,
            "losses": list(self.losses),
        }

    def restore(self, state):
        self.total, self.row, self.spikes, self.rejected = (
            state[key] for key in ("total", "row", "spikes", "rejected")
        )
        self.losses = deque(state["losses"], maxlen=self.WINDOW)
