"""One picture that somebody wants."""

import math
from dataclasses import dataclass
from typing import Any

from stylefast.errors import InvalidRequest, PromptError, StyleError
from stylefast.sampling.guidance import GuidanceInterval
from stylefast.styles.dream_styler import DreamStyler
from stylefast.styles.instant_style import InstantStyle
from stylefast.styles.style_aligned import StyleAligned

STYLES = (StyleAligned, InstantStyle, DreamStyler)
MAX_STEPS = 1000
MAX_PROMPT_CHARACTERS = 32_000


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and all that decides its picture; equal requests on equal models give equal pictures.

    Args:
        prompt: what the picture shows.
        negative_prompt: encoded for the null branch of guidance; empty means the model's own null prompt.
        style: None, a style, or several; at most one StyleAligned.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 or less runs one branch only.
        size: (width, height) in pixels, None for the model's native size.
        seed: of the picture's own noise generator.
        scheduler: a name of `stylefast.sampling.SCHEDULERS`, some also with "_karras" or "_exponential" behind it, or
            of `FEW_STEP_PRESETS` for models that were distilled to few steps ("sdxl_lightning").
        spacing: "leading", "linspace" or "trailing" timesteps; None: the model's own.
        guidance_rescale: in [0, 1]; pulls the guided prediction's deviation back (arXiv 2305.08891, section 3.4).
        guidance_interval: (start, end) in fractions of the steps; step i of n is guided if start <= i / n < end, and
            elsewhere runs the prompt's branch alone (arXiv 2404.07724), which halves the work of that step.

    Raises InvalidRequest for anything out of range.
    """

    prompt: str
    negative_prompt: str = ""
    style: Any = None
    steps: int = 30
    guidance: float = 5.0
    size: tuple[int, int] | None = None
    seed: int = 0
    scheduler: str = "euler"
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    spacing: str | None = None

    def __post_init__(self):
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise PromptError(f"{name} is a {type(text).__name__}; it must be a string")
            if len(text) > MAX_PROMPT_CHARACTERS:
                raise PromptError(f"{name} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are taken")
        if not self.prompt.strip():
            raise PromptError("the prompt is empty; say what the picture shows, e.g. 'a fish'")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 1 <= self.steps <= MAX_STEPS:
            raise InvalidRequest(f"steps is {self.steps!r}; it must be a whole number from 1 to {MAX_STEPS}")
        if not _is_number(self.guidance) or not 0 <= self.guidance <= 100:
            raise InvalidRequest(f"guidance is {self.guidance!r}; it must be a number from 0 to 100")
        if not _is_number(self.guidance_rescale) or not 0 <= self.guidance_rescale <= 1:
            raise InvalidRequest(f"guidance_rescale is {self.guidance_rescale!r}; it must be between 0 and 1")
        object.__setattr__(self, "guidance_interval", _check_interval(self.guidance_interval))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise InvalidRequest(f"seed is {self.seed!r}; it must be a whole number from 0 to 2^63 - 1")
        if not isinstance(self.scheduler, str):
            raise InvalidRequest(f"scheduler is {self.scheduler!r}; it must be a name such as 'euler'")
        if self.size is not None:
            object.__setattr__(self, "size", check_size(self.size))
        object.__setattr__(self, "style", normalise_styles(self.style))

    def styles_of(self, kind: type) -> list:
        """The request's styles of one class, in order."""
        return [style for style in self.style if isinstance(style, kind)]

    @property
    def aligned(self) -> StyleAligned | None:
        """The request's StyleAligned, if any."""
        return next(iter(self.styles_of(StyleAligned)), None)


def normalise_styles(style) -> tuple:
    """None, a style or a list of styles -> tuple of styles. Raises StyleError for anything else."""
    styles = () if style is None else tuple(style) if isinstance(style, (list, tuple)) else (style,)
    for one in styles:
        if not isinstance(one, STYLES):
            known = ", ".join(kind.__name__ for kind in STYLES)
            raise StyleError(f"style is {one!r} ({type(one).__name__}); it must be {known}, or a list of them")
    if sum(isinstance(one, StyleAligned) for one in styles) > 1:
        raise InvalidRequest("a request takes one StyleAligned; give it several references: reference=[a, b]")
    return styles


def check_size(size) -> tuple[int, int]:
    """(width, height) of whole numbers divisible by 8, at least 16. Raises InvalidRequest."""
    try:
        width, height = (int(side) for side in size)
        whole = (width, height) == tuple(size)
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise InvalidRequest(f"size is {size!r}; it must be (width, height) in pixels")
    for name, side in (("width", width), ("height", height)):
        if side % 8 or not 16 <= side <= 8192:
            nearest = min(max(round(side / 8) * 8, 16), 8192)
            raise InvalidRequest(f"{name} is {side}; it must be divisible by 8, from 16 to 8192; try {nearest}")
    return width, height


def _check_interval(interval) -> tuple[float, float]:
    pair = isinstance(interval, (list, tuple)) and len(interval) == 2 and all(map(_is_number, interval))
    if not pair:
        raise InvalidRequest(f"guidance_interval is {interval!r}; it must be (start, end), two fractions of the steps")
    checked = GuidanceInterval(float(interval[0]), float(interval[1]))
    return checked.start, checked.end


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
