"""Preemption: signals that request the run to save and stop."""

import signal
from types import FrameType, TracebackType
from typing import Self

# Exit code of a run that was stopped by a signal and has saved. It is EX_TEMPFAIL, "try again".
REQUEUE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Set `requested` on SIGTERM and SIGUSR1 instead of ending the process.

    Use as a context. The signals may arrive any number of times.
    """

    def __init__(self) -> None:
        self.requested = False
        self.before = {}

    def __enter__(self) -> Self:
        self.before = {number: signal.signal(number, self.request) for number in SIGNALS}
        return self

    def request(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.requested = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
