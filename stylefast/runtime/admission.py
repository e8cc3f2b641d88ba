"""Admission of pictures: their inputs are made piece by piece, so that slow work does not delay other pictures' steps.

Encoders, file reads and the VAE run alongside the steps, and so does loading a style bank's pages for the first step;
the DDIM inversion of a reference is a group that runs its steps in the batch like any other. Only writing the pages of
prompts and pictures, and slots, happens between two steps.
`Joining` is a job in that state; `pieces` makes its result after the last step.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from stylefast.errors import DeadlineExceeded, JobCancelled
from stylefast.runtime.helper import AGAIN
from stylefast.runtime.jobs import Job
from stylefast.runtime.plan.pinning import forward_pin, inverted_pin, latents_pin
from stylefast.runtime.plan.request_planner import RequestPlanner
from stylefast.runtime.plan.sample import Sample, connected
from stylefast.runtime.plan.sample_group import Pin, SampleGroup
from stylefast.runtime.steps.conditions import Encoded

# what an admission needs next: a call to make with `Runner.beside`, or groups to run to their end
Wanted = Callable[[], Any] | list[SampleGroup]


class Admission:
    """Samples being turned into groups, which join the batch. `groups` are those admitted so far, in order of samples.

    The thread that has the turn asks `advance` for the next piece of work until it returns None. All or nothing: when
    `advance` raises, or after `close`, nothing is held.
    """

    def __init__(self, planner: RequestPlanner, samples: Sequence[Sample]):
        self._planner, self._runner = planner, planner.runner
        self.groups: list[SampleGroup] = []
        self._inversions: list[SampleGroup] = []
        self._going = self._go(samples)
        self._begun = False

    def advance(self, value: Any = None) -> Wanted | None:
        """Continue until work is needed, and return it; None when all are admitted.

        value: the result of the previously returned call. Raises InvalidRequest or a subclass for inputs that can't be
        made, OutOfMemory if there is no room.
        """
        try:
            wanted = self._going.send(value if self._begun else None)
            self._begun = True
            return wanted
        except StopIteration:
            return None

    def fail(self, error: BaseException) -> None:
        """Report that the previously returned call raised `error`; raise it again."""
        self._going.throw(error)

    def close(self) -> None:
        """Release everything held; a second call does nothing."""
        self._going.close()
        for group in [*self.groups, *self._inversions]:
            self._runner.retire(group)
        self.groups, self._inversions = [], []

    def _go(self, samples: Sequence[Sample]) -> Generator[Wanted, Any, None]:
        """Yield work; runs between two steps otherwise."""
        runner, store = self._runner, self._runner.conditions
        by_size: dict[tuple[int, int], list[Sample]] = {}
        for sample in samples:
            by_size.setdefault(sample.size, []).append(sample)
        made: Encoded | None = None
        try:
            for size, members in by_size.items():
                shape = self._planner.latent_shape(size)
                pins = yield from self._pins([sample for sample in members if sample.pinned])
                made = yield from store.encoding(members, shape[1:])
                for one in connected(members):
                    group = self._admit(one, made, {sample: pins[sample] for sample in one if sample in pins})
                    self.groups.append(group)
                    yield from runner.staging(group)
                    opening = runner.backend.ready(group)
                    if opening is not None:
                        yield opening
                store.drop(made)
        except BaseException:
            for group in [*self.groups, *self._inversions]:
                runner.retire(group)
            self.groups, self._inversions = [], []
            raise
        finally:
            if made is not None:
                store.drop(made)

    def _admit(self, samples: Sequence[Sample], made: Encoded, pins: dict[Sample, Pin]) -> SampleGroup:
        shape = self._planner.latent_shape(samples[0].size)
        conditions = self._runner.conditions.gather(samples, shape[1:], made)
        return self._runner.admit(samples, conditions, shape, pins)

    def _pins(self, references: Sequence[Sample]) -> Generator[Wanted, Any, dict[Sample, Pin]]:
        """Return the pin of each reference, which fixes its latents at every step."""
        pins, inversions, model = {}, {}, self._planner.fingerprint()
        for sample in references:
            if sample.pin is not None and sample.pin[0] == model:
                continue  # kept from an earlier attempt that ran out of memory
            if sample.held is not None:
                sample.pin = model, latents_pin(*sample.held)
                continue
            clean: torch.Tensor = yield partial(self._planner.encode_picture, sample)
            if sample.inverted:
                inversions[sample] = yield from self._invert(sample, clean)
            else:
                sample.pin = model, forward_pin(sample, clean)
        if inversions:
            yield list(inversions.values())
        for sample, group in inversions.items():
            sample.pin = model, inverted_pin(group.trail)
            self._runner.retire(group)
            self._inversions.remove(group)
        for sample in references:
            assert sample.pin is not None
            pins[sample] = sample.pin[1]
        return pins

    def _invert(self, sample: Sample, clean: torch.Tensor) -> Generator[Wanted, Any, SampleGroup]:
        """Return the group that inverts the picture of `sample` to noise."""
        inversion, store = self._planner.inversion(sample), self._runner.conditions
        inversion.start, (height, width) = clean, clean.shape[1:]
        made = yield from store.encoding([inversion], (height, width))
        try:
            group = self._admit([inversion], made, {})
        finally:
            store.drop(made)
        self._inversions.append(group)
        return group


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
    first: bool  # whether it arrived while nothing ran: no step starts until its inputs are ready
    call: HelperCall | None = None
    inversions: list[SampleGroup] = field(default_factory=list)

    @property
    def waits(self) -> bool:
        """Return whether its call is unfinished."""
        return self.call is not None and not self.call.over


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
