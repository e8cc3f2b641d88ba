"""A request that was submitted: its state, its result, and what can be seen on the way."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stylefast import values
from stylefast.errors import JobCancelled
from stylefast.runtime.group import Group
from stylefast.runtime.request import Request

logger = logging.getLogger(__name__)

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"


@dataclass(frozen=True, eq=False)
class Preview:
    """A job after one of its steps: what the model sees behind the noise.

    `latents` [pictures, channels, h, w] are those of the pictures asked for, on the CPU; `images()` makes small PIL
    pictures of them.
    """

    step: int  # steps done
    steps: int  # of all
    latents: torch.Tensor
    decode: Callable[[torch.Tensor], list] = field(repr=False)

    def images(self) -> list:
        """PIL images by the engine's preview decoder; cheap next to a step."""
        return self.decode(self.latents)


class Job:
    """What `Engine.submit` gives back. Its methods may be called from any thread.

    `await job` and `async for preview in job` work in any event loop; a slow reader of previews misses some, never the
    last one. `status` is "queued", "running", "done", "failed" or "cancelled"; `step` of `steps` are done.
    """

    def __init__(
        self, requests: Sequence[Request], cancel: Callable[["Job"], None], deadline: float | None = None,
        output: str = "pil", metadata: Sequence[dict] = (),
    ):  # fmt: skip
        self.requests, self.output, self.metadata = tuple(requests), output, list(metadata)
        self.step, self.steps = 0, max(request.steps for request in requests)
        self.submitted = time.monotonic()
        self.expires = None if deadline is None else self.submitted + deadline
        self._cancel = cancel
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._status = QUEUED
        self._result: Any = None
        self._error: BaseException | None = None
        self._watchers: list[Callable[[Preview | None], None]] = []
        # of the batch loop
        self.groups: list[Group] = []
        self.running: list[Group] = []
        self.latents: dict[int, torch.Tensor] = {}
        self.cancelled = False

    @property
    def status(self) -> str:
        """One of "queued", "running", "done", "failed", "cancelled"."""
        return self._status

    def done(self) -> bool:
        """Whether it is over, in whatever way."""
        return self._finished.is_set()

    def result(self, timeout: float | None = None):
        """Wait and return the `Result`.

        Raises what the job failed with: JobCancelled, DeadlineExceeded, NumericsError, OutOfMemory, EngineClosed,
        InvalidRequest and its kin; TimeoutError if it is not over within `timeout` seconds (it goes on then).
        """
        if timeout is not None:
            timeout = min(values.real_number("timeout", timeout, 0, also=(math.inf,)), threading.TIMEOUT_MAX)
        if not self._finished.wait(timeout):
            raise TimeoutError(f"the job is {self.status} at step {self.step} of {self.steps} after {timeout} seconds")
        if self._error is not None:
            raise self._error
        return self._result

    def exception(self) -> BaseException | None:
        """What it failed with; None if it is not over or went well."""
        return self._error

    def cancel(self) -> bool:
        """Stop it: at once if it waits, after the present step if it runs. False if it was over already."""
        if self.done():
            return False
        self._cancel(self)
        return True

    def add_done_callback(self, call: Callable[["Job"], None]) -> None:
        """Have `call(job)` called when it is over, from the loop's thread; at once if it is over already.

        What it raises is logged and harms nobody.
        """

        def tell(preview: Preview | None) -> None:
            if preview is None:
                call(self)

        self._watch(tell, wants_previews=False)

    def __await__(self):
        return self._as_future().__await__()

    async def __aiter__(self) -> AsyncIterator[Preview]:
        loop, latest = asyncio.get_running_loop(), asyncio.Queue()

        def tell(preview: Preview | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(latest.put_nowait, preview)

        self._watch(tell)
        try:
            while True:
                preview = await latest.get()
                while not latest.empty():
                    # a newer one makes those before it worthless
                    newer = latest.get_nowait()
                    if newer is None:
                        latest.put_nowait(None)
                        break
                    preview = newer
                if preview is None:
                    break
                yield preview
        finally:
            self._forget(tell)
        if self._error is not None:
            raise self._error

    async def _as_future(self):
        loop = asyncio.get_running_loop()
        over = asyncio.Event()

        def tell(preview: Preview | None) -> None:
            if preview is None and not loop.is_closed():
                loop.call_soon_threadsafe(over.set)

        self._watch(tell, wants_previews=False)
        try:
            await over.wait()
        finally:
            self._forget(tell)
        return self.result(0)

    def _watch(self, tell: Callable[[Preview | None], None], wants_previews: bool = True) -> None:
        with self._lock:
            if not self.done():
                tell.wants_previews = wants_previews
                self._watchers.append(tell)
                return
        self._tell([tell], None)

    def _tell(self, watchers: Sequence[Callable[[Preview | None], None]], preview: Preview | None) -> None:
        for tell in watchers:
            try:
                tell(preview)
            except BaseException:  # the watcher's own, SystemExit included; the loop has other jobs to run
                logger.exception("what watches a job at step %d of %d raised", self.step, self.steps)

    def _forget(self, tell) -> None:
        with self._lock:
            if tell in self._watchers:
                self._watchers.remove(tell)

    # called by the batch loop

    @property
    def wants_previews(self) -> bool:
        """Whether a preview is worth making."""
        with self._lock:
            return any(tell.wants_previews for tell in self._watchers)

    def start(self) -> None:
        """It has joined the batch."""
        self._status = RUNNING

    def show(self, preview: Preview) -> None:
        """Hand a preview to those who watch."""
        with self._lock:
            watchers = [tell for tell in self._watchers if tell.wants_previews]
        self._tell(watchers, preview)

    def finish(self, result: Any = None, error: BaseException | None = None) -> bool:
        """It is over; False if it was before."""
        with self._lock:
            if self._finished.is_set():
                return False
            self._result, self._error = result, error
            self._status = DONE if error is None else CANCELLED if isinstance(error, JobCancelled) else FAILED
            self._finished.set()
            watchers, self._watchers = self._watchers, []
            self._cancel = _nothing_to_cancel  # else a finished job would keep the whole model alive
        self._tell(watchers, None)
        return True


def _nothing_to_cancel(job: Job) -> None:
    """What a finished job does on `cancel`."""


__all__ = ["CANCELLED", "DONE", "FAILED", "QUEUED", "RUNNING", "Job", "Preview"]
