"""Streams of a GPU, on a stand-in: steps work on one stream, in order with that of whichever thread runs them."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from stylefast.runtime.streams import SideStream, StepStream

DEVICE = torch.device("cuda", 1)


@pytest.fixture
def gpu(monkeypatch):
    """Streams by name; every thread has its own current one. `log` tells who waited for whom."""
    state = SimpleNamespace(log=[], local=threading.local(), refuse=False)

    def stream(name):
        return SimpleNamespace(
            name=name,
            synchronize=lambda: state.log.append(f"host waits for {name}"),
            wait_stream=lambda other: state.log.append(f"{name} waits for {other.name}"),
        )

    event = SimpleNamespace(
        record=lambda stream: state.log.append(f"marked {stream.name}"),
        synchronize=lambda: state.log.append("host waits for the mark"),
    )

    def current(device=DEVICE):
        assert device == DEVICE, "the current device's stream is that of another GPU"
        return getattr(state.local, "current", stream("default"))

    @contextmanager
    def on(which):
        if state.refuse:
            raise RuntimeError("CUDA error")
        before, state.local.current = current(), which
        try:
            yield
        finally:
            state.local.current = before

    state.stream, state.current, state.on = stream, current, on
    names = iter(["steps", "side"])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream(next(names)))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return state


def test_steps_work_on_one_stream_between_what_the_threads_own_has_before_and_after(gpu):
    steps = StepStream(DEVICE)
    for name in ("first", "second"):
        with gpu.on(gpu.stream(name)):
            with steps:
                gpu.log.append(f"work on {gpu.current().name}")
            assert gpu.current().name == name
    assert gpu.log == [
        "steps waits for first",
        "work on steps",
        "first waits for steps",
        "steps waits for second",
        "work on steps",
        "second waits for steps",
    ]


def test_entering_again_changes_no_stream(gpu):
    steps = StepStream(DEVICE)
    with steps, steps:
        with steps:
            pass
        assert gpu.current().name == "steps"
    assert gpu.log == ["steps waits for default", "default waits for steps"] and gpu.current().name == "default"


def test_an_error_within_restores_the_stream_and_one_on_entering_leaves_it_as_it_was(gpu):
    steps = StepStream(DEVICE)
    with pytest.raises(ValueError, match="no"), steps:
        raise ValueError("no")
    assert gpu.current().name == "default" and gpu.log[-1] == "default waits for steps"
    gpu.refuse = True
    with pytest.raises(RuntimeError, match="CUDA error"), steps:
        pass
    gpu.refuse = False
    with steps:
        assert gpu.current().name == "steps"


def test_another_thread_waits_for_steps_before_it_reads_what_they_made(gpu):
    steps, seen = StepStream(DEVICE), []
    tensor = SimpleNamespace(record_stream=lambda stream: seen.append(stream.name))
    with gpu.on(gpu.stream("mine")):
        steps.join()
        assert steps.lend(tensor) is tensor
    assert gpu.log == ["mine waits for steps"] and seen == ["mine"]


def test_the_host_waits_for_the_steps_before_a_mark_alone(gpu):
    steps = StepStream(DEVICE)
    wait = steps.mark()
    assert gpu.log == ["marked steps"]
    wait()
    assert gpu.log[-1] == "host waits for the mark"


def test_work_beside_steps_is_finished_when_it_returns_and_waits_for_no_step(gpu):
    steps, side = StepStream(DEVICE), SideStream(DEVICE)
    assert side.call(lambda: gpu.log.append(f"work on {gpu.current().name}") or [1], steps) == [1]
    assert gpu.log == ["side waits for default", "work on side", "host waits for side"]


def test_on_a_cpu_nothing_is_done(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    steps, tensor = StepStream(torch.device("cpu")), torch.zeros(2)
    with steps, steps:
        assert steps.lend(tensor) is tensor
    steps.join()
    steps.mark()()
    assert SideStream(torch.device("cpu")).call(lambda: 5, steps) == 5
