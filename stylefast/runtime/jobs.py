"""Requests in progress: state, result and previews of submitted ones and of those that a caller waits for."""

import asyncio
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stylefast import values
from stylefast.errors import DeadlineExceeded, EngineClosed, InvalidRequest, JobCancelled, OutOfMemory
from stylefast.models.row_features import Recorder
from stylefast.runtime.admission import RequestPlanner
from stylefast.runtime.helper import AGAIN
from stylefast.runtime.loras import Lora
from stylefast.runtime.memory import is_out_of_memory
from stylefast.runtime.plan.request import Request
from stylefast.runtime.plan.sample import Sample, SampleGroup
from stylefast.runtime.runner import Runner

logger = logging.getLogger(__name__)

# makes a job's result from its latents by output number: a generator that yields between pieces of work
Make = Callable[["Job", Mapping[int, torch.Tensor]], Generator[None, None, Any]]
# called after every step with (step, steps of the longest request, latents of the requested pictures that are still
# running)
StepCallback = Callable[[int, int, torch.Tensor], None]

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"


@dataclass(frozen=True, eq=False)
class Preview:
    """A job's preview after one of its steps: the model's estimate of the noise-free picture.

    `latents` [pictures, channels, h, w] are those of the requested pictures, on the CPU; `images()` turns them into
    small PIL pictures.
    """

    step: int  # steps done
    steps: int  # in total
    latents: torch.Tensor
    decode: Callable[[torch.Tensor], list] = field(repr=False)

    def images(self) -> list:
        """Return PIL images from the engine's preview decoder; cheap compared with a step."""
        return self.decode(self.latents)


