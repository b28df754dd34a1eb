"""Named parts of a step: always ranges of a trace, and timed while a Clock runs."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, Self, TypeVar

import torch
from torch.profiler import record_function

# Time outside every named part.
OTHER = "other"
# The running clock of each thread.
RUNNING = ContextVar("clock", default=None)

Item = TypeVar("Item")


@contextmanager
def named(name: str) -> Iterator[None]:
    """Mark the block as a range of the trace (torch's profiler, NVTX).

    If a clock runs in this thread, the block is also timed as a part.
    """
    clock = RUNNING.get()
    with record_function(name):
        if clock is None:
            yield
        else:
            with clock.part(name):
                yield


@contextmanager
def named_whole(name: str) -> Iterator[None]:
    """Mark the block as one named part, to which the clock assigns all of the block's time.

    Named parts inside are only ranges of the trace.
    """
    with named(name):
        token = RUNNING.set(None)
        try:
            yield
        finally:
            RUNNING.reset(token)


def named_each(name: str, items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, fetching each inside a named part."""
    items, end = iter(items), object()
    while True:
        with named(name):
            item = next(items, end)
        if item is end:
            return
        yield item


class Clock:
    """A context in which the named parts of a step are timed on the device's own timeline.

    The time of a nested part is subtracted from the outer part. On a CPU, times come from
    perf_counter. On a GPU, they come from CUDA events on the stream that was current when the clock
    was created, so a part lasts as long as the device worked or idled between its two events,
    whenever Python queued the work. Only `read` may wait for the device.
    """

    def __init__(self, device: torch.device | str):
        self.cuda = torch.device(device).type == "cuda"
        self.stream = torch.cuda.current_stream(device) if self.cuda else None
        # Names of the parts that are running, outermost first.
        self.running = []
        # (name, start, stop) of parts on other streams.
        self.other_streams = []
        # CUDA events that can be recorded again.
        self.free_events = []
        # (name, start) of every part; a part stops where the next one starts.
        self.marks = [(OTHER, self.now())]

    def __enter__(self) -> Self:
        self.token = RUNNING.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        RUNNING.reset(self.token)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as a part of this name."""
        if self.cuda and torch.cuda.current_stream(self.stream.device) != self.stream:
            start = self.now()
            try:
                yield
            finally:
                self.other_streams.append((name, start, self.now()))
            return
        self.running.append(name)
        self.marks.append((name, self.now()))
        try:
            yield
        finally:
            self.running.pop()
            self.marks.append((self.running[-1] if self.running else OTHER, self.now()))

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the seconds of each part since the previous read, or since creation.

        The first dict is of the clock's own stream and sums to all of that time, "other" included.
        The second is of parts on other streams, which ran at the same time. Waits until the device
        has reached this point.
        """
        self.marks.append((self.running[-1] if self.running else OTHER, self.now()))
        marks, self.marks = self.marks, self.marks[-1:]
        other_streams, self.other_streams = self.other_streams, []
        spans = [(name, start, stop) for (name, start), (_, stop) in pairwise(marks)]
        if self.cuda:
            # After a read of the step's figures the device has nothing left to do.
            for event in (marks[-1][1], *(stop for _, _, stop in other_streams)):
                if not event.query():
                    event.synchronize()
        own_seconds, other_seconds = self.summed(spans), self.summed(other_streams)
        if self.cuda:
            self.free_events += [start for _, start, _ in spans]
            self.free_events += [event for _, *events in other_streams for event in events]
        return own_seconds, other_seconds

    def summed(self, spans: list[tuple[str, Any, Any]]) -> dict[str, float]:
        """Return {name: seconds}, summed over spans (name, start, stop)."""
        total = {}
        for name, start, stop in spans:
            seconds = start.elapsed_time(stop) / 1e3 if self.cuda else stop - start
            total[name] = total.get(name, 0.0) + seconds
        return total

    def now(self) -> Any:
        """Return the current time: seconds on a CPU, an event on the current stream on a GPU."""
        if not self.cuda:
            return time.perf_counter()
        event = self.free_events.pop() if self.free_events else torch.cuda.Event(enable_timing=True)
        event.record()
        return event
