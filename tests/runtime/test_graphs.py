"""Steps as CUDA graphs, on stand-ins: when one is captured, replayed, dropped or refused, and what it costs."""

import gc
import logging
from contextlib import contextmanager

import pytest
import torch

from stylefast.runtime.graphs import MOST_GRAPHS, WARM_STEPS, Captured, CudaCapture, StepGraphs


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
    graphs.forget()
    assert graphs.nbytes == 0 and len(graphs) == 0
    graphs.run("a", buffers, step)
    assert recorder.log[-1] == "warm"


@pytest.mark.parametrize("failure", [RuntimeError("operation not permitted\n when stream is capturing"),
                                     torch.OutOfMemoryError("CUDA out of memory")])  # fmt: skip
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


@pytest.fixture
def gpu(monkeypatch):
    """What CudaCapture asks of torch.cuda, in the order in which it is asked."""
    log = []

    class Stream:
        def __init__(self, device=None, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def stream(which):
        log.append(f"on {which.name}")
        yield
        log.append(f"off {which.name}")

    class Graph:
        reset = staticmethod(lambda: log.append("reset"))
        replay = staticmethod(lambda: log.append("replay"))

    @contextmanager
    def graph(captured, pool, side, capture_error_mode):
        assert isinstance(captured, Graph) and side.name == "side"
        log.append(f"capture in {pool}, {capture_error_mode}")
        yield
        reserved[0] += 512
        log.append("captured")

    @contextmanager
    def device(which):
        yield

    reserved, pools = [1000], iter(["pool 1", "pool 2"])
    stand_ins = {
        "Stream": Stream, "stream": stream, "CUDAGraph": Graph, "graph": graph, "device": device,
        "current_stream": lambda device: Stream(name="current"), "graph_pool_handle": lambda: next(pools),
        "synchronize": lambda device=None: log.append("synchronise"), "empty_cache": lambda: log.append("empty"),
        "memory_reserved": lambda: reserved[0],
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return log


def test_warm_steps_run_on_the_side_stream_between_two_waits(gpu):
    CudaCapture(torch.device("cuda")).warm(lambda: gpu.append("step"))
    assert gpu == ["side waits for current", "on side", "step", "off side", "current waits for side"]


def test_a_capture_lets_other_threads_work_and_tells_how_the_pool_grew(gpu):
    captured = CudaCapture(torch.device("cuda")).capture(lambda: gpu.append("step"))
    assert gpu == ["synchronise", "empty", "capture in pool 1, thread_local", "step", "captured"]
    assert captured.nbytes == 512
    captured.replay()
    captured.reset()
    assert gpu[-2:] == ["replay", "reset"]


def test_a_pool_in_which_a_capture_broke_is_not_used_again(gpu):
    capture = CudaCapture(torch.device("cuda"))

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        capture.capture(fails)
    capture.capture(lambda: None)
    assert "capture in pool 2, thread_local" in gpu
