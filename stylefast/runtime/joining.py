"""States of a job before its first step and after its last, and the errors that end it early."""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from stylefast.errors import DeadlineExceeded, JobCancelled
from stylefast.runtime.admission import Admission
from stylefast.runtime.helper import AGAIN
from stylefast.runtime.jobs import Job
from stylefast.runtime.plan.sample_group import SampleGroup


@dataclass(eq=False)
class HelperCall:
    """A call that an admission needs, made alongside the steps."""

    over: bool = False
    value: Any = None
    error: BaseException | None = None


@dataclass(eq=False)
class Joining:
    """A job that is about to join, and what it waits for."""

    admission: Admission
    first: bool  # whether it came while nothing ran: no step is made until its inputs are there
    call: HelperCall | None = None
    inversions: list[SampleGroup] = field(default_factory=list)

    @property
    def waits(self) -> bool:
        """Return whether its call is unfinished."""
        return self.call is not None and not self.call.over


def pieces(job: Job, making: Generator[None, None, Any], ready: Callable[[], None]) -> Callable[[], Any]:
    """Return a helper task that makes a job's result piece by piece, until complete or the job is cancelled.

    ready: waits until the device has computed what the result is made of.
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
    given = job.expires - job.submitted
    return DeadlineExceeded(f"the deadline of {given:g} seconds passed at step {job.step} of {job.steps}")
