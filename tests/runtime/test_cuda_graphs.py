"""Steps as CUDA graphs, on stand-ins: when one is captured, replayed, dropped or refused, and what it costs."""

import gc
import itertools
import logging
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from stylefast.kernels.gpu import capture as capturing
from stylefast.runtime.backends.cuda_graphs import MOST_GRAPHS, WARM_STEPS, Captured, CudaCapture, StepGraphs


class Recorder:
    """A capture that keeps the step itself and runs it at every replay; `log` tells what happened in which order."""

    def __init__(self, nbytes=100, failure=None):
        self.log, self.nbytes, self.failure, self.capturing = [], nbytes, failure, False

    def warm(self, step):
        self.log.append("warm")
        step()

    def capture(self, step):
        if self.failure is not None:
            raise self.failure
        self.log.append("capture")

        def replay():
            self.log.append("replay")
            step()

        return Captured(replay, lambda: self.log.append("reset"), self.nbytes)

    def wait(self):
        self.log.append("wait")


def _buffers():
    return [torch.zeros(3), torch.zeros(2, 2)]


def _counter():
    runs = []
    return runs, lambda: runs.append(1)


def test_every_run_is_one_step_and_from_the_third_on_a_replay():
    recorder, (runs, step), buffers = Recorder(), _counter(), _buffers()
    graphs = StepGraphs(recorder)
    for number in range(1, 6):
        graphs.run("a", buffers, step)
        assert len(runs) == number
    assert recorder.log == ["warm"] * WARM_STEPS + ["capture"] + ["replay"] * 3
    assert len(graphs) == 1


def test_each_key_has_a_graph_of_its_own():
    recorder, buffers = Recorder(), _buffers()
    graphs, (first, one), (second, other) = StepGraphs(recorder), _counter(), _counter()
    for _ in range(4):
        graphs.run("one", buffers, one)
    for _ in range(3):
        graphs.run("other", buffers, other)
    graphs.run("one", buffers, one)
    assert (len(first), len(second), len(graphs)) == (5, 3, 2)
    assert recorder.log.count("capture") == 2


def test_a_graph_is_not_replayed_on_buffers_that_took_the_place_of_its_own():
    recorder, (runs, step) = Recorder(), _counter()
    graphs, buffers = StepGraphs(recorder), _buffers()
    for _ in range(3):
        graphs.run("a", buffers, step)
    recorder.log.clear()
    graphs.run("a", [buffers[0], torch.zeros(2, 2)], step)
    assert recorder.log == ["wait", "reset", "warm"] and len(graphs) == 0 and len(runs) == 4


def test_one_buffer_more_is_another_step_under_the_same_key():
    recorder, (_, step) = Recorder(), _counter()
    graphs, buffers = StepGraphs(recorder), _buffers()
    for _ in range(3):
        graphs.run("a", buffers, step)
    graphs.run("a", [*buffers, torch.zeros(1)], step)
    assert recorder.log[-1] == "warm"


def test_graphs_whose_buffers_are_gone_are_freed_when_another_shape_comes():
    recorder, (_, step) = Recorder(), _counter()
    graphs, old, kept = StepGraphs(recorder), _buffers(), _buffers()
    for _ in range(3):
        graphs.run("old", old, step)
        graphs.run("kept", kept, step)
    assert len(graphs) == 2
    del old  # the graphs must not keep it alive
    gc.collect()
    graphs.run("new", kept, step)
    assert len(graphs) == 1 and recorder.log.count("reset") == 1
    assert recorder.log.index("wait") < recorder.log.index("reset")


def test_the_least_recently_used_graph_goes_beyond_the_limit():
    recorder, (runs, step), buffers = Recorder(), _counter(), _buffers()
    graphs = StepGraphs(recorder, limit=2)
    for _ in range(3):
        graphs.run("a", buffers, step)
        graphs.run("b", buffers, step)
    graphs.run("a", buffers, step)
    graphs.run("c", buffers, step)  # in place of b
    recorder.log.clear()
    graphs.run("a", buffers, step)
    graphs.run("b", buffers, step)
    assert recorder.log == ["replay", "warm"]
    assert len(runs) == 10


def test_the_pools_bytes_add_up_and_are_free_when_the_last_graph_goes():
    recorder, (_, step), buffers = Recorder(nbytes=70), _counter(), _buffers()
    graphs = StepGraphs(recorder)
    assert graphs.nbytes == 0
    for key in "ab":
        for _ in range(3):
            graphs.run(key, buffers, step)
    assert graphs.nbytes == 140
    graphs.reset()
    assert graphs.nbytes == 0 and len(graphs) == 0
    graphs.run("a", buffers, step)
    assert recorder.log[-1] == "warm"