class Job:
    """The result of `Engine.submit`. Its methods may be called from any thread.

    `await job` and `async for preview in job` work in any event loop; a slow reader of previews misses some, but never
    the last one. `step` of `steps` are done.

    Examples:
        >>> job = engine.submit(sf.Request("a fish", steps=2))
        >>> result = job.result(timeout=600)
        >>> job.status, job.step, job.steps
        ('done', 2, 2)
        >>> job.cancel()  # too late
        False
    """

    has_caller = False  # whether a caller waits for it and runs its steps
    collects = False  # whether its groups run alone, one by one, for what `before_step` collects

    def __init__(
        self,
        requests: Sequence[Request],
        make: Make,
        cancel: Callable[["Job"], None],
        deadline: float | None = None,
        output: str = "pil",
        metadata: Sequence[dict] = (),
        inside: Callable[[], bool] = lambda: False,
        alone: bool = False,
        loras: Mapping[str, Lora] | None = None,
    ):
        self.requests, self.output, self.metadata = tuple(requests), output, list(metadata)
        self.make, self.alone = make, alone
        self._loras = loras  # those that the requests' names mean, even if a name is free or another's by now
        self.step, self.steps = 0, max(request.steps for request in requests)
        self.submitted = time.monotonic()
        self.expires = None if deadline is None else self.submitted + deadline
        self._cancel, self._inside, self._process = cancel, inside, os.getpid()
        self._lock = threading.RLock()  # reentrant: a reader may be collected at any time, even under this lock
        self._finished = threading.Event()
        self._status = QUEUED
        self._result: Any = None
        self._error: BaseException | None = None
        self._watchers: list[Callable[[Preview | None], None]] = []
        # used by the scheduler
        self.number = 0  # in the order of arrival
        self.samples: list[Sample] | None = None
        self.model: str | None = None  # the fingerprint that `samples` were planned for
        self.admission: Any = None
        self.groups: list[SampleGroup] = []
        self.running: list[SampleGroup] = []
        self.latents: dict[int, torch.Tensor] = {}
        self.due: deque[Callable[[], None]] = deque()  # calls to make in the caller's thread before the next step
        self.cancelled = False
        self.queued_again = False  # found no room
        self.behind: int | None = None  # the scheduler's count of departures when it was: it waits for the next
        self.made_room = False  # of what was kept for later requests

    @property
    def status(self) -> str:
        """Return "queued", "running", "done", "failed" or "cancelled"."""
        return self._status

    def done(self) -> bool:
        """Return whether the job has ended, in any way."""
        return self._finished.is_set()

    def result(self, timeout: float | None = None):
        """Wait and return the `Result`.

        Raises the job's error: JobCancelled, DeadlineExceeded, NumericsError, OutOfMemory, EngineClosed, InvalidRequest
        or a subclass; TimeoutError if it is not done within `timeout` seconds (it continues then). Also raises
        InvalidRequest where waiting would block the job: in a callback, which runs in a thread of the engine. Raises
        EngineClosed for an unfinished job in a process forked from the job's own.
        """
        if timeout is not None:
            timeout = min(values.real_number("timeout", timeout, 0, also=(math.inf,)), threading.TIMEOUT_MAX)
        if not self.done():
            self._check_process()
            if self._inside():
                raise InvalidRequest(
                    f"the job is {self.status}, and its steps or pictures wait for the thread that this callback "
                    "runs in; get the result in another thread, or in a callback of that job"
                )
        # a finished job is read without the lock, which may be held forever in a forked process
        if not (self.done() or self._finished.wait(timeout)):
            raise TimeoutError(f"the job is {self.status} at step {self.step} of {self.steps} after {timeout} seconds")
        if self._error is not None:
            raise self._error
        return self._result

    def exception(self) -> BaseException | None:
        """Return the job's error; None if it is unfinished or succeeded."""
        return self._error

    def cancel(self) -> bool:
        """Cancel the job: at once if it waits, after the current step if it runs. Returns False if it has ended.

        Also returns False in a process forked from the job's own, where it does not run.
        """
        if self.done() or os.getpid() != self._process:
            return False
        self._cancel(self)
        return True

    def add_done_callback(self, call: Callable[["Job"], None]) -> None:
        """Arrange for `call(job)` in a thread of the engine when the job ends; at once if it has ended.

        Exceptions in it are logged, and other jobs continue. It must not wait for jobs of the same engine.
        """

        def tell(preview: Preview | None) -> None:
            if preview is None:
                call(self)

        self._watch(tell, wants_previews=False)

    def __await__(self):
        """Wait for the result, or raise the job's error; cancelling the waiting task cancels the job."""
        return self._as_future().__await__()

    def __aiter__(self) -> "Previews":
        return Previews(self)

    async def _as_future(self):
        loop = asyncio.get_running_loop()
        over = asyncio.Event()

        def tell(preview: Preview | None) -> None:
            if preview is None and not loop.is_closed():
                loop.call_soon_threadsafe(over.set)

        self._watch(tell, wants_previews=False)
        try:
            await over.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            self._forget(tell)
        return self.result(0)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise EngineClosed(
                f"the job was {self.status} in another process when this one was forked from it; it continues there"
            )

    def _watch(self, tell: Callable[[Preview | None], None], wants_previews: bool = True) -> None:
        if not self.done():
            self._check_process()
        with self._lock:
            if not self.done():
                tell.wants_previews = wants_previews
                self._watchers.append(tell)
                return
        self._tell([tell], None)

    def _tell(self, watchers: Sequence[Callable[[Preview | None], None]], preview: Preview | None) -> None:
        interrupted = None
        for tell in watchers:
            try:
                tell(preview)
            except KeyboardInterrupt as error:  # meant for the program, raised after all watchers were notified
                interrupted = error
            except BaseException:  # errors of the watcher, including SystemExit, must not stop the loop's other jobs
                logger.exception("a watcher of a job raised an error at step %d of %d", self.step, self.steps)
        if interrupted is not None:
            raise interrupted

    def _forget(self, tell) -> None:
        if os.getpid() != self._process:
            return
        with self._lock:
            if tell in self._watchers:
                self._watchers.remove(tell)

    # called by the scheduler

    def plan(self, planner: RequestPlanner) -> None:
        """Plan the samples for the model as it is now. Raises InvalidRequest or a subclass."""
        self.samples, self.model = planner.samples(self.requests, self._loras), planner.fingerprint()
        self.steps = max(sample.schedule.steps - sample.first for sample in self.samples)

    def may_step(self, group: SampleGroup) -> bool:
        """Return whether a group need not wait for others of its job."""
        return True

    def before_step(self, runner: Runner, group: SampleGroup) -> Recorder | None:
        """Return what records the next step of a group, for a job that `collects`."""
        return None

    def after_step(self, runner: Runner, groups: Sequence[SampleGroup]) -> Sequence[Callable[[], None]]:
        """Return the functions that the caller's thread must call after a step of `groups`."""
        return ()

    @property
    def wants_previews(self) -> bool:
        """Return whether anything reads previews."""
        with self._lock:
            return any(tell.wants_previews for tell in self._watchers)

    def start(self) -> None:
        """Mark the job as running."""
        self._status = RUNNING

    def show(self, preview: Preview) -> None:
        """Pass a preview to all watchers."""
        with self._lock:
            watchers = [tell for tell in self._watchers if tell.wants_previews]
        self._tell(watchers, preview)

    def finish(self, result: Any = None, error: BaseException | None = None) -> bool:
        """End the job; return False if it had already ended."""
        with self._lock:
            if self._finished.is_set():
                return False
            self._result, self._error = result, error
            self._status = DONE if error is None else CANCELLED if isinstance(error, JobCancelled) else FAILED
            self._finished.set()
            watchers, self._watchers = self._watchers, []
            # otherwise a finished job would keep the whole model alive
            self._cancel, self._inside, self.make = _nothing_to_cancel, bool, _nothing_to_make
            self.samples = self._loras = None
        self._tell(watchers, None)
        return True


