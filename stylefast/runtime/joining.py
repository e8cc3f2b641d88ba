"""What a job of the batch loop waits for before its first step and after its last, and why it may end between."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from stylefast.errors import DeadlineExceeded, JobCancelled
from stylefast.runtime.admission import Admission
from stylefast.runtime.group import Group
from stylefast.runtime.helper import AGAIN
from stylefast.runtime.jobs import Job


@dataclass(eq=False)
class Call:
    """A call that an admission wants, made beside the steps."""

    over: bool = False
    value: Any = None
    error: BaseException | None = None


@dataclass(eq=False)
class Joining:
    """A job that is about to join: what it waits for."""

    admission: Admission
    call: Call | None = None
    inversions: list[Group] = field(default_factory=list)

    @property
    def waits(self) -> bool:
        """Whether its call is not over."""
        return self.call is not None and not self.call.over


def pieces(job: Job, making: Generator[None, None, Any]) -> Callable[[], Any]:
    """A task of the helper: the next piece of a job's result, until it is whole or the job was cancelled."""

    def piece() -> Any:
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
    """The error of a job that was cancelled."""
    return JobCancelled(f"the job was cancelled at step {job.step} of {job.steps}")


def too_late(job: Job) -> DeadlineExceeded:
    """The error of a job whose deadline has passed."""
    given = job.expires - job.submitted
    return DeadlineExceeded(f"the deadline of {given:g} seconds passed at step {job.step} of {job.steps}")