@pytest.mark.parametrize(
    "failure",
    [RuntimeError("operation not permitted\n when stream is capturing"), torch.OutOfMemoryError("CUDA out of memory")],
)
def test_a_step_that_can_not_be_captured_runs_without_and_says_so_once(failure, caplog):
    recorder, (runs, step), buffers = Recorder(failure=failure), _counter(), _buffers()
    graphs = StepGraphs(recorder)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            graphs.run("a", buffers, step)
    assert len(runs) == 5 and len(graphs) == 0 and graphs.nbytes == 0
    (record,) = caplog.records
    assert " ".join(str(failure).split()) in record.getMessage()


def test_another_shape_is_captured_after_one_that_failed():
    recorder, (_, step), buffers = Recorder(failure=RuntimeError("no")), _counter(), _buffers()
    graphs = StepGraphs(recorder)
    for _ in range(3):
        graphs.run("a", buffers, step)
    recorder.failure = None
    for _ in range(3):
        graphs.run("b", buffers, step)
    assert recorder.log[-2:] == ["capture", "replay"]


def test_an_error_of_the_step_itself_reaches_the_caller_and_the_next_step_runs():
    recorder, buffers = Recorder(), _buffers()
    graphs, (runs, step) = StepGraphs(recorder), _counter()

    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        graphs.run("a", buffers, fails)
    for _ in range(4):
        graphs.run("a", buffers, step)
    assert recorder.log == ["warm", "warm", "warm", "capture", "replay", "replay"] and len(runs) == 4


def test_value_checks_refuse_graphs_with_the_reason(monkeypatch, caplog):
    monkeypatch.setenv("STYLEFAST_CHECKS", "1")
    recorder, (runs, step), buffers = Recorder(), _counter(), _buffers()
    graphs = StepGraphs(recorder)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            graphs.run("a", buffers, step)
    assert "capture" not in recorder.log and len(runs) == 4
    assert "STYLEFAST_CHECKS=1" in caplog.text


def test_as_many_shapes_as_tables_are_kept():
    recorder, (_, step), buffers = Recorder(), _counter(), _buffers()
    graphs = StepGraphs(recorder)
    for key in range(MOST_GRAPHS + 5):
        for _ in range(3):
            graphs.run(key, buffers, step)
    assert len(graphs) == MOST_GRAPHS


class Gpu:
    """What captures ask of torch.cuda: streams, graphs, and an allocator that knows which captures are under way.

    `refuses` names what CUDA refuses: to "begin", "end" or "instantiate" a graph.
    """

    def __init__(self, free=10_000):
        self.log, self.refuses, self.free = [], "", free
        self.current, self.under_way, self.used = "default", [], Counter()
        self.reserved, self.pools = 1000, (f"pool {number}" for number in itertools.count(1))

    def stream(self, name):
        return SimpleNamespace(
            name=name, device=DEVICE, wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}")
        )

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def graph(self):
        return FakeGraph(self)

    def event(self):
        return SimpleNamespace(
            record=lambda stream: self.log.append(f"mark on {stream.name}"),
            synchronize=lambda: self.log.append("host waits for the mark"),
        )

    def end(self, index, pool):
        assert index == DEVICE.index
        if pool not in self.under_way:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.under_way.remove(pool)

    def release(self, index, pool):
        self.used[pool] -= 1


class FakeGraph:
    """A CUDAGraph whose parts happen in PyTorch's order: CUDA's refusal keeps the allocator from being told."""

    def __init__(self, gpu):
        self.gpu, self.capturing, self.pool, self.ended = gpu, False, None, False

    def capture_begin(self, pool, capture_error_mode):
        self.gpu.log.append(f"capture in {pool}, {capture_error_mode}")
        self.pool = pool
        self.gpu.under_way.append(pool)
        self.gpu.used[pool] += 1
        if self.gpu.refuses == "begin":
            raise RuntimeError("CUDA: begin")
        self.capturing = True

    def capture_end(self):
        if not self.capturing:
            raise RuntimeError("capture_end() called before capture_begin().")
        assert self.gpu.current == "side"
        self.capturing = False
        if self.gpu.refuses == "end":
            raise RuntimeError("CUDA: operation failed due to a previous error during capture")
        self.gpu.end(DEVICE.index, self.pool)
        self.ended = True
        if self.gpu.refuses == "instantiate":
            raise RuntimeError("CUDA: instantiate")
        self.gpu.reserved += 512
        self.gpu.log.append("captured")

    def replay(self):
        self.gpu.log.append("replay")

    def reset(self):
        self.gpu.log.append("reset")
        if self.ended:
            self.gpu.release(DEVICE.index, self.pool)
        self.ended = False


