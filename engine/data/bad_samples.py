"""Samples that were good when they were indexed and cannot be had now: counted, logged, and too many stop the run."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from iomm.config import InputError

# A share is judged over at least so many.
LEAST_SAMPLES = 10_000


@dataclass(frozen=True)
class Failure:
    """Position n of the run got another sample than its own. `fatal`: none could be had, the position holds black."""

    n: int
    shard: int
    problem: str
    fatal: bool = False


class BadSamples:
    """What was skipped in the whole run: `total` positions, in `shards`. Both belong in a checkpoint."""

    def __init__(self, max_fraction, max_shards, log_file=None):
        self.max_fraction, self.max_shards, self.log_file = max_fraction, max_shards, log_file
        self.total, self.shards = 0, set()

    def state(self):
        """Plain values for a checkpoint."""
        return {"total": self.total, "shards": sorted(self.shards)}

    def restore(self, state):
        self.total, self.shards = state["total"], set(state["shards"])

    def record(self, failures, samples_seen):
        """Counts the Failures of one step, of all ranks; samples_seen is that of the run after the step. Must be called
        on all ranks alike. Raises InputError if more than max_fraction of max(samples_seen, 10,000) samples, or samples
        of more than max_shards shards, were skipped so far, or if one could not be replaced.
        """
        failures = sorted(failures, key=lambda failure: failure.n)
        self.total += len(failures)
        self.shards |= {failure.shard for failure in failures}
        if self.log_file and failures:
            self._log(failures)
        dead = [failure for failure in failures if failure.fatal]
        if dead:
            raise InputError(
                f"{dead[0].problem}; nor could the samples that would take its place be had: look at the disk"
            )
        allowed = self.max_fraction * max(samples_seen, LEAST_SAMPLES)
        if self.total > allowed:
            raise InputError(
                f"{self.total} samples of {samples_seen} could not be had, more than data.max_bad_fraction "
                f"({self.max_fraction}) allows; last: {failures[-1].problem}"
            )
        if len(self.shards) > self.max_shards:
            raise InputError(
                f"samples of {len(self.shards)} shards could not be had, more than data.max_bad_shards "
                f"({self.max_shards}) allows; last: {failures[-1].problem}"
            )

    def _log(self, failures):
        try:
            with open(Path(self.log_file), "a", encoding="utf-8") as f:
                for failure in failures:
                    f.write(json.dumps(asdict(failure)) + "\n")
        except OSError as error:
            # a full disk does not end a run
            print(f"{self.log_file} not written: {error}", flush=True)
