"""Continuous batching: one thread that runs the steps of all jobs, and jobs that join and leave between steps.

Every step the loop takes the groups that have waited longest for one, all of one size, as many as fit. So jobs of
different styles, samplers, step counts and guidance share a UNet call, one that came late joins as soon as its prompts
and pictures are encoded, and a long job can't keep a short one waiting: where not all fit, they take turns. What a job
needs beside steps is done by a helper while steps go on.
"""

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch

from stylefast.errors import (
    EngineClosed,
    NumericsError,
    OutOfMemory,
    QueueFull,
    StyleFastError,
)
from stylefast.runtime.admission import Admission
from stylefast.runtime.core import Runtime
from stylefast.runtime.group import Group
from stylefast.runtime.helper import Helper
from stylefast.runtime.jobs import Job, Preview
from stylefast.runtime.joining import Call, Joining, cancelled, pieces, too_late
from stylefast.runtime.loop import results
from stylefast.runtime.memory import give_back, is_out_of_memory
from stylefast.runtime.preparing import Preparer

# pictures on their way at once; beyond it jobs wait, as their latents and prompts take memory too
MOST_PICTURES = 256
# seconds without work after which the thread ends; the next job starts another
_IDLE_SECONDS = 2.0
# seconds between two attempts to join, and between two looks at deadlines, while nothing else is to be done
_PAUSE_SECONDS = 0.02
_started: "weakref.WeakSet[BatchLoop]" = weakref.WeakSet()


