"""Preemption: signals that request the run to save and stop."""

import os
import signal
from types import FrameType, TracebackType
from typing import Self

# Exit code of a run that was stopped by a signal and has saved. It is EX_TEMPFAIL, "try again".
REQUEUE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop:
    """Set `requested` on SIGTERM, SIGUSR1 and Ctrl-C instead of ending the process.

    Use as a context. SIGTERM and SIGUSR1 may arrive any number of times. A second Ctrl-C ends the
    process without saving.
    """

    def __init__(self, reports: bool = False) -> None:
        """reports: say on Ctrl-C what happens now, on one rank."""
        self.requested = self.interrupted = False
        self.reports = reports
        self.before = {}

    def __enter__(self) -> Self:
        self.before = {number: signal.signal(number, self.request) for number in SIGNALS}
        return self

    def request(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: it is a second Ctrl-C.
        """
        if number == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            if self.reports:
                # Not print: the signal may have interrupted one.
                os.write(
                    2,
                    b"\niomm: stopping after this step and saving it; Ctrl-C again stops at once\n",
                )
        self.requested = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
