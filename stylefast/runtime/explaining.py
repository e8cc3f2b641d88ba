"""Explaining a picture: run its request alone, and record what a point of it attends to."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stylefast import values
from stylefast.errors import InvalidRequest, StyleError
from stylefast.models.attention_maps import AttentionMaps, ImageMap, SharedMap
from stylefast.runtime.admission import RequestPlanner
from stylefast.runtime.jobs import Call
from stylefast.runtime.plan.request import MAX_STEPS
from stylefast.runtime.plan.sample import SampleGroup
from stylefast.runtime.runner import Runner
from stylefast.sampling.guidance import BRANCHES, FULL
from stylefast.styles.style import ImageStyle


class ExplainJob(Call):
    """A call of `Engine.explain`: it runs alone, and its references are returned behind its picture.

    point: (x, y) as fractions of the picture. layers: indices of those to record; steps: their numbers, from 1; None:
    all. `shared` and `image` are what was recorded, each with its step.
    """

    collects = True

    def __init__(
        self,
        *arguments: Any,
        point: tuple[float, float],
        layers: Sequence[int],
        steps: Sequence[int] | None,
        **more: Any,
    ):
        super().__init__(*arguments, **more)
        self._point, self._layers, self._wanted = point, layers, steps
        self._maps: AttentionMaps | None = None
        self.shared: list[tuple[int, SharedMap]] = []
        self.image: list[tuple[int, ImageMap]] = []

    def plan(self, planner: RequestPlanner) -> None:
        """Plan the samples; the references become outputs. Raises StyleError if there is nothing to explain."""
        super().plan(planner)
        assert self.samples is not None
        target = self.samples[0]
        if target.window_of is not None:
            raise InvalidRequest("a picture made of windows can't be explained; leave window out")
        pictured = any(isinstance(style, ImageStyle) for style in target.request.styles)
        if not target.references and target.bank is None and not pictured:
            raise StyleError(
                "nothing to explain: the request reads no reference and has no image prompt; give it a style that does"
            )
        if self._wanted is not None and max(self._wanted) > self.steps:
            raise InvalidRequest(f"steps has {max(self._wanted)}; the picture is made in {self.steps} steps")
        for number, reference in enumerate(target.references, 1):
            reference.output = number

    def before_step(self, runner: Runner, group: SampleGroup) -> AttentionMaps | None:
        """Return what records the picture's maps in the next step, if that step is wanted."""
        target = (self.samples or [])[0]
        if self._wanted is not None and group.done + 1 not in self._wanted:
            return None
        sizes, layers = runner.unet.attention_sizes(*group.latent_shape[1:]), runner.unet.layout.layers
        place, branch = group.samples.index(target), BRANCHES.index(FULL)
        levels = [sizes[layer.level] for layer in layers]
        self._maps = AttentionMaps(place, branch, self._point, levels, self._layers)
        return self._maps

    def after_step(self, runner: Runner, groups: Sequence[SampleGroup]) -> Sequence[Callable[[], None]]:
        """Keep what the step recorded."""
        maps, self._maps = self._maps, None
        if maps is not None:
            self.shared += [(groups[0].done, found) for found in maps.shared]
            self.image += [(groups[0].done, found) for found in maps.image]
        return super().after_step(runner, groups)


def check_point(point: Any, size: tuple[int, int]) -> tuple[float, float]:
    """Return the middle of the pixel (x, y) as fractions of a picture of `size`. Raises InvalidRequest."""
    sides = values.entries(point) or ()
    if len(sides) != 2:
        raise InvalidRequest(f"point is {values.quoted(point)}; it must be (x, y) in pixels")
    x, y = (values.whole_number(f"point's {name}", side, 0, most - 1) for name, side, most in zip("xy", sides, size))
    return (x + 0.5) / size[0], (y + 0.5) / size[1]


def check_steps(steps: Any) -> tuple[int, ...] | None:
    """Return the numbers of steps, from 1; None for all. Raises InvalidRequest."""
    if steps is None:
        return None
    found = values.several("steps", steps, least=1)
    return tuple(values.whole_number(f"steps[{i}]", step, 1, MAX_STEPS) for i, step in enumerate(found))


def arrays(found: SharedMap) -> tuple[np.ndarray | None, tuple[np.ndarray, ...]]:
    """Return the maps of a layer's own tokens and of the references, as arrays."""
    return None if found.own is None else found.own.numpy(), tuple(part.numpy() for part in found.references)
