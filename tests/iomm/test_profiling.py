"""Named parts of a step: their seconds sum to the step, and nested parts count once."""

import threading

import pytest

from iomm import profiling
from iomm.profiling import Clock, named, named_each, named_whole


@pytest.fixture
def ticks(monkeypatch):
    """Replace perf_counter by a clock that only the returned function advances."""
    now = [100.0]
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now[0])

    def ticks(seconds):
        now[0] += seconds

    return ticks


def test_parts_sum_to_the_step_and_nested_count_once(ticks):
    clock = Clock("cpu")
    with clock:
        ticks(1)
        with named("generator"):
            ticks(2)
            with named("vae"):
                ticks(4)
            ticks(8)
        ticks(16)
        for _ in named_each("data", iter("ab")):
            ticks(32)
        own, other_streams = clock.read()
        assert own == {"other": 1 + 16 + 64, "generator": 10, "vae": 4, "data": 0}
        assert other_streams == {}
        # A read in the middle of a part splits its time in two.
        with named("optimizer"):
            ticks(3)
            assert clock.read()[0]["optimizer"] == 3
            ticks(5)
        assert clock.read()[0]["optimizer"] == 5


def test_named_whole_keeps_the_time_of_inner_parts(ticks):
    clock = Clock("cpu")
    with clock:
        with named_whole("evaluation"), named("generator"):
            ticks(2)
        with named("generator"):
            ticks(4)
    assert {name: seconds for name, seconds in clock.read()[0].items() if seconds} == {
        "evaluation": 2,
        "generator": 4,
    }


def test_error_closes_its_parts(ticks):
    clock = Clock("cpu")
    with clock:
        with pytest.raises(ZeroDivisionError), named("outer"), named("inner"):
            ticks(1)
            raise ZeroDivisionError
        ticks(2)
    assert clock.read()[0] == {"outer": 0, "inner": 1, "other": 2}


def test_parts_of_other_threads_are_not_timed(ticks):
    clock = Clock("cpu")

    def work():
        with named("checkpoint"):
            ticks(2)

    work()
    with clock:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert clock.read()[0] == {"other": 4}


def test_gpu_is_timed_by_events_on_its_own_stream(ticks, monkeypatch):
    """Test a GPU with stand-ins for streams and events.

    Parts on other streams are returned separately, events are reused, and only `read` waits, for
    events that the device has not reached.
    """
    made, waited, current, reached = [], [], ["main"], []

    class Stream:
        device = "cuda"

        def __init__(self, name):
            self.name = name

        def __eq__(self, other):
            return self.name == other.name

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            made.append(self)

        def record(self):
            self.at = profiling.time.perf_counter()

        def query(self):
            return bool(reached)

        def synchronize(self):
            waited.append(self)

        def elapsed_time(self, other):
            # In milliseconds, like CUDA's.
            return (other.at - self.at) * 1e3

    monkeypatch.setattr(profiling.torch.cuda, "Event", Event)
    monkeypatch.setattr(
        profiling.torch.cuda, "current_stream", lambda device=None: Stream(current[0])
    )
    clock = Clock("cuda")
    for _ in range(3):
        with clock, named("generator"):
            ticks(2)
            current[0] = "side"
            with named("vae"):
                ticks(4)
            current[0] = "main"
        assert not waited
        own, other_streams = clock.read()
        assert own == {"other": 0, "generator": 6} and other_streams == {"vae": 4}
        assert len(waited) == (0 if reached else 2)
        waited.clear()
        # From now on.
        reached.append(True)
    assert len(made) == 6
