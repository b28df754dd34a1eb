"""Non-finite gradients: the step is skipped on all ranks alike, counted, and too many in a row stop the run."""

from iomm.config import InputError


class Guard:
    """Counts skipped steps. `total` is over the whole run, `row` since the last good step."""

    def __init__(self, max_skips, total=0):
        self.max_skips, self.total, self.row = max_skips, total, 0

    def saw(self, step, first_sample, last_sample, applied):
        """Call once a step. Raises InputError after more than max_skips skipped steps in a row."""
        if applied:
            self.row = 0
            return
        self.total, self.row = self.total + 1, self.row + 1
        if self.row > self.max_skips:
            raise InputError(
                f"{self.row} steps in a row up to step {step} had a non-finite loss or gradient (last: samples {first_sample} "
                f"to {last_sample}); weights are as before them. Lower optim.lr or look at these samples, then --resume auto")
