"""Whole steps as CUDA graphs: a step of a known shape is one launch.

All buffers of a step keep their addresses, so its graph can be replayed on other contents. A capture records without
running; so the first steps of a shape run normally, which also compiles and tunes kernels, then one is captured and
replayed from there on.
"""

import logging
import os
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import torch

from stylefast.kernels.gpu.capture import capture
from stylefast.slots import LruDict

logger = logging.getLogger(__name__)

# steps per shape before the capture: the first compiles and tunes, the second fills the side stream's caches
WARM_STEPS = 2
# the number of shapes whose step buffers the runner keeps
MOST_GRAPHS = 32


class Captured(NamedTuple):
    """A graph, and the bytes by which its capture enlarged the shared pool."""

    replay: Callable[[], None]
    reset: Callable[[], None]
    nbytes: int


class Capture(Protocol):
    """A device's interface to record steps."""

    def warm(self, step: Callable[[], None]) -> None:
        """Run a step on the stream used for captures."""

    def capture(self, step: Callable[[], None]) -> Captured:
        """Record a step without running it. Raises any error of the capture; the step has not run then."""
        ...

    def wait(self) -> None:
        """Wait until the last replay is over, whatever else the device does."""


class CudaCapture:
    """CUDA graphs of one device, on their own stream and in a memory pool that all graphs share.

    Sharing is safe, because replays follow one another on one stream and leave nothing in the pool.
    """

    def __init__(self, device: torch.device):
        self._device, self._side = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._replayed: torch.cuda.Event | None = None  # after the last replay, on its stream

    def warm(self, step: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            step()
        current.wait_stream(self._side)

    def capture(self, step: Callable[[], None]) -> Captured:
        before = torch.cuda.memory_reserved(self._device)
        # memory cached by PyTorch after the warm steps is about what one step needs
        kept = before - torch.cuda.memory_allocated(self._device)
        try:
            graph = capture(step, self._side, self._pool, room=kept)
        except BaseException:
            # the state of a pool after a failed capture is undefined
            self._pool = torch.cuda.graph_pool_handle()
            raise

        def replay():
            graph.replay()
            if self._replayed is None:
                self._replayed = torch.cuda.Event()
            self._replayed.record(torch.cuda.current_stream(self._device))

        return Captured(replay, graph.reset, max(0, torch.cuda.memory_reserved(self._device) - before))

    def wait(self) -> None:
        # replays follow one another, so the last one is over last; the rest of the device has other users
        if self._replayed is not None:
            self._replayed.synchronize()


class StepGraphs:
    """Graphs by key; the least recently used are dropped first.

    limit: max graphs kept; a dropped shape is warmed and captured again when it returns.
    """

    def __init__(self, capture: Capture, limit: int = MOST_GRAPHS):
        self._capture, self._limit = capture, limit
        self._entries: LruDict[Hashable, _Entry] = LruDict()
        self._pool_bytes = 0

    def __len__(self) -> int:
        """Count the graphs that can be replayed."""
        return sum(entry.graph is not None for entry in self._entries.values())

    @property
    def nbytes(self) -> int:
        """Return the bytes of the graphs' pool, which is freed when the last graph is dropped."""
        return self._pool_bytes

    def run(self, key: Hashable, buffers: Sequence[torch.Tensor], step: Callable[[], None]) -> None:
        """Run `step` once, directly or as a replay.

        buffers: tensors that `step` reads or writes in place. A graph is replayed only on the buffers of its capture;
        it keeps none of them alive.
        """
        entry = self._entries.use(key)
        if entry is not None and not entry.reads(buffers):
            self._drop([key])
            entry = None
        if entry is None:
            self._drop([other for other, e in self._entries.items() if e.stale])
            self._drop(self._entries.beyond(self._limit - 1))
            entry = self._entries[key] = _Entry(buffers)
        if entry.graph is None and not entry.refused:
            if entry.steps < WARM_STEPS:
                self._capture.warm(step)
                entry.steps += 1
                return
            self._record(entry, step)
        if entry.graph is not None:
            entry.graph.replay()
        else:
            step()

    def reset(self) -> None:
        """Free all graphs and their memory."""
        self._drop(list(self._entries))

    def _record(self, entry: "_Entry", step: Callable[[], None]) -> None:
        if os.environ.get("STYLEFAST_CHECKS") == "1":
            entry.refused = True
            logger.warning(
                "no CUDA graph is captured: STYLEFAST_CHECKS=1 reads tables back on the host, which a graph can't "
                "do; steps run without graphs"
            )
            return
        try:
            entry.graph = self._capture.capture(step)
        except Exception as error:  # any failure: the step can still run without a graph
            entry.refused = True
            logger.warning("a step could not be captured as a CUDA graph and runs without one: %s", _one_line(error))
            return
        self._pool_bytes += entry.graph.nbytes

    def _drop(self, keys: Sequence[Hashable]) -> None:
        graphs = [entry.graph for entry in map(self._entries.pop, keys) if entry.graph is not None]
        if graphs:
            self._capture.wait()  # a replay may still be running
            for graph in graphs:
                graph.reset()
        if not len(self):
            self._pool_bytes = 0


class _Entry:
    """State of one shape: its number of steps, its graph, and the buffers that it reads."""

    def __init__(self, buffers: Sequence[torch.Tensor]):
        self._buffers = [weakref.ref(x) for x in buffers]
        self.steps, self.refused = 0, False
        self.graph: Captured | None = None

    def reads(self, buffers: Sequence[torch.Tensor]) -> bool:
        """Return whether these are exactly the captured tensors."""
        return len(buffers) == len(self._buffers) and all(ref() is x for ref, x in zip(self._buffers, buffers))

    @property
    def stale(self) -> bool:
        """Return whether a buffer is gone, so that this graph can't be used again."""
        return any(ref() is None for ref in self._buffers)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
