"""How jobs end before their last step: cancelled, failed, interrupted by Ctrl-C, or with the engine.

These are the methods of the scheduler that a request which succeeds does not meet. A job that runs ends between two
steps and releases all that it holds; its watchers are told once the turn is released.
"""

import atexit
import os
import threading
import weakref
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from stylefast.errors import EngineClosed, StyleFastError
from stylefast.runtime.jobs import Job, cancelled, explained
from stylefast.runtime.memory import is_out_of_memory

if TYPE_CHECKING:  # built on this file
    from stylefast.runtime.scheduler import Scheduler

# schedulers that have had jobs
started: "weakref.WeakSet[Scheduler]" = weakref.WeakSet()


def cancel(scheduler: "Scheduler", job: Job) -> None:
    """Stop a job: at once if it waits, otherwise at the next step."""
    with scheduler._changed:
        job.cancelled = True
        waiting = job in scheduler._queue
        if waiting:
            scheduler._queue.remove(job)
        scheduler._notify()
    if waiting:
        job.finish(error=cancelled(job))


def close(scheduler: "Scheduler") -> None:
    """Stop after the current step; unfinished jobs fail with EngineClosed.

    Does nothing in a process forked from the scheduler's.
    """
    scheduler._runner.closed = True
    if os.getpid() != scheduler._process:
        scheduler._closed = True
        return
    with scheduler._changed:
        scheduler._closed = True
        thread, mine = scheduler._thread, scheduler._holder == threading.get_ident()
        scheduler._notify()
    if mine:  # in a signal handler during a step: the rest is done when the turn ends
        scheduler._close_later = True
        return
    inside = scheduler.inside()  # another thread may be waiting for this one, so it must not wait
    with scheduler.paused():
        pass
    if thread is not None and not inside:
        thread.join()
    scheduler._helper.close(closed_error(), wait=not inside)
    scheduler._runner.close()


def end(scheduler: "Scheduler", job: Job, error: BaseException) -> None:
    """End a job that waits, joins or runs; its watchers are notified when the turn is released."""
    scheduler._ended.append(partial(job.finish, error=explained(job, error)))
    scheduler._leave(job)
    with scheduler._changed:
        scheduler._departures += 1


def fail(scheduler: "Scheduler", errors: Mapping[Job, BaseException]) -> bool:
    """End jobs with their errors, or queue those again that ran out of memory while others hold some of it.

    Those join once another job has left the batch. Jobs that wait for a callback don't count as others, since the
    callback may wait for these. A bake is not queued again: what it has collected can't be collected twice. Returns
    whether jobs were queued again.
    """
    short = {job for job, error in errors.items() if is_out_of_memory(error) and not (job.collects and job.groups)}
    if len(scheduler._busy_jobs() | short) < 2:
        short = set()
    for job in sorted(short, key=lambda job: job.number, reverse=True):  # the oldest is first in the queue again
        job.behind = scheduler._departures
        scheduler._queue_again(job)
    for job in errors.keys() - short:
        scheduler._end(job, errors[job])
    return bool(short)


def queue_again(scheduler: "Scheduler", job: Job) -> None:
    """Put a job back at the head of the queue; it starts again."""
    scheduler._leave(job)
    job.latents, job.step = {}, 0
    job.queued_again = True  # others must not wait for it
    with scheduler._changed:
        scheduler._queue.appendleft(job)


def end_all(scheduler: "Scheduler", error: BaseException) -> None:
    with scheduler._changed:
        waiting = list(scheduler._queue)
        scheduler._queue.clear()
        jobs = dict.fromkeys([*waiting, *scheduler._jobs.values(), *scheduler._joining])
    for job in jobs:
        scheduler._end(job, error)


def begin_again(scheduler: "Scheduler") -> None:
    """Restart all jobs after Ctrl-C interrupted a step, which may have been half done."""
    scheduler._stepping = False
    with scheduler._changed:
        jobs = dict.fromkeys([*scheduler._jobs.values(), *scheduler._joining])
    for job in reversed(jobs):
        if job.collects:
            scheduler._end(job, StyleFastError("Ctrl-C interrupted the step that this request was part of; try again"))
        else:
            scheduler._queue_again(job)


def abandon(scheduler: "Scheduler", job: Job) -> None:
    """End a job whose caller was interrupted."""
    job.cancelled = True
    if scheduler._holder == threading.get_ident():  # interrupted between taking the turn and using it
        scheduler._leave_turn(None)
    with scheduler.paused():
        with scheduler._changed:
            if job in scheduler._queue:
                scheduler._queue.remove(job)
        if not job.done() and job not in scheduler._leaving:
            scheduler._end(job, cancelled(job))


@atexit.register
def _close_all() -> None:
    """Stop step threads before interpreter shutdown; a running step would crash the process."""
    for scheduler in list(started):
        scheduler.close()


def closed_error() -> EngineClosed:
    """Return the error of jobs that end with the engine."""
    return EngineClosed("the engine was closed before the job was done")
