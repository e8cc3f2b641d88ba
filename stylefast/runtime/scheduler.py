"""The scheduler: jobs of all callers, and the thread whose turn it is to run their steps.

`Engine.generate` and `bake` add a job and run steps until it is done; `Engine.submit` adds one and leaves the steps to
a background thread. Only one thread at a time has the turn, and it runs the steps of all jobs. Before each step jobs
join and leave; a step runs the groups that have waited longest, all of one size, as many as fit. So jobs of different
callers, styles, samplers, step counts and guidance share a UNet call, a late job joins as soon as its prompts and
pictures are encoded, and a long job can't keep a short one waiting: if not all fit, they take turns. A helper thread
does the slow work, encoding and decoding, in parallel with the steps.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stylefast.errors import EngineClosed, InvalidRequest, QueueFull, StyleFastError
from stylefast.models.row_features import Recorder
from stylefast.runtime import endings
from stylefast.runtime.admission import Admission, HelperCall, Joining, RequestPlanner
from stylefast.runtime.helper import Helper
from stylefast.runtime.jobs import Job, Preview, cancelled, explained, pieces, too_late
from stylefast.runtime.memory import give_back, is_out_of_memory
from stylefast.runtime.plan.sample import SampleGroup
from stylefast.runtime.runner import Runner, joined
from stylefast.runtime.streams import own_settings

logger = logging.getLogger(__name__)

# max pictures in progress; further jobs wait, since their latents and prompts take memory too
MOST_PICTURES = 256
# seconds without work after which the thread behind `submit` ends; the next job starts another
_IDLE_SECONDS = 2.0
# seconds between attempts to join, and between checks of deadlines, while idle
_PAUSE_SECONDS = 0.02


class Scheduler:
    """The jobs of one runtime, and the thread that runs their steps.

    decode_preview: latents to small pictures. max_rows: rows of one UNet call; None: what fits into memory.
    max_pending: submitted jobs that may wait; None: any number.
    """

    # how jobs end early
    cancel = endings.cancel
    close = endings.close
    _abandon = endings.abandon
    _begin_again = endings.begin_again
    _end = endings.end
    _end_all = endings.end_all
    _fail = endings.fail
    _queue_again = endings.queue_again

    def __init__(
        self,
        runner: Runner,
        planner: RequestPlanner,
        decode_preview: Callable[[Any], list],
        max_rows: int | None = None,
        max_pending: int | None = None,
    ):
        self._runner, self._planner, self._decode_preview = runner, planner, decode_preview
        self.max_pending = max_pending
        runner.max_rows = max_rows
        # guards the fields below, and is notified of every change that a thread may wait for
        self._changed = threading.Condition()
        self._news = 0  # number of notifications
        self._holder: int | None = None  # the thread that has the turn
        self._telling: set[int] = set()  # threads that are running callbacks of jobs
        self._stepping = False  # from a step's start to the end of its bookkeeping
        self._asking = 0  # threads that wait for the turn to pause the steps, see `paused`
        self._queue: deque[Job] = deque()
        self._count = 0  # number of jobs so far
        self._opening = 0  # number of the last job that starts together with those that have joined
        self._joining: dict[Job, Joining] = {}
        self._jobs: dict[SampleGroup, Job] = {}
        self._turns: dict[SampleGroup, int] = {}  # when a group last had a step
        self._turn = 0
        self._leaving: set[Job] = set()  # jobs whose pictures are being decoded
        self._departures = 0  # how often a job left the batch for good, or its pictures were decoded
        self._ended: list[Callable[[], Any]] = []  # notifications of ended jobs, made once the turn is released
        self._helper = Helper(lambda: _IDLE_SECONDS)
        self._thread: threading.Thread | None = None  # the thread behind `submit`
        self._closed, self._close_later, self._process = False, False, os.getpid()

    @property
    def pending(self) -> int:
        """Return the number of jobs that wait to join."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Return the number of jobs in the batch, about to join it, or being decoded."""
        with self._changed:
            return len({*self._jobs.values(), *self._joining, *self._leaving})

    def inside(self) -> bool:
        """Return whether jobs depend on the calling thread, as in callbacks and signal handlers."""
        me = threading.current_thread()
        return me is self._thread or self._helper.inside or me.ident in (self._holder, *self._telling)

    # callers

    def submit(self, job: Job) -> None:
        """Queue a job for the thread behind `submit`. Raises QueueFull, and EngineClosed after `close`."""
        with self._changed:
            waiting = sum(not other.has_caller for other in self._queue)
            if self.max_pending is not None and waiting >= self.max_pending and not self._closed:
                raise QueueFull(
                    f"{waiting} jobs are already waiting, and the limit is {self.max_pending}; try again later"
                )
            self._add(job)
            if self._thread is None:
                thread = threading.Thread(target=self._run_submitted, name="stylefast-steps", daemon=True)
                try:
                    thread.start()
                except BaseException:
                    self._queue.remove(job)
                    raise
                self._thread = thread

    def run(self, job: Job) -> Any:
        """Queue a job and run steps until it is done, or wait while another thread runs them; return its result.

        The job's hooks, see `Job.due`, are called in this thread. Raises the job's error, any error of a hook, and
        InvalidRequest in a thread that the job would wait for.
        """
        if self.inside():
            raise InvalidRequest(
                "steps or pictures wait for the thread that this callback runs in, so it can't generate or bake; "
                "do that in another thread, or use submit"
            )
        self._add(job)
        try:
            while not job.done() or (job.due and job.exception() is None):
                self._runner.check_process()  # a callback may have forked
                if job.due:
                    self._runner.stream.join()
                    job.due[0]()
                    with self._changed:
                        job.due.popleft()
                        self._notify()
                else:
                    with self._turn_until(lambda: job.done() or bool(job.due)) as wanted:
                        moved = True
                        while wanted(moved):
                            moved = self.step()
        except BaseException:
            self._abandon(job)
            raise
        return job.result()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the turn between two steps, to change data that steps use; on a GPU also on their stream."""
        me = threading.get_ident()
        with self._changed:
            self._asking += 1
            self._notify()
            try:
                self._changed.wait_for(lambda: self._holder in (None, me))
            finally:
                self._asking -= 1
            before, self._holder = self._holder, me
        try:
            with self._runner.stream:
                yield
        finally:
            self._leave_turn(before)

    @contextmanager
    def changing_weights(self) -> Iterator[None]:
        """Hold the turn while weights change, and drop everything computed with the old ones.

        Raises InvalidRequest while pictures are in progress, because their remaining steps would use other weights.
        """
        self._runner.check_process()
        with self.paused():
            if self._runner.pictures or self._joining:
                pictures = self._runner.pictures
                busy = f"{pictures} pictures are in progress" if pictures else "a request is about to join"
                raise InvalidRequest(f"{busy}, and weights can't change meanwhile; wait until the jobs are done")
            try:
                yield
            finally:
                self._runner.forget_pages()

    # the turn

    def _notify(self) -> None:
        self._news += 1
        self._changed.notify_all()

    def _add(self, job: Job) -> None:
        with self._changed:
            if self._closed:
                raise EngineClosed("the engine was closed; load another one")
            endings.started.add(self)
            self._count += 1
            job.number = self._count
            self._queue.append(job)
            self._notify()

    @contextmanager
    def _turn_until(self, over: Callable[[], bool]) -> Iterator[Callable[[bool], bool]]:
        """Take the turn to run steps, as soon as no other thread has it; it is given up at the end.

        Yields a function that says whether to run one more: not once it is `over`, or another thread wants the turn. It
        is told whether the last one `moved` anything, and waits for news where it did not.
        """
        with self._changed:
            self._changed.wait_for(lambda: over() or (self._holder is None and not self._asking))
            mine = not over()
            if mine:
                self._holder = threading.get_ident()
        if not mine:
            yield lambda moved: False
            return
        news = self._news

        def wanted(moved: bool) -> bool:
            nonlocal news
            if not moved:
                self._wait(news)
            with self._changed:
                news = self._news
                return not (self._asking or self._ended or self._closed or over())

        try:
            with self._runner.stream, own_settings(self._runner.unet.device):
                yield wanted
        except BaseException as error:
            if not isinstance(error, Exception) and threading.current_thread() is not self._thread:
                if self._stepping:
                    self._begin_again()
                raise
            self._stepping = False
            self._end_all(error)  # a bug or a broken device: no caller may wait forever
        finally:
            self._leave_turn(None)

    def _wait(self, news: int) -> None:
        """Wait until something has changed since `news`, or deadlines need another check."""
        with self._changed:
            self._changed.wait_for(lambda: self._news != news, _PAUSE_SECONDS)

    def _leave_turn(self, holder: int | None) -> None:
        """Release the turn, then notify the watchers of ended jobs: no user code runs during a turn."""
        later = self._close_later and holder is None
        if self._closed and holder is None:
            self._end_all(endings.closed_error())
            self._close_later = False
        me = threading.get_ident()
        with self._changed:
            ended = []
            if holder is None:
                ended, self._ended = self._ended, []
                self._telling |= {me} if ended else set()
            self._holder = holder
            self._notify()
        try:
            for tell in ended:
                tell()
        finally:
            if ended:
                with self._changed:
                    self._telling.discard(me)
                    self._notify()
            if later:
                self.close()

    def _run_submitted(self) -> None:
        while True:
            try:
                with self._turn_until(lambda: self._closed or not self._has_submitted()) as wanted:
                    moved = True
                    while wanted(moved):
                        moved = self.step()
            except BaseException:  # no caller can receive the error, and other jobs must continue
                logger.exception("the thread that runs submitted jobs continues after an error")
            if not self._has_submitted():
                give_back()
            with self._changed:
                if not (self._closed or self._has_submitted()):
                    self._changed.wait_for(lambda: self._closed or self._has_submitted(), _IDLE_SECONDS)
                if self._closed or not self._has_submitted():
                    self._thread = None
                    return

    def _busy_jobs(self) -> set[Job]:
        """Return the jobs that hold memory until they are done, except for those that wait for a callback."""
        with self._changed:
            return {*self._joining, *self._leaving, *(job for job in self._jobs.values() if not job.due)}

    def _has_submitted(self) -> bool:
        """Return whether a job without a waiting caller needs steps."""
        with self._changed:
            return any(not job.has_caller for jobs in (self._jobs.values(), self._queue, self._joining) for job in jobs)

    # a step

    def step(self) -> bool:
        """Do the work due between two steps, and run one; return False if there was nothing to do."""
        self._drop()
        moved = self._admit()
        if self._ended:
            return True  # their waiters are notified first
        batch = self._choose()
        if batch:
            self._stepping = True
            try:
                failed: dict[SampleGroup, Exception] = dict(self._runner.step(batch, self._recorder(batch[0])))
            except Exception as error:  # not known to concern only one group
                failed = dict.fromkeys(batch, error)
            self._collect(batch, self._after(batch, failed))
            self._stepping = False
        return moved or bool(batch)

    def _drop(self) -> None:
        """End cancelled and late jobs."""
        now = time.monotonic()
        with self._changed:
            jobs = dict.fromkeys([*self._queue, *self._jobs.values(), *self._joining])
            ended = {job: cancelled(job) for job in jobs if job.cancelled}
            ended |= {j: too_late(j) for j in jobs if j not in ended and j.expires is not None and now >= j.expires}
            for job in ended:
                if job in self._queue:
                    self._queue.remove(job)
        for job, error in ended.items():
            self._end(job, error)

    def _admit(self) -> bool:
        """Let waiting jobs join, first come first served; return whether one made progress.

        They join as soon as the helper has encoded their inputs; those that arrived while nothing ran start together.
        """
        moved = False
        for job, joining in list(self._joining.items()):
            if not joining.waits:
                moved |= bool(self._go_on(job, joining))
        while True:
            with self._changed:
                # jobs that wait for a callback may do so until others are done
                taken = sum(g.pictures for g, job in self._jobs.items() if not job.due)
                taken += sum(len(job.requests) for job in self._joining)
                if not self._queue or taken >= MOST_PICTURES:
                    return moved
                job = self._queue[0]
                if job.behind == self._departures and self._busy_jobs():
                    return moved
            error = None
            try:
                if job.model != self._planner.fingerprint():
                    job.plan(self._planner)
            except Exception as raised:
                error = raised
            with self._changed:
                if not self._queue or self._queue[0] is not job:
                    continue  # cancelled meanwhile
                self._queue.popleft()
                if error is None:
                    # jobs that had arrived when the first of them joined start together
                    first = (not self._jobs or job.number <= self._opening) and not job.queued_again
                    joining = self._joining[job] = Joining(Admission(self._planner, job.samples or []), first)
            if error is not None:
                self._end(job, error)
            elif self._go_on(job, joining) is None:
                return moved
            moved = True

    def _go_on(self, job: Job, joining: Joining) -> bool | None:
        """Admit a job as far as possible without waiting; return whether it made progress.

        Returns None if there was no room and it was queued again.
        """
        admission, moved = joining.admission, False
        call = None
        try:
            while not any(group in self._jobs for group in joining.inversions):
                if joining.waits:
                    return moved
                call, joining.call = joining.call, None
                moved = True
                if call is not None and call.error is not None:
                    admission.fail(call.error)
                wanted = admission.advance(None if call is None else call.value)
                if wanted is None:
                    self._join(job, admission)
                    return True
                if callable(wanted):
                    joining.call = self._beside(wanted)
                else:
                    joining.inversions = wanted
                    self._enter(job, wanted)
        except BaseException as error:
            if not isinstance(error, Exception) and (call is None or call.error is not error):
                raise  # Ctrl-C in this thread
            self._leave(job)
            if is_out_of_memory(error) and not job.made_room and self._runner.make_room():
                job.made_room = True
                self._queue_again(job)
                return None
            return None if self._fail({job: error}) else True
        return moved

    def _beside(self, wanted: Callable[[], Any]) -> HelperCall:
        """Let the helper make a call."""
        call = HelperCall()

        def then(value: Any, error: BaseException | None) -> None:
            with self._changed:
                call.value, call.error, call.over = value, error, True
                self._notify()

        self._helper.run(lambda: self._runner.beside(wanted), then)
        return call

    def _join(self, job: Job, admission: Admission) -> None:
        job.running = list(admission.groups)
        self._enter(job, admission.groups)
        with self._changed:
            del self._joining[job]
        job.admission = admission

    def _enter(self, job: Job, groups: list[SampleGroup]) -> None:
        job.groups += groups
        with self._changed:
            self._opening = self._opening if self._jobs else self._count
            self._jobs |= dict.fromkeys(groups, job)
        # as if it had just had a step: if not all fit, its turn comes after those already waiting
        self._turns |= dict.fromkeys(groups, self._turn)
        job.start()

    def _choose(self) -> list[SampleGroup]:
        """Return groups of the size that is next: the longest waiting first, as many as fit."""
        # a call that is over was not looked at yet: its job may join before the first step
        if any(joining.first and joining.call is not None for joining in self._joining.values()):
            return []
        # all groups of a job, so that its batches do not depend on how fast a disk is
        reading = {job for g, job in self._jobs.items() if self._runner.awaits_pages(g)}
        ready = {g: job for g, job in self._jobs.items() if job not in reading}
        waiting = sorted(
            (g for g, job in ready.items() if not g.finished and not job.due and job.may_step(g)),
            key=lambda g: (self._turns[g], self._jobs[g].number),
        )
        if not waiting:
            return []
        first, owner = waiting[0], self._jobs[waiting[0]]
        if owner.collects:
            return [first]
        if owner.alone:
            waiting = [g for g in waiting if self._jobs[g] is owner]
        else:
            waiting = [g for g in waiting if not (self._jobs[g].alone or self._jobs[g].collects)]
        shape = first.latent_shape
        room = self._runner.rows_that_fit(shape[1:])
        batch, rows = [], 0
        for group in waiting:
            if group.latent_shape == shape and (not batch or rows + group.rows <= room):
                batch.append(group)
                rows += group.rows
        self._opening = 0
        for joining in self._joining.values():
            joining.first = False
        # in order of arrival, so that an unchanged batch has an unchanged layout
        order = {g: i for i, g in enumerate(self._jobs)}
        return sorted(batch, key=lambda g: (self._jobs[g].number, order[g]))

    def _recorder(self, group: SampleGroup) -> Recorder | None:
        """Return what records a group's next step, if its job wants that."""
        owner = self._jobs[group]
        return owner.before_step(self._runner, group) if owner.collects and owner not in self._joining else None

    def _after(
        self, batch: Sequence[SampleGroup], failed: dict[SampleGroup, Exception]
    ) -> dict[SampleGroup, Exception]:
        """Keep what finished groups of a batch made, and prepare the others' next step; return all that failed."""
        self._turn += 1
        self._turns |= dict.fromkeys(batch, self._turn)
        going = [g for g in batch if g not in failed]
        try:
            self._runner.prefetch(going)
        except Exception as error:
            failed |= dict.fromkeys(going, error)
            going = []
        for group in [g for g in going if g.finished]:
            try:
                error: Exception | None = self._complete(group)
            except Exception as raised:
                error = raised
            if error is not None:
                failed[group] = error
        return failed

    def _complete(self, group: SampleGroup) -> StyleFastError | None:
        """Keep the pictures of a group after its last step; return the error if they are not finite."""
        job = self._jobs[group]
        error = self._runner.finite(group)
        if error is not None:
            return error
        if job in self._joining:
            with self._changed:
                del self._jobs[group]
            self._turns.pop(group, None)
            job.groups.remove(group)
        else:
            job.latents |= self._runner.results_of(group)
            job.running.remove(group)
        return None

    def _collect(self, batch: Sequence[SampleGroup], failed: dict[SampleGroup, Exception]) -> None:
        """End the jobs of groups that failed, and pass on the results of the others' steps."""
        errors: dict[Job, list[Exception]] = {}
        for group, error in failed.items():
            if group in self._jobs:
                errors.setdefault(self._jobs[group], []).append(error)
        if errors:
            self._fail({job: joined(own) for job, own in errors.items()})
        for job in list(dict.fromkeys(self._jobs[g] for g in batch if g in self._jobs)):
            stepped = [g for g in batch if self._jobs.get(g) is job]
            if job in self._joining:  # the steps of an inversion do not count as the picture's
                continue
            try:
                self._pass_on(job, stepped)
            except Exception as error:
                self._fail({job: error})
                continue
            if not job.running:
                self._deliver(job)

    def _pass_on(self, job: Job, stepped: Sequence[SampleGroup]) -> None:
        """Show previews of a step of a job's groups, and pass its caller the callbacks that are due."""
        job.step = max(job.step, *(g.done for g in stepped))
        if job.wants_previews:
            for group in stepped:
                self._show(job, group)
        hooks = job.after_step(self._runner, stepped)
        if hooks:
            with self._changed:
                job.due.extend(hooks)
                self._notify()

    def _deliver(self, job: Job) -> None:
        """Let the helper make the result of a job whose groups are all done, alongside the steps of others."""
        if job.cancelled:  # in its last step
            self._end(job, cancelled(job))
            return
        if job.expires is not None and time.monotonic() >= job.expires:
            self._end(job, too_late(job))
            return
        try:
            task = pieces(job, job.make(job, job.latents), self._runner.stream.mark())
        except Exception as error:
            self._end(job, error)
            return
        self._leave(job)

        def then(result: Any, error: BaseException | None) -> None:
            with self._changed:
                self._leaving.discard(job)
                self._departures += 1
            job.finish(result, None if error is None else explained(job, error))
            with self._changed:
                self._notify()

        with self._changed:
            self._leaving.add(job)
            self._departures += 1
        try:
            self._helper.run(task, then)
        except BaseException as error:
            with self._changed:
                self._leaving.discard(job)
            if isinstance(error, Exception):
                self._end(job, error)
                return
            self._queue_again(job)  # Ctrl-C: the result was not handed over
            raise
        job.latents = {}

    def _show(self, job: Job, group: SampleGroup) -> None:
        latents = self._runner.denoised_of(group).float().cpu()
        job.show(Preview(group.done, group.total, latents, self._decode_preview))

    def _leave(self, job: Job) -> None:
        """Remove a job's groups from the batch and release everything they hold."""
        with self._changed:
            joining = self._joining.pop(job, None)
            for group in job.groups:
                self._jobs.pop(group, None)
                self._turns.pop(group, None)
        admissions = [joining.admission if joining is not None else None, job.admission]
        job.groups, job.running, job.admission = [], [], None
        for admission in admissions:
            if admission is not None:
                try:
                    admission.close()
                except Exception:  # from a broken device; waiters of the job must be notified all the same
                    logger.exception("the resources of a job could not be released")
