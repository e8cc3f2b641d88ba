"""A GPU's streams: one for steps, whichever thread runs them, and one for work alongside them.

Pages, latents and tables are shared by all threads that run steps, each with its own current stream. Work on different
streams is unordered, so all steps use one stream: it first waits for earlier work on the caller's stream, and the
caller's stream then waits for it. The host waits for neither. On a CPU all of this does nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch


class StepStream:
    """Context manager that makes the stream of steps current; for one thread at a time, which may enter it again."""

    def __init__(self, device: torch.device):
        self._device, self._depth = device, 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._entered: AbstractContextManager | None = None  # torch's context
        self._caller: torch.cuda.Stream | None = None

    def __enter__(self) -> "StepStream":
        if self._stream is not None and self._depth == 0:
            self._caller = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(self._caller)
            self._entered = torch.cuda.stream(self._stream)
            self._entered.__enter__()
        self._depth += 1
        return self

    def __exit__(self, *_) -> None:
        self._depth -= 1
        if self._stream is not None and self._depth == 0 and self._entered is not None and self._caller is not None:
            self._entered.__exit__(None, None, None)
            self._caller.wait_stream(self._stream)

    def join(self) -> None:
        """Make the calling thread's stream wait for all steps so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def lend(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mark a tensor that steps made and the calling thread keeps, so that its memory is not reused too early."""
        if self._stream is not None:
            tensor.record_stream(torch.cuda.current_stream(self._device))
        return tensor

    def take(self, tensor: torch.Tensor) -> None:
        """Mark a tensor of another stream that steps will read."""
        if self._stream is not None:
            tensor.record_stream(self._stream)

    def mark(self) -> Callable[[], None]:
        """Return a function that makes the host wait for all steps so far."""
        if self._stream is None:
            return _nothing
        event = torch.cuda.Event()
        event.record(self._stream)
        return event.synchronize


class SideStream:
    """The stream of calls alongside steps, each finished when it returns; for one thread at a time.

    The host waits for the device here, not the stream of steps: otherwise a step would wait for a call that started
    before it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def call(self, function: Callable[[], Any], reader: StepStream) -> Any:
        """Call `function` on this stream; the caller and `reader` may use the tensors it returns."""
        if self._stream is None:
            return function()
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            value = function()
        self._stream.synchronize()
        for tensor in _tensors(value):
            tensor.record_stream(caller)
            reader.take(tensor)
        return value


@contextmanager
def own_settings(device: torch.device) -> Iterator[None]:
    """Run steps of all jobs regardless of the calling thread's settings, such as autocast or a default device."""
    with ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def _nothing() -> None:
    """Do nothing: work on a CPU is done when its call returns."""


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the GPU tensors in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_cuda else []
    return [x for one in value for x in _tensors(one)] if isinstance(value, (list, tuple)) else []
