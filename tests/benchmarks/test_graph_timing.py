"""How GPU work is timed, on a stand-in for a GPU whose calls take a set time each."""

from contextlib import contextmanager

import pytest
import torch

from stylefast.kernels.gpu import timing


class Device:
    """Time passes by the calls that run; a graph runs again what was called while it was captured."""

    def __init__(self):
        self.now, self.capturing, self.log = 0.0, None, []

    def call(self, name, milliseconds, fails_in_capture=False):
        def run(i):
            if self.capturing is not None:
                if fails_in_capture:
                    raise RuntimeError("operation not permitted when stream is capturing")
                self.capturing.append((name, milliseconds, i))
            else:
                self.spend(name, milliseconds, i)

        return run

    def spend(self, name, milliseconds, i):
        self.now += milliseconds
        self.log.append((name, i))


@pytest.fixture
def device(monkeypatch):
    device = Device()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        def replay(self):
            for work in self.work:
                device.spend(*work)

    @contextmanager
    def graph(captured):
        device.capturing = captured.work = []
        try:
            yield
        finally:
            device.capturing = None

    class Stream:
        def wait_stream(self, other):
            assert isinstance(other, Stream)

    @contextmanager
    def stream(side):
        yield

    stand_ins = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": Stream,
        "stream": stream,
        "current_stream": Stream,
        "synchronize": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return device


def test_a_sample_is_the_time_of_one_launch_and_contestants_take_turns(device):
    calls = {"long": device.call("long", 5.0), "short": device.call("short", 0.5)}
    times = timing.graph_milliseconds(calls, rounds=3)
    assert times.samples == {"long": [pytest.approx(5.0)] * 3, "short": [pytest.approx(0.5)] * 3}
    # a short one is launched several times a graph
    assert device.log[-15:] == ([("long", 0)] + [("short", 0)] * 4) * 3


@pytest.mark.parametrize("sets", [1, 3])
def test_a_graph_goes_round_all_input_sets(device, sets):
    timing.graph_milliseconds({"a": device.call("a", 0.5)}, sets=sets, rounds=1)
    launches = -(-4 // sets) * sets
    assert device.log[-launches:] == [("a", i % sets) for i in range(launches)]


def test_a_call_that_cannot_be_captured_is_named_and_the_others_are_timed(device):
    calls = {"reads the host": device.call("a", 1.0, fails_in_capture=True), "fine": device.call("b", 1.0)}
    times = timing.graph_milliseconds(calls, rounds=2)
    assert list(times.samples) == ["fine"] and "not permitted" in times.failures["reads the host"]


def test_an_error_is_told_in_one_line_without_folders():
    error = RuntimeError("in /opt/some where/lib/x.py:3\n  shape [2, 3] / [4] at https://a.org/b/c")
    assert timing.one_line(error) == "RuntimeError: in some where/lib/x.py:3 shape [2, 3] / [4] at https://a.org/b/c"
