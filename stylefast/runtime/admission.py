"""Admission of pictures: their inputs are made piece by piece, so that slow work does not delay other pictures' steps.

Encoders, file reads and the VAE run alongside the steps; the DDIM inversion of a reference is a group that runs its
steps in the batch like any other. Only writing pages and slots happens between two steps.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import torch

from stylefast.runtime.conditions import Encoded
from stylefast.runtime.group import Group, Pin
from stylefast.runtime.pinning import forward_pin, inverted_pin, latents_pin
from stylefast.runtime.preparing import Preparer
from stylefast.runtime.trajectory import Trajectory, connected

# what an admission needs next: a call to make with `Runtime.beside`, or groups to run to their end
Wanted = Callable[[], Any] | list[Group]


class Admission:
    """Trajectories being admitted to a runtime. `groups` are those admitted so far, in the order of their pictures.

    The thread that has the turn asks `advance` for the next piece of work until it returns None. All or nothing: when
    `advance` raises, or after `close`, nothing is held.
    """

    def __init__(self, preparer: Preparer, trajectories: Sequence[Trajectory]):
        self._preparer, self._runtime = preparer, preparer.runtime
        self.groups: list[Group] = []
        self._inversions: list[Group] = []
        self._going = self._go(trajectories)
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
            self._runtime.retire(group)
        self.groups, self._inversions = [], []

    def _go(self, trajectories: Sequence[Trajectory]) -> Generator[Wanted, Any, None]:
        """Yield work; runs between two steps otherwise."""
        runtime, store = self._runtime, self._runtime.conditions
        by_size: dict[tuple[int, int], list[Trajectory]] = {}
        for t in trajectories:
            by_size.setdefault(t.size, []).append(t)
        made: Encoded | None = None
        try:
            for size, members in by_size.items():
                shape = self._preparer.latent_shape(size)
                pins = yield from self._pins([t for t in members if t.pinned])
                made = yield from store.encoding(members, shape[1:])
                for one in connected(members):
                    group = self._admit(one, made, {t: pins[t] for t in one if t in pins})
                    self.groups.append(group)
                    opening = runtime.backend.ready(group)
                    if opening is not None:
                        yield opening
                store.drop(made)
        except BaseException:
            for group in [*self.groups, *self._inversions]:
                runtime.retire(group)
            self.groups, self._inversions = [], []
            raise
        finally:
            if made is not None:
                store.drop(made)

    def _admit(self, trajectories: Sequence[Trajectory], made: Encoded, pins: dict[Trajectory, Pin]) -> Group:
        shape = self._preparer.latent_shape(trajectories[0].size)
        conditions = self._runtime.conditions.gather(trajectories, shape[1:], made)
        return self._runtime.admit(trajectories, conditions, shape, pins)

    def _pins(self, references: Sequence[Trajectory]) -> Generator[Wanted, Any, dict[Trajectory, Pin]]:
        """Return the pin of each reference, which fixes its latents at every step."""
        pins, inversions, model = {}, {}, self._preparer.fingerprint()
        for t in references:
            if t.pin is not None and t.pin[0] == model:
                continue  # kept from an earlier attempt that ran out of memory
            if t.held is not None:
                t.pin = model, latents_pin(*t.held)
                continue
            clean: torch.Tensor = yield partial(self._preparer.encode_picture, t)
            if t.inverted:
                inversions[t] = yield from self._invert(t, clean)
            else:
                t.pin = model, forward_pin(t, clean)
        if inversions:
            yield list(inversions.values())
        for t, group in inversions.items():
            t.pin = model, inverted_pin(group.trail)
            self._runtime.retire(group)
            self._inversions.remove(group)
        for t in references:
            pins[t] = t.pin[1]
        return pins

    def _invert(self, t: Trajectory, clean: torch.Tensor) -> Generator[Wanted, Any, Group]:
        """Return the group that inverts the picture of `t` to noise."""
        inversion, store = self._preparer.inversion(t), self._runtime.conditions
        inversion.start = clean
        made = yield from store.encoding([inversion], tuple(clean.shape[1:]))
        try:
            group = self._admit([inversion], made, {})
        finally:
            store.drop(made)
        self._inversions.append(group)
        return group
