"""The runtime's lock on a GPU, on a stand-in: all holders work on one stream, in order with their own."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from stylefast.runtime.stream_lock import StreamLock

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
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream("runtime"))
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return state


def test_holders_work_on_one_stream_between_what_their_own_has_before_and_after(gpu):
    lock = StreamLock(DEVICE)
    for name in ("first", "second"):
        with gpu.on(gpu.stream(name)):
            with lock:
                gpu.log.append(f"work on {gpu.current().name}")
            assert gpu.current().name == name
    assert gpu.log == [
        "runtime waits for first",
        "work on runtime",
        "first waits for runtime",
        "runtime waits for second",
        "work on runtime",
        "second waits for runtime",
    ]


def test_only_the_outermost_hold_changes_streams(gpu):
    lock = StreamLock(DEVICE)
    with lock, lock:
        with lock:
            pass
        assert gpu.current().name == "runtime"
    assert gpu.log == ["runtime waits for default", "default waits for runtime"] and gpu.current().name == "default"


def test_an_error_within_restores_the_stream_and_one_on_entering_gives_the_lock_back(gpu):
    lock = StreamLock(DEVICE)
    with pytest.raises(ValueError, match="no"), lock:
        raise ValueError("no")
    assert gpu.current().name == "default" and gpu.log[-1] == "default waits for runtime"
    gpu.refuse = True
    with pytest.raises(RuntimeError, match="CUDA error"), lock:
        pass
    gpu.refuse, done = False, []
    other = threading.Thread(target=lambda: [lock.__enter__(), done.append(1), lock.__exit__()], daemon=True)
    other.start()
    other.join(60)
    assert done, "the lock was not given back"


def test_what_leaves_the_lock_stays_until_the_holders_stream_has_done_with_it(gpu):
    lock, seen = StreamLock(DEVICE), []
    tensor = SimpleNamespace(record_stream=lambda stream: seen.append(stream.name))
    with gpu.on(gpu.stream("mine")), lock:
        assert lock.lend(tensor) is tensor
    assert seen == ["mine"]
    lock.wait()
    assert gpu.log[-1] == "host waits for runtime"


def test_on_a_cpu_it_is_a_lock_and_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    lock, tensor = StreamLock(torch.device("cpu")), torch.zeros(2)
    with lock, lock:
        assert lock.lend(tensor) is tensor
    lock.wait()
