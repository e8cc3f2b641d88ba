"""What a request says of its control pictures: which network reads each, how strongly, and when."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stylefast import values
from stylefast.errors import InvalidRequest
from stylefast.models.control_union import MODES
from stylefast.models.pictures import PictureSource, check_source

MAX_WEIGHT = 10.0
MOST_CONTROLS = 8
NONE, SAME = "none", "same"


@dataclass(frozen=True, eq=False)
class Control:
    """A control picture of a request, such as edges or a depth map, and how a ControlNet follows it.

    Args:
        image: the picture; it is scaled to cover the request's size and cropped, as the request's own picture is.
        network: name in `engine.controls`; None: the only one there is.
        weight: multiplies what the network adds, 0 to 10; 0 leaves it out.
        window: (start, end) in fractions of the steps that run; step i of n is steered if start <= i / n and
            (i + 1) / n <= end, as in diffusers.
        guess_mode: the prompt's branch alone is steered, and the finer feature maps less, so that the picture decides
            more than the prompt.
        reference: what steers the reference of the request's style: "none", the "same" picture, or a picture of its
            own. Refused where there is no reference that runs with the request: without a style that reads one, with
            the call's first picture as the reference, and with a bank of finished pages.
        mode: for a union network alone: which type the picture has, as its number or its name: openpose (0), depth (1),
            hed, pidi, scribble or ted (2), canny, lineart, anime_lineart or mlsd (3), normal (4), segment (5), tile (6)
            or repaint (7). Several pictures of one union run through it together, each weight in its input.

    Raises InvalidRequest for values out of range, ImageError for what is no picture.

    Examples:
        >>> sf.Control(engine.references()["neon"], weight=0.6, window=(0, 0.8)).window
        (0.0, 0.8)
        >>> sf.Control(engine.references()["neon"], weight=-1)
        Traceback (most recent call last):
        stylefast.errors.InvalidRequest: weight is -1; it must be a number from 0 to 10
    """

    image: PictureSource
    network: str | None = None
    weight: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    guess_mode: bool = False
    reference: str | PictureSource = NONE
    mode: str | int | None = None

    def __post_init__(self):
        checked: dict[str, Any] = {"image": check_source("a control's image", self.image)}
        if self.network is not None:
            checked["network"] = values.text("network", self.network, longest=values.QUOTED, empty=False)
        if isinstance(self.mode, str):
            checked["mode"] = values.one_of("mode", self.mode, MODES)
        elif self.mode is not None:
            checked["mode"] = values.whole_number("mode", self.mode, 0)
        checked["weight"] = values.real_number("weight", self.weight, 0, MAX_WEIGHT)
        checked["window"] = values.fractions("window", self.window)
        checked["guess_mode"] = values.flag("guess_mode", self.guess_mode)
        if not (isinstance(self.reference, str) and self.reference in (NONE, SAME)):
            checked["reference"] = check_source("a control's reference", self.reference)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def of_reference(self) -> "Control | None":
        """Return what steers the reference of a request; None: nothing does."""
        if not self.steers_reference:
            return None
        image = self.image if isinstance(self.reference, str) and self.reference == SAME else self.reference
        return replace(self, image=image, reference=NONE)

    @property
    def steers_reference(self) -> bool:
        """Return whether it says that something steers the reference."""
        return not (isinstance(self.reference, str) and self.reference == NONE)

    def active(self, step: int, steps: int) -> bool:
        """Return whether step `step` of the `steps` that run lies in the window, and the weight is not 0."""
        start, end = self.window
        return self.weight != 0 and start <= step / steps and (step + 1) / steps <= end


def normalise_controls(given: Any, steps: int) -> tuple[Control, ...]:
    """Return the controls of a request for None, one or several, each of which has a step to steer.

    Raises InvalidRequest.
    """
    several = values.entries(given)
    controls: Sequence[Any] = several if several is not None else () if given is None else (given,)
    if len(controls) > MOST_CONTROLS:
        raise InvalidRequest(f"the request has {len(controls)} control pictures; at most {MOST_CONTROLS} are allowed")
    for one in controls:
        if not isinstance(one, Control):
            raise InvalidRequest(
                f"control is {values.quoted(one)} ({type(one).__name__}); it must be a stylefast.Control, or a list of "
                "them"
            )
    for one in controls:
        if one.weight and not any(one.active(step, steps) for step in range(steps)):
            raise InvalidRequest(
                f"the window of a control is {values.quoted(one.window)}, in which none of the {steps} steps lies "
                "whole; widen it, or ask for more steps"
            )
    return tuple(controls)
