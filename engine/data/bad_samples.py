"""Samples that a run could not use as they are.

Those that were good when they were indexed and are unreadable now are replaced, and too many of
them stop the run. Captions that exceed the MLLM's context are cut. Both are counted and logged.
"""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iomm.config import InputError
from iomm.engine.data.atomic import whole_file

logger = logging.getLogger("iomm")

# Replacements tried for an unreadable sample.
MAX_ATTEMPTS = 16
# The fraction of bad samples is taken of at least this number of samples.
MIN_SAMPLES = 10_000
# Cut captions that are named. A run may have millions of them, which are only counted.
MAX_NAMED_CUTS = 10_000


@dataclass(frozen=True)
class Failure:
    """A run position n whose own sample was unreadable and has been replaced.

    `fatal`: the replacements were unreadable as well, and the position holds a black image. `cut`:
    nothing was replaced, but the caption was too long and was cut.
    """

    n: int
    shard: int
    problem: str
    fatal: bool = False
    cut: bool = False


class BadSamples:
    """Counter of the replaced samples and the cut captions of a whole run.

    `total` positions of `shards` were replaced, and `cut_captions` positions have a caption that
    was cut. All three are part of a checkpoint.
    """

    def __init__(
        self, max_fraction: float, max_shards: int, log_file: str | os.PathLike | None = None
    ) -> None:
        self.max_fraction = max_fraction
        self.max_shards = max_shards
        self.log_file = log_file
        self.total = 0
        self.cut_captions = 0
        self.shards: set[int] = set()

    def state(self) -> dict[str, Any]:
        """Return the counts as plain values for a checkpoint."""
        return {
            "total": self.total,
            "shards": sorted(self.shards),
            "cut_captions": self.cut_captions,
        }

    def restore(self, state: dict[str, Any], samples_seen: int | None = None) -> None:
        """Restore the counts of a checkpoint.

        samples_seen: samples of the run up to the checkpoint. Later ones are read again, so their
        lines are removed from the log. None: the log stays as it is.
        """
        self.total = state["total"]
        self.shards = set(state["shards"])
        # Checkpoints of earlier versions do not have it.
        self.cut_captions = state.get("cut_captions", 0)
        if self.log_file and samples_seen is not None:
            self._trim(samples_seen)

    def record(self, failures: Iterable[Failure], samples_seen: int) -> None:
        """Count the failures of one step. Must be called with the same arguments on all ranks.

        Args:
            failures: the failures of all ranks in this step.
            samples_seen: samples of the run up to and including this step.

        Raises:
            InputError: a sample could not be replaced, or the samples replaced so far are more than
                max_fraction of max(samples_seen, 10,000), or are of more than max_shards shards.
        """
        found = sorted(failures, key=lambda failure: failure.n)
        cuts = [failure for failure in found if failure.cut]
        failures = [failure for failure in found if not failure.cut]
        named_cuts = cuts[: max(0, MAX_NAMED_CUTS - self.cut_captions)]
        self.total += len(failures)
        self.cut_captions += len(cuts)
        self.shards |= {failure.shard for failure in failures}
        if self.log_file and (failures or named_cuts):
            self._log(sorted(failures + named_cuts, key=lambda failure: failure.n))
        if not failures:
            return
        fatal = [failure for failure in failures if failure.fatal]
        if fatal:
            raise InputError(
                f"{fatal[0].problem}. The {MAX_ATTEMPTS} replacement samples were unreadable as "
                "well; check the storage"
            )
        allowed = self.max_fraction * max(samples_seen, MIN_SAMPLES)
        if self.total > allowed:
            raise InputError(
                f"{self.total} of {samples_seen} samples were unreadable, more than "
                f"data.max_bad_fraction ({self.max_fraction}) allows; last failure: "
                f"{failures[-1].problem}"
            )
        if len(self.shards) > self.max_shards:
            raise InputError(
                f"{len(self.shards)} shards had unreadable samples, more than data.max_bad_shards "
                f"({self.max_shards}) allows; last failure: {failures[-1].problem}"
            )

    def _trim(self, samples_seen: int) -> None:
        path = Path(self.log_file)
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _position(line) < samples_seen]
            if kept != lines:
                with whole_file(path) as partial:
                    partial.write_text("".join(kept), encoding="utf-8")
        except FileNotFoundError:
            # Nothing was skipped so far.
            pass
        except OSError as error:
            logger.warning("could not write %s: %s", path, error)

    def _log(self, failures: list[Failure]) -> None:
        try:
            with open(Path(self.log_file), "a", encoding="utf-8") as f:
                for failure in failures:
                    f.write(json.dumps(asdict(failure)) + "\n")
        except OSError as error:
            # A full disk must not end the run.
            logger.warning("could not write %s: %s", self.log_file, error)


def _position(line: str) -> float:
    """Return the run position of a line of the log, or infinity if a kill has cut the line."""
    try:
        return json.loads(line)["n"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