DEVICE = torch.device("cuda", 1)


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    stand_ins = {
        "Stream": lambda device: gpu.stream("side"),
        "stream": gpu.on,
        "CUDAGraph": gpu.graph,
        "Event": gpu.event,
        "device": lambda which: nullcontext(),
        "current_stream": lambda device: gpu.stream("current"),
        "graph_pool_handle": lambda: next(gpu.pools),
        "mem_get_info": lambda device: (gpu.free, 10_000),
        "synchronize": lambda device: gpu.log.append(f"synchronise {device}"),
        "empty_cache": lambda: gpu.log.append("empty"),
        "memory_reserved": lambda device: gpu.reserved,
        "memory_allocated": lambda device: 300,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", gpu.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", gpu.release, raising=False)
    monkeypatch.setattr(capturing, "_broken", [])
    return gpu


def test_warm_steps_run_on_the_side_stream_between_two_waits(gpu):
    CudaCapture(DEVICE).warm(lambda: gpu.log.append(f"step on {gpu.current}"))
    assert gpu.log == ["side waits for current", "step on side", "current waits for side"]
    assert gpu.current == "default"


def test_a_capture_waits_for_nothing_lets_other_threads_work_and_tells_how_the_pool_grew(gpu):
    captured = CudaCapture(DEVICE).capture(lambda: gpu.log.append(f"step on {gpu.current}"))
    assert gpu.log == ["capture in pool 1, thread_local", "step on side", "captured"]
    assert captured.nbytes == 512 and gpu.current == "default" and gpu.under_way == []
    captured.replay()
    captured.reset()
    assert gpu.log[-3:] == ["replay", "mark on current", "reset"] and gpu.used["pool 1"] == 0


def test_a_graph_is_freed_after_the_last_replay_and_not_when_the_device_is_idle(gpu):
    graphs, buffers, (_, step) = StepGraphs(CudaCapture(DEVICE), limit=1), _buffers(), _counter()
    for _ in range(4):
        graphs.run("a", buffers, step)
    gpu.log.clear()
    for _ in range(3):
        graphs.run("b", buffers, step)  # in place of a
    graphs.reset()
    freed = ["host waits for the mark", "reset"]
    assert gpu.log[:2] == freed and gpu.log[-4:] == ["replay", "mark on current", *freed]
    assert not [line for line in gpu.log if line.startswith("synchronise")]


def test_graphs_that_never_ran_are_waited_for_by_nobody(gpu):
    capture = CudaCapture(DEVICE)
    capture.capture(lambda: None)
    gpu.log.clear()
    capture.wait()
    assert gpu.log == []


def test_what_the_allocator_keeps_is_given_back_only_where_a_capture_would_find_no_room(gpu):
    gpu.free = 699  # PyTorch keeps 1000 - 300 bytes for later
    CudaCapture(DEVICE).capture(lambda: None)
    assert gpu.log[:2] == ["synchronise cuda:1", "empty"]


def broken_step():
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    "refused, step",
    [("begin", int), ("end", int), ("instantiate", int), ("", broken_step), ("end", broken_step)],
    ids=[
        "capture that does not begin",
        "invalidated capture",
        "graph that is refused",
        "step that fails",
        "step that invalidates the capture",
    ],
)
def test_stream_and_allocator_are_as_before_after_a(gpu, refused, step):
    capture, gpu.refuses = CudaCapture(DEVICE), refused
    with pytest.raises(RuntimeError, match="not permitted" if step is broken_step else "CUDA"):
        capture.capture(step)
    assert gpu.current == "default"
    assert gpu.under_way == [], "the allocator would take the capture for still running"
    assert gpu.used["pool 1"] == 0, "the pool's memory would never be free again"
    # PyTorch's allocator of pinned memory keeps asking a graph whose capture it was not told the end of
    assert len(capturing._broken) == (refused in ("begin", "end"))
    gpu.refuses = ""
    capture.capture(lambda: None)
    assert "capture in pool 2, thread_local" in gpu.log, "the pool in which a capture broke was used again"


def test_without_the_allocators_own_functions_the_stream_is_still_restored(gpu, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    gpu.refuses = "end"
    with pytest.raises(RuntimeError, match="previous error"):
        CudaCapture(DEVICE).capture(lambda: None)
    assert gpu.current == "default"


def test_pytorchs_own_context_would_leave_the_thread_on_the_side_stream(gpu, monkeypatch):
    """Why captures don't use `torch.cuda.graph`; should PyTorch restore the stream one day, they may."""
    left = []
    monkeypatch.setattr(gpu, "on", lambda stream: _Entered(left))
    monkeypatch.setattr(torch.cuda, "stream", gpu.on)
    graph = SimpleNamespace(capture_end=broken_step)
    with pytest.raises(RuntimeError, match="not permitted"):
        torch.cuda.graph(graph, stream=gpu.stream("side")).__exit__(None, None, None)
    assert left == []


class _Entered:
    def __init__(self, left):
        self.left = left

    def __exit__(self, *_):
        self.left.append("left")
