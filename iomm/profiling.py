"""Named parts of a step: ranges of a trace always, and seconds of each while a Clock runs."""

import time
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.profiler import record_function

# What happens outside every named part.
OTHER = "other"
# A thread sees only what it entered itself.
RUNNING = ContextVar("clock", default=None)


@contextmanager
def named(name):
    """The block is a range of the trace (torch's profiler, NVTX) and, if a clock runs in this thread, a part of its time."""
    clock = RUNNING.get()
    with record_function(name):
        if clock is None:
            yield
        else:
            with clock.part(name):
                yield


@contextmanager
def named_whole(name):
    """A named part whose inner parts are ranges of the trace alone: the clock takes all of its time for this one."""
    with named(name):
        token = RUNNING.set(None)
        try:
            yield
        finally:
            RUNNING.reset(token)


def named_each(name, items):
    """The items, each fetched inside a named part."""
    items, end = iter(items), object()
    while True:
        with named(name):
            item = next(items, end)
        if item is end:
            return
        yield item


class Clock:
    """Seconds by part on the device's own timeline, while entered as a context. A nested part is taken from the outer one.

    On a CPU by perf_counter; on a GPU by CUDA events of the stream that was current when the clock was made: what the
    device did, and idled, between them, whenever Python queued it. Neither waits for the device; only `read` may.
    """

    def __init__(self, device):
        self.cuda = torch.device(device).type == "cuda"
        self.stream = torch.cuda.current_stream(device) if self.cuda else None
        self.open, self.beside, self.free = [], [], []
        # (part that begins, when)
        self.marks = [(OTHER, self.now())]

    def __enter__(self):
        self.token = RUNNING.set(self)
        return self

    def __exit__(self, *_):
        RUNNING.reset(self.token)

    @contextmanager
    def part(self, name):
        if self.cuda and torch.cuda.current_stream(self.stream.device) != self.stream:
            start = self.now()
            try:
                yield
            finally:
                self.beside.append((name, start, self.now()))
            return
        self.open.append(name)
        self.marks.append((name, self.now()))
        try:
            yield
        finally:
            self.open.pop()
            self.marks.append((self.open[-1] if self.open else OTHER, self.now()))

    def read(self):
        """({part: seconds}, {part: seconds}) since the read before, or since the clock was made. The first sums to all of
        that time, "other" included; the second is of parts on other streams, beside it. Waits until the device is here.
        """
        self.marks.append((self.open[-1] if self.open else OTHER, self.now()))
        marks, self.marks = self.marks, self.marks[-1:]
        pairs, self.beside = self.beside, []
        spans = [(name, start, stop) for (name, start), (_, stop) in zip(marks, marks[1:])]
        if self.cuda:
            marks[-1][1].synchronize()
            for _, _, stop in pairs:
                stop.synchronize()
        split, beside = self.summed(spans), self.summed(pairs)
        # An event is made once and recorded again and again.
        if self.cuda:
            self.free += [start for _, start, _ in spans] + [
                event for _, *events in pairs for event in events
            ]
        return split, beside

    def summed(self, spans):
        total = {}
        for name, start, stop in spans:
            total[name] = total.get(name, 0.0) + (
                start.elapsed_time(stop) / 1e3 if self.cuda else stop - start
            )
        return total

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = self.free.pop() if self.free else torch.cuda.Event(enable_timing=True)
        # On the current stream.
        event.record()
        return event
