"""How jobs end before their last step: cancelled, failed, interrupted by Ctrl-C, or with the engine.

The part of the scheduler that a request which succeeds does not meet. Every ending happens between two steps and
releases all that a job holds; the watchers of jobs are told once the turn is released.
"""

import atexit
import os
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING

from stylefast.errors import EngineClosed, StyleFastError
from stylefast.runtime.jobs import Job, cancelled, explained

if TYPE_CHECKING:  # built on this file
    from stylefast.runtime.scheduler import Scheduler

# schedulers that have had jobs
started: "weakref.WeakSet[Scheduler]" = weakref.WeakSet()


class Endings:
    """The endings of a scheduler's jobs; `Scheduler` is the only subclass."""

    def cancel(self: "Scheduler", job: Job) -> None:
        """Stop a job: at once if it waits, otherwise at the next step."""
        with self._changed:
            job.cancelled = True
            waiting = job in self._queue
            if waiting:
                self._queue.remove(job)
            self._notify()
        if waiting:
            job.finish(error=cancelled(job))

    def close(self: "Scheduler") -> None:
        """Stop after the current step; unfinished jobs fail with EngineClosed.

        Does nothing in a process forked from the scheduler's.
        """
        self._runner.closed = True
        if os.getpid() != self._process:
            self._closed = True
            return
        with self._changed:
            self._closed = True
            thread, mine = self._thread, self._holder == threading.get_ident()
            self._notify()
        if mine:  # in a signal handler during a step: the rest is done when the turn ends
            self._close_later = True
            return
        inside = self.inside()  # another thread may be waiting for this one, so it must not wait
        with self.paused():
            pass
        if thread is not None and not inside:
            thread.join()
        self._helper.close(closed_error(), wait=not inside)
        self._runner.close()

    def _end(self: "Scheduler", job: Job, error: BaseException) -> None:
        """End a job that waits, joins or runs; its watchers are notified when the turn is released."""
        self._ended.append(partial(job.finish, error=explained(job, error)))
        self._leave(job)

    def _queue_again(self: "Scheduler", job: Job) -> None:
        """Put a job back at the head of the queue; it starts again."""
        self._leave(job)
        job.latents, job.step = {}, 0
        job.queued_again = True  # others must not wait for it
        with self._changed:
            self._queue.appendleft(job)

    def _end_all(self: "Scheduler", error: BaseException) -> None:
        with self._changed:
            waiting = list(self._queue)
            self._queue.clear()
            jobs = dict.fromkeys([*waiting, *self._jobs.values(), *self._joining])
        for job in jobs:
            self._end(job, error)

    def _begin_again(self: "Scheduler") -> None:
        """Restart all jobs after Ctrl-C interrupted a step, which may have been half done."""
        self._stepping = False
        with self._changed:
            jobs = dict.fromkeys([*self._jobs.values(), *self._joining])
        for job in reversed(jobs):
            if job.collects:
                self._end(job, StyleFastError("Ctrl-C interrupted the step that this request was part of; try again"))
            else:
                self._queue_again(job)

    def _abandon(self: "Scheduler", job: Job) -> None:
        """End a job whose caller was interrupted."""
        job.cancelled = True
        if self._holder == threading.get_ident():  # interrupted between taking the turn and using it
            self._leave_turn(None)
        with self.paused():
            with self._changed:
                if job in self._queue:
                    self._queue.remove(job)
            if not job.done() and job not in self._leaving:
                self._end(job, cancelled(job))


@atexit.register
def _close_all() -> None:
    """Stop step threads before interpreter shutdown; a running step would crash the process."""
    for scheduler in list(started):
        scheduler.close()


def closed_error() -> EngineClosed:
    """Return the error of jobs that end with the engine."""
    return EngineClosed("the engine was closed before the job was done")
