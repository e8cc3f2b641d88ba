"""Colours of a reference for pictures that read it: the colour calibration of Visual Style Prompting.

Jeong, Kim, Choi, Lee, Uh, "Visual Style Prompting with Swapping Self-Attention", 2024 (arXiv 2402.12974): in a few late
steps, each channel of the noise-free estimate takes the mean and deviation of the reference's. The step's estimate of
the noise stays, so that the next latents change by the estimate's change times its share in them.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stylefast.sampling.schedule import Schedule

_AFTER, _UNTIL = 100, 150  # training timesteps, both excluded, as in the released code
_EPS = 1e-8


def calibrated_steps(schedule: Schedule, running: Sequence[int]) -> dict[int, float]:
    """Return the steps in which colours are calibrated, each with the share of the estimate in the next latents.

    running: the steps in which the picture reads its reference. If none of them is in the range, it is the last one
    above it; or the first, of a picture that begins with another below it.
    """
    times = schedule.timesteps.tolist()
    found = [step for step in running if _AFTER < times[step] < _UNTIL]
    if not found:
        found = [step for step in running if times[step] >= _UNTIL][-1:] or list(running[:1])
    return {step: float(schedule.forward[step + 1, 0]) for step in found}


class Calibration:
    """The calibration of one picture of a group.

    slot: the picture's. reference: the slot of its reference, or that picture's latents [channels, h, w]. strength: 0
    to 1. steps: from `calibrated_steps`.
    """

    def __init__(self, slot: int, reference: int | Tensor, strength: float, steps: dict[int, float]):
        self._slot, self._reference, self._strength, self._steps = slot, reference, strength, steps

    def apply(self, state: Any, step: int) -> None:
        """Change the picture in a `LatentSlots` after `step` was made, if it is one of its steps."""
        share = self._steps.get(step)
        if share is None:
            return
        own, reference = state.history[self._slot, 0], self._reference
        wanted = reference.to(own) if isinstance(reference, Tensor) else state.history[reference, 0]
        scaled = (own - own.mean((1, 2), keepdim=True)) / (own.std((1, 2), keepdim=True) + _EPS)
        scaled = scaled * wanted.std((1, 2), keepdim=True) + wanted.mean((1, 2), keepdim=True)
        change = self._strength * (scaled - own)
        own.add_(change)
        state.latents[self._slot].add_(change, alpha=share)