class BatchLoop:
    """Runs jobs of one runtime.

    finish: (job, latents by output number) -> a generator that yields between pieces of work and returns the job's
    result; called when the last step is done, and run beside later ones. max_rows: rows of one UNet call; None: what
    fits into memory. max_pending: jobs that may wait; None: any number.
    """

    def __init__(
        self,
        runtime: Runtime,
        preparer: Preparer,
        finish: Callable[[Job, Mapping[int, torch.Tensor]], Generator[None, None, Any]],
        decode_preview: Callable[[torch.Tensor], list],
        max_rows: int | None = None,
        max_pending: int | None = None,
    ):
        self._runtime, self._preparer = runtime, preparer
        self._finish, self._decode_preview = finish, decode_preview
        self.max_pending = max_pending
        runtime.max_rows = max_rows  # calls beside the loop keep it too
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._jobs: dict[Group, Job] = {}
        self._turns: dict[Group, int] = {}  # when a group last had a step
        self._turn = 0
        self._joining: dict[Job, Joining] = {}
        self._leaving: set[Job] = set()  # whose pictures are being decoded
        self._helper = Helper(lambda: _IDLE_SECONDS)
        self._thread: threading.Thread | None = None
        self._closed, self._process = False, os.getpid()

    @property
    def pending(self) -> int:
        """Jobs that wait to join."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Jobs in the batch, about to join it, or done but for the decoding."""
        with self._changed:
            return len({*self._jobs.values(), *self._joining, *self._leaving})

    def inside(self) -> bool:
        """Whether the caller is a thread that jobs can't do without."""
        return threading.current_thread() is self._thread or self._helper.inside

    def submit(self, job: Job) -> None:
        """Queue a job. Raises QueueFull, and EngineClosed after `close`."""
        with self._changed:
            if self._closed:
                raise EngineClosed("the engine was closed; load another one")
            if self.max_pending is not None and len(self._queue) >= self.max_pending:
                raise QueueFull(f"{len(self._queue)} jobs wait already, the limit is {self.max_pending}; try later")
            self._queue.append(job)
            if self._thread is None:
                _started.add(self)
                self._thread = threading.Thread(target=self._run, name="stylefast-steps", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Stop a job: at once while it waits, else at the next step."""
        with self._changed:
            job.cancelled = True
            waiting = job in self._queue
            if waiting:
                self._queue.remove(job)
            self._changed.notify_all()
        if waiting:
            job.finish(error=cancelled(job))

    def close(self) -> None:
        """Stop after the present step; jobs that are not over fail with EngineClosed.

        In a process that was forked from the loop's there is nothing to stop.
        """
        if os.getpid() != self._process:
            self._closed = True
            return
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._helper.close(_closed())

    def _run(self) -> None:
        while True:
            if not (self._queue or self._jobs or self._joining):
                give_back()
            with self._changed:
                if not (self._queue or self._jobs or self._joining or self._closed):
                    self._changed.wait(_IDLE_SECONDS)
                if self._closed or not (self._queue or self._jobs or self._joining):
                    self._thread = None
                    break
            try:
                self._turn_over()
            except BaseException as error:  # a bug or a broken device: nobody may wait for ever
                self._fail_all(error)
        if self._closed:
            self._fail_all(_closed())

    def _turn_over(self) -> None:
        """Do what is due between two steps, and run a step."""
        with self._changed:
            if not (self._queue or self._jobs) and all(joining.waits for joining in self._joining.values()):
                self._changed.wait(_PAUSE_SECONDS)
        with self._runtime.lock:
            pass  # others may take their steps first, and meanwhile deadlines pass
        self._drop()
        self._admit()
        batch = self._choose()
        if not batch:
            return
        runtime = self._runtime
        with runtime.lock:
            try:
                failed = runtime.advance(batch)
            except Exception as error:  # not of one group alone, as far as anybody can tell
                failed = dict.fromkeys(batch, error)
            self._turn += 1
            self._turns |= dict.fromkeys(batch, self._turn)
            going = [g for g in batch if g not in failed]
            runtime.prefetch(going)
            for group in [g for g in going if g.finished]:
                error = self._complete(group)
                if error is not None:
                    failed[group] = error
        # nothing of what follows calls back into user code while the lock is held
        for group, error in failed.items():
            self._end(self._jobs.get(group), error)
        for job in list({id(self._jobs[g]): self._jobs[g] for g in going if g in self._jobs}.values()):
            stepped = [g for g in going if g in job.groups]
            if job in self._joining:  # the steps of an inversion are none of the picture's
                continue
            job.step = max(job.step, *(g.step for g in stepped))
            if job.wants_previews:
                for group in stepped:
                    self._show(job, group)
            if not job.running:
                self._deliver(job)

    def _drop(self) -> None:
        """End what was cancelled and what is too late."""
        now = time.monotonic()
        with self._changed:
            late = [job for job in self._queue if job.expires is not None and now >= job.expires]
            for job in late:
                self._queue.remove(job)
            running = dict.fromkeys([*self._jobs.values(), *self._joining])
        for job in late:
            job.finish(error=too_late(job))
        for job in running:
            if job.cancelled:
                self._end(job, cancelled(job))
            elif job.expires is not None and now >= job.expires:
                self._end(job, too_late(job))

    def _admit(self) -> None:
        """Let waiting jobs join, first come first served.

        Beside a running batch they do so as soon as the helper has encoded what they need; where nothing runs, nothing
        has to wait for that, and those who wait begin together.
        """
        alone = not self._jobs
        for job, joining in list(self._joining.items()):
            self._go_on(job, joining, alone)
        while True:
            with self._changed:
                taken = sum(g.pictures for g in self._jobs) + sum(len(job.requests) for job in self._joining)
                if not self._queue or taken >= MOST_PICTURES:
                    return
                job = self._queue.popleft()
            if job.cancelled:
                job.finish(error=cancelled(job))
                continue
            try:
                if job.trajectories is None:
                    job.trajectories = self._preparer.trajectories(job.requests)
            except Exception as error:
                job.finish(error=error)
                continue
            with self._changed:
                joining = self._joining[job] = Joining(Admission(self._preparer, job.trajectories))
            if not self._go_on(job, joining, alone):
                return

    def _go_on(self, job: Job, joining: Joining, alone: bool) -> bool:
        """Admit a job as far as that goes without waiting, or to its end or first step where `alone`.

        False where there is no room and it was put back into the queue.
        """
        admission = joining.admission
        try:
            while not any(group in self._jobs for group in joining.inversions):
                if joining.waits:
                    return True
                call, joining.call = joining.call, None
                if call is not None and call.error is not None:
                    admission.fail(call.error)
                wanted = admission.advance(None if call is None else call.value)
                if wanted is None:
                    self._join(job, admission)
                    return True
                if callable(wanted):
                    joining.call = self._beside(wanted, alone)
                else:
                    joining.inversions = wanted
                    self._enter(job, wanted)
        except BaseException as error:
            trajectories = job.trajectories
            self._leave(job)
            # when others are done there is more room
            if is_out_of_memory(error) and (self._jobs or self._joining or self._leaving):
                job.trajectories = trajectories
                with self._changed:
                    self._queue.appendleft(job)
                    if not self._jobs:
                        self._changed.wait(_PAUSE_SECONDS)  # for those who are joining or decoded
                return False
            job.finish(error=_as_memory(error) if is_out_of_memory(error) else error)
            if not isinstance(error, Exception):
                raise
        return True

    def _beside(self, wanted: Callable[[], Any], alone: bool) -> Call:
        """Have a call made by the helper, or, where no steps would wait for it, by this thread."""
        call = Call()
        if alone:
            try:
                call.value = self._runtime.beside(wanted)
            except BaseException as error:  # raised where the admission goes on
                call.error = error
            call.over = True
            return call

        def then(value: Any, error: BaseException | None) -> None:
            with self._changed:
                call.value, call.error, call.over = value, error, True
                self._changed.notify_all()

        self._helper.run(lambda: self._runtime.beside(wanted), then)
        return call

    def _join(self, job: Job, admission: Admission) -> None:
        job.running = list(admission.groups)
        self._enter(job, admission.groups)
        with self._changed:
            del self._joining[job]
        job.admission = admission

    def _enter(self, job: Job, groups: list[Group]) -> None:
        job.groups += groups
        with self._changed:
            self._jobs |= dict.fromkeys(groups, job)
        # as if it had just had a step: where not all fit, it takes its turn behind those who wait already
        self._turns |= dict.fromkeys(groups, self._turn)
        job.start()

    def _choose(self) -> list[Group]:
        """Return groups of the size that is next: the longest waiting first, as many as fit."""
        waiting = sorted((g for g in self._jobs if not g.finished), key=lambda g: self._turns[g])
        if not waiting:
            return []
        shape = waiting[0].latent_shape
        room = self._runtime.rows_that_fit(shape[1:])
        batch, rows = [], 0
        for group in waiting:
            if group.latent_shape == shape and (not batch or rows + group.rows <= room):
                batch.append(group)
                rows += group.rows
        # in the order in which they came, so that a batch that stays the same is laid out the same
        order = {g: i for i, g in enumerate(self._jobs)}
        return sorted(batch, key=order.__getitem__)

    def _complete(self, group: Group) -> NumericsError | None:
        """Keep the pictures of a group after its last step; return the error if they are not finite."""
        job = self._jobs[group]
        error = self._runtime.finite(group)
        if error is not None:
            return error
        if job in self._joining:
            with self._changed:
                del self._jobs[group]
            self._turns.pop(group, None)
            job.groups.remove(group)
        else:
            job.latents |= results(self._runtime, group)
            job.running.remove(group)
        return None

    def _deliver(self, job: Job) -> None:
        """All groups of a job are done: have its result made beside the steps of others."""
        if job.cancelled:  # in its last step
            self._end(job, cancelled(job))
            return
        if job.expires is not None and time.monotonic() >= job.expires:
            self._end(job, too_late(job))
            return
        try:
            making = self._finish(job, job.latents)
        except Exception as error:
            self._end(job, error)
            return
        with self._changed:
            self._leaving.add(job)
        job.latents = {}
        self._leave(job)

        def then(result: Any, error: BaseException | None) -> None:
            with self._changed:
                self._leaving.discard(job)
            if error is not None and is_out_of_memory(error):
                error = _as_memory(error)
            job.finish(result, error)

        self._helper.run(pieces(job, making), then)

    def _show(self, job: Job, group: Group) -> None:
        with self._runtime.lock:
            if not len(group.slots):
                return
            latents = self._runtime.denoised_of(group).float().cpu()
        job.show(Preview(group.step, group.steps, latents, self._decode_preview))

    def _end(self, job: Job | None, error: BaseException) -> None:
        if job is not None:
            self._leave(job)
            job.finish(error=error)

    def _leave(self, job: Job) -> None:
        """Take a job's groups out of the batch and give back all that they hold."""
        with self._changed:
            joining = self._joining.pop(job, None)
            for group in job.groups:
                self._jobs.pop(group, None)
                self._turns.pop(group, None)
        for admission in (joining.admission if joining is not None else None, job.admission):
            if admission is not None:
                admission.close()
        job.groups, job.running, job.admission, job.trajectories = [], [], None, None

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            waiting, running = list(self._queue), dict.fromkeys([*self._jobs.values(), *self._joining])
            self._queue.clear()
        for job in running:
            self._end(job, error)
        for job in waiting:
            job.finish(error=error)


@atexit.register
def _close_all() -> None:
    """Stop step threads before interpreter shutdown; a running step would crash the process."""
    for loop in list(_started):
        loop.close()


def _closed() -> EngineClosed:
    return EngineClosed("the engine was closed before the job was done")


def _as_memory(error: BaseException) -> StyleFastError:
    if isinstance(error, OutOfMemory):
        return error
    return OutOfMemory(f"the job does not fit into memory; ask for fewer or smaller pictures ({str(error)[:200]})")
