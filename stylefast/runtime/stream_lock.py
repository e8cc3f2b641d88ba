"""The runtime's lock, which on a GPU also puts its holders on one stream.

Pages, latents and tables are shared by all threads that run steps: callers of `generate`, each on its thread's current
stream, and the thread behind `submit`. Work on different streams is unordered. So the runtime has one stream, and the
lock's holder works on it: it first waits for earlier work on the caller's stream, and the caller's stream then waits
for it. The host waits for neither.
"""

from collections.abc import Callable
from typing import Any

import torch

from stylefast.runtime.fair_lock import FairLock


class StreamLock(FairLock):
    """A `FairLock` that makes the runtime's stream and device current for its outermost holder."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._entered = None  # torch's context of the current holder
        self._caller = None  # the holder's original stream

    def __enter__(self) -> "StreamLock":
        super().__enter__()
        if self._stream is not None and self._depth == 1:
            try:
                self._caller = torch.cuda.current_stream(self._device)
                self._stream.wait_stream(self._caller)
                self._entered = torch.cuda.stream(self._stream)
                self._entered.__enter__()
            except BaseException:
                super().__exit__()
                raise
        return self

    def __exit__(self, *_) -> None:
        try:
            if self._stream is not None and self._depth == 1:
                self._entered.__exit__(None, None, None)
                self._caller.wait_stream(self._stream)
        finally:
            super().__exit__()

    def lend(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mark a tensor that the holder keeps, so that its memory is not reused before the holder's stream is done."""
        if self._stream is not None:
            tensor.record_stream(self._caller)
        return tensor

    def wait(self) -> None:
        """Wait until the device has finished all work of holders."""
        if self._stream is not None:
            self._stream.synchronize()


class SideStream(FairLock):
    """The lock, and on a GPU the stream, of calls alongside steps: one at a time, finished when it returns.

    The host waits for the device here, not the runtime's stream: all threads may share one stream, and through it a
    step would wait for a call that started before it.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def call(self, function: Callable[[], Any], reader: StreamLock) -> Any:
        """Call `function` on this stream; the caller and holders of `reader` may use the tensors it returns.

        The caller must hold this lock.
        """
        if self._stream is None:
            return function()
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            value = function()
        self._stream.synchronize()
        for tensor in _tensors(value):
            for stream in (caller, reader._stream):
                tensor.record_stream(stream)
        return value


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the GPU tensors in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_cuda else []
    return [x for one in value for x in _tensors(one)] if isinstance(value, (list, tuple)) else []
