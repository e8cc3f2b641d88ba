"""The runtime's lock, which on a GPU also puts its holders on one stream.

Pages, latents and tables are shared by whoever takes a step: callers of `generate`, each on the stream that is current
in its thread, and the thread behind `submit`. Two streams know nothing of one another's order. So there is one stream
for all that the runtime does, and whoever takes the lock works on it: it first waits for what the caller's own stream
has before, and the caller's stream then waits for it. The host waits for neither.
"""

from collections.abc import Callable
from typing import Any

import torch

from stylefast.runtime.fair_lock import FairLock


class StreamLock(FairLock):
    """A `FairLock` whose outermost holder has the runtime's stream, and its device, as the current ones."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._entered = None  # torch's context of the present holder
        self._caller = None  # and the stream that it came from

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
        """A tensor that leaves with the present holder: its memory is not used again before the holder's stream has
        done with it."""
        if self._stream is not None:
            tensor.record_stream(self._caller)
        return tensor

    def wait(self) -> None:
        """Wait until the device has done all that holders have asked of it."""
        if self._stream is not None:
            self._stream.synchronize()


class SideStream(FairLock):
    """The lock of what runs beside steps, and on a GPU its stream: one call at a time, done when it returns.

    The host waits for the device here, and not the runtime's stream: all threads may have the same stream as their
    own, and through it a step would wait for the end of a call that was begun before it.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def call(self, function: Callable[[], Any], reader: StreamLock) -> Any:
        """Call `function` on this stream; the tensors that it returns are for the caller and for holders of `reader`.

        The caller holds this lock.
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
    """The tensors on a GPU in nested lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_cuda else []
    return [x for one in value for x in _tensors(one)] if isinstance(value, (list, tuple)) else []
