"""Preemption: a signal that asks the run to save and stop."""

import signal

# Exit code of a run that was asked to stop and has saved: EX_TEMPFAIL, "start me again"
REQUEUE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """While entered, SIGTERM and SIGUSR1 set `asked` instead of ending the process, however often they come."""

    def __init__(self):
        self.asked, self.before = False, {}

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in SIGNALS}
        return self

    def ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