class Call(Job):
    """A call of `Engine.generate`. Its `callback`, if any, is called in its own thread, and no step waits for that."""

    has_caller = True

    def __init__(self, *arguments: Any, callback: StepCallback | None = None, **options: Any):
        super().__init__(*arguments, **options)
        self._callback = callback

    def may_step(self, group: SampleGroup) -> bool:
        """Make all pictures of a size take a step, which the callback sees together, before any takes the next."""
        return self._callback is None or all(g.done >= min(group.done, g.total) for g in self._alike(group))

    def after_step(self, runner: Runner, groups: Sequence[SampleGroup]) -> Sequence[Callable[[], None]]:
        """Return the callback's calls, one for each size whose pictures have all made the step."""
        if self._callback is None:
            return ()
        sizes = {group.shown_shape: group for group in reversed(groups)}  # windows of larger pictures step with others
        calls = [self._call(runner, group, self._callback) for group in sizes.values()]
        return [call for call in calls if call is not None]

    def _call(self, runner: Runner, group: SampleGroup, call: StepCallback) -> Callable[[], None] | None:
        alike, done = self._alike(group), group.done
        if any(g.done < min(done, g.total) for g in alike):
            return None
        latents = torch.cat([runner.shown_of(g) for g in alike if g.done == done])
        return lambda: call(done, max(g.total for g in alike), runner.stream.lend(latents))

    def _alike(self, group: SampleGroup) -> list[SampleGroup]:
        return [g for g in self.groups if g.shown_shape == group.shown_shape]


def pieces(job: Job, making: Generator[None, None, Any], ready: Callable[[], None]) -> Callable[[], Any]:
    """Return a helper task that makes a job's result piece by piece, until complete or the job is cancelled.

    ready: waits until the device has computed the data for the result.
    """

    def piece() -> Any:
        if job.expires is not None and time.monotonic() >= job.expires:
            making.close()
            raise too_late(job)
        ready()
        if job.cancelled:
            making.close()
            raise cancelled(job)
        try:
            next(making)
        except StopIteration as end:
            return end.value
        return AGAIN

    return piece


def cancelled(job: Job) -> JobCancelled:
    """Return the error of a cancelled job."""
    return JobCancelled(f"the job was cancelled at step {job.step} of {job.steps}")


def too_late(job: Job) -> DeadlineExceeded:
    """Return the error of a job whose deadline has passed."""
    assert job.expires is not None
    given = job.expires - job.submitted
    return DeadlineExceeded(f"the deadline of {given:g} seconds passed at step {job.step} of {job.steps}")


def explained(job: Job, error: BaseException) -> BaseException:
    """Return the error of a job; if it ran out of memory, with a way out."""
    if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
        return error
    count = len(job.requests)
    what = "the picture does not" if count == 1 else f"{count} pictures don't"
    return OutOfMemory(
        f"{what} fit into memory; ask for fewer or smaller ones at once, or load the model in half precision "
        f"({str(error).partition(chr(10))[0][:200]})"
    )


class Previews:
    """The previews of a job in an event loop, for `async for`; ends with the job, and raises its error.

    Cancelling the reader's task cancels the job; merely leaving the loop does not.
    """

    def __init__(self, job: Job):
        self._job, self._over = job, False
        self._reader: asyncio.Task | None = None
        self._latest: asyncio.Queue | None = None
        self._tell: Callable[[Preview | None], None] | None = None

    def __aiter__(self) -> "Previews":
        return self

    async def __anext__(self) -> Preview:
        if self._over:
            raise StopAsyncIteration
        latest, self._reader = self._begin(), asyncio.current_task()
        try:
            preview = await latest.get()
        except asyncio.CancelledError:
            self._leave()
            raise
        while preview is not None and not latest.empty():
            # skip to the newest preview
            newer = latest.get_nowait()
            if newer is None:
                latest.put_nowait(None)
                break
            preview = newer
        if preview is not None:
            return preview
        self._leave()
        error = self._job.exception()
        raise StopAsyncIteration if error is None else error

    async def aclose(self) -> None:
        """Stop reading; no more previews are made for this reader."""
        self._leave()

    def __del__(self):
        self._leave()

    def _begin(self) -> asyncio.Queue:
        if self._latest is None:
            loop, latest = asyncio.get_running_loop(), asyncio.Queue()

            def tell(preview: Preview | None) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(latest.put_nowait, preview)

            self._latest, self._tell = latest, tell
            self._job._watch(tell)
        return self._latest

    def _leave(self) -> None:
        if self._over:
            return
        self._over = True
        if self._tell is not None:
            self._job._forget(self._tell)
        # a task cancelled while it handles a preview drops this iterator
        if self._reader is not None and (self._reader.cancelling() or self._reader.cancelled()):
            self._job.cancel()


def _nothing_to_cancel(job: Job) -> None:
    """Do nothing: replaces `cancel` of a finished job."""


def _nothing_to_make(job: Job, latents: Mapping[int, torch.Tensor]) -> Generator[None, None, None]:
    """Make nothing: replaces `make` of a finished job, which would keep the model alive."""
    yield
