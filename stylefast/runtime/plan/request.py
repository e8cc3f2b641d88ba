"""The request for one picture, and the result of a call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from PIL import Image

from stylefast import values
from stylefast.errors import InvalidRequest, PromptError, StyleError
from stylefast.models import prompt_syntax
from stylefast.models.masks import check_mask_shape
from stylefast.models.pictures import PictureSource, check_source, open_picture
from stylefast.models.prompt_syntax import SYNTAXES
from stylefast.runtime.plan.control import Control, normalise_controls
from stylefast.runtime.plan.windows import window_count, window_stride
from stylefast.sampling.guidance import MAX_GUIDANCE
from stylefast.sampling.schedule import first_step
from stylefast.sampling.spacing import SPACINGS
from stylefast.styles.style import ImageStyle, ReferenceStyle, Style, check_kind, kinds

MAX_STEPS = 1000
MIN_SIDE, MAX_SIDE = 16, 8192
MAX_LORAS = 32
MAX_UPSCALE = 4
UPSCALE_MODES = ("picture", "latents")
STRENGTH = 0.6
# fields of a picture without a second pass, and without variation
_SINGLE: dict[str, Any] = {"upscale": 1.0, "upscale_strength": 0.4, "upscale_mode": UPSCALE_MODES[0]}
_WHOLE: dict[str, Any] = {"window": None, "window_stride": None, "wrap": False}
_UNVARIED: dict[str, Any] = {"variation_seed": None, "variation_strength": 0.0}
# what a caller may give as styles; a `Request` holds a tuple of them
StyleLike: TypeAlias = Style | Sequence[Style] | None
# what a caller may give as control pictures; a `Request` holds a tuple of them
ControlLike: TypeAlias = Control | Sequence[Control] | None

# what a caller may give as a LoRA's strength: one number, or one for the UNet and one for the text encoders
LoraStrength: TypeAlias = float | Sequence[float]

Kind = TypeVar("Kind", bound=Style)


class LoraScale(NamedTuple):
    """Strengths of a LoRA in the UNet and in the text encoders."""

    unet: float
    text: float


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and all settings that determine its picture; equal requests on equal models give equal pictures.

    Args:
        prompt: what the picture shows.
        negative_prompt: encoded for the null branch of guidance; empty means the model's own null prompt.
        style: None, a style, or several; at most one that reads references.
        steps: denoising steps.
        guidance: classifier-free guidance scale; 1 or less runs one branch only.
        size: (width, height) in pixels, None for the model's native size.
        seed: of the picture's own noise generator, 0 to 2^64 - 1; None or -1 draws one, which is stored in the request.
        scheduler: a name of `stylefast.sampling.SCHEDULERS`, some also with the suffix "_karras" or "_exponential", or
            of `FEW_STEP_PRESETS` for models distilled to few steps ("sdxl_lightning").
        spacing: "leading", "linspace" or "trailing" timesteps; None: the model's own.
        guidance_rescale: in [0, 1]; pulls the guided prediction's deviation back (arXiv 2305.08891, section 3.4).
        guidance_interval: (start, end) in fractions of the steps; step i of n is guided if start <= i / n < end, and
            otherwise runs only the prompt's branch (arXiv 2404.07724), which halves the work of that step.
        clip_skip: number of layers before SDXL's second-to-last from which the prompt's text states are taken, as in
            diffusers' SDXL pipelines; None is 0. The negative prompt always uses the second-to-last.
        loras: name -> strength of LoRAs registered with `engine.loras.add`, or (strength in the UNet, strength in the
            text encoders). They apply to this picture alone, its references and negative prompt included.
        prompt_2, negative_prompt_2: texts for text encoder 2, as in diffusers' SDXL pipelines; None: the same texts.
        prompt_syntax: "plain" text, or weights as in "a1111" or "compel" (docs/prompts.md), in all of its prompts,
            those of its styles included.
        image: picture to begin with instead of noise (docs/pictures.md); it is scaled to cover `size` and cropped, and
            None as `size` is then its own, rounded down to sides divisible by 8.
        strength: share of the steps that change `image`, in (0, 1]; of n steps the last int(n * strength) run.
        mask: what of `image` to repaint: white is repainted, black kept, grey mixes the two; None: all of it.
        upscale: factor by which both sides are enlarged, 1 to 4: the finished picture is enlarged and begins a second
            pass of `upscale_strength`; 1: no second pass.
        upscale_strength: share of the steps of that pass, as `strength`.
        upscale_mode: what is enlarged: "picture", decoded, by Lanczos' filter, or "latents", bilinearly.
        variation_seed: seed of a second noise that the first is turned towards; None or -1 draws one.
        variation_strength: share of the way to that noise, in [0, 1].
        control: None, a `Control` or several: pictures that ControlNets follow (docs/control.md).
        window: (width, height) in pixels of overlapping windows in which a larger picture is made, such as the model's
            native size; None: the picture is made whole (docs/pictures.md).
        window_stride: distance between windows in pixels, divisible by 8; None: a quarter of the smaller side.
        wrap: whether the picture's left and right edge fit together, which needs `window`.

    Raises InvalidRequest for anything out of range, ImageError for an `image` or `mask` that can't be read.

    Examples:
        >>> request = sf.Request("a fish", steps=2, size=(96, 64), scheduler="unipc", loras={})
        >>> engine.generate(request).images[0].size
        (96, 64)
        >>> sf.Request("a fish", size=(100, 64))
        Traceback (most recent call last):
        stylefast.errors.InvalidRequest: width is 100; it must be divisible by 8, from 16 to 8192; try 96
    """

    prompt: str
    negative_prompt: str = ""
    style: StyleLike = None
    steps: int = 30
    guidance: float = 5.0
    size: tuple[int, int] | None = None
    seed: int | None = 0
    scheduler: str = "euler"
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    spacing: str | None = None
    clip_skip: int | None = 0
    loras: Mapping[str, LoraStrength] | None = field(default_factory=dict)
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    prompt_syntax: str = "plain"
    image: PictureSource | None = None
    strength: float = STRENGTH
    mask: PictureSource | torch.Tensor | None = None
    upscale: float = 1.0
    upscale_strength: float = 0.4
    upscale_mode: str = "picture"
    variation_seed: int | None = None
    variation_strength: float = 0.0
    control: ControlLike = None
    window: tuple[int, int] | None = None
    window_stride: int | None = None
    wrap: bool = False

    def __post_init__(self):
        checked: dict[str, Any] = {
            name: values.prompt(name, getattr(self, name))
            for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
            if getattr(self, name) is not None or not name.endswith("_2")
        }
        if not checked["prompt"].strip():
            raise PromptError("the prompt is empty; say what the picture shows, e.g. 'a fish'")
        checked["steps"] = values.whole_number("steps", self.steps, 1, MAX_STEPS)
        checked["guidance"] = values.real_number("guidance", self.guidance, 0, MAX_GUIDANCE)
        checked["guidance_rescale"] = values.real_number("guidance_rescale", self.guidance_rescale, 0, 1)
        checked["guidance_interval"] = values.fractions("guidance_interval", self.guidance_interval)
        checked["seed"] = values.seed("seed", self.seed)
        checked["scheduler"] = values.text("scheduler", self.scheduler)
        checked["clip_skip"] = 0 if self.clip_skip is None else values.whole_number("clip_skip", self.clip_skip, 0, 99)
        if self.size is not None:
            checked["size"] = check_size(self.size)
        if self.spacing is not None:
            checked["spacing"] = values.one_of("spacing", self.spacing, SPACINGS)
        checked["style"] = normalise_styles(self.style)
        checked["loras"] = normalise_loras(self.loras)
        checked["prompt_syntax"] = values.one_of("prompt_syntax", self.prompt_syntax, SYNTAXES)
        checked["strength"] = values.real_number("strength", self.strength, 0, 1)
        checked["upscale"] = values.real_number("upscale", self.upscale, 1, MAX_UPSCALE)
        checked["upscale_strength"] = values.real_number("upscale_strength", self.upscale_strength, 0, 1)
        checked["upscale_mode"] = values.one_of("upscale_mode", self.upscale_mode, UPSCALE_MODES)
        if checked["upscale"] > 1:
            _check_strength("upscale_strength", checked["upscale_strength"], checked["steps"])
        checked["variation_strength"] = values.real_number("variation_strength", self.variation_strength, 0, 1)
        checked["wrap"] = values.flag("wrap", self.wrap)
        checked |= self._picture(checked) | self._variation(checked) | self._windows(checked)
        self._check_effects(checked)
        begin = first_step(checked["steps"], checked["strength"]) if self.image is not None else 0
        checked["control"] = normalise_controls(self.control, checked["steps"] - begin)
        self._check_steered(checked)
        self._check_whole(checked)
        slots = [slot for style in checked["style"] for slot in style.placeholders]
        for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2"):
            prompt_syntax.check(name, checked.get(name, ""), checked["prompt_syntax"], slots)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _picture(self, checked: Mapping[str, Any]) -> dict[str, Any]:
        """Return the checked fields of the picture that the request begins with."""
        if self.image is None:
            if self.mask is not None:
                raise InvalidRequest("mask says what of a picture to repaint, but there is none; give it as image")
            return {}
        image, size = check_source("image", self.image), checked.get("size")
        if size is None:
            size = own_size(open_picture(image))
        _check_strength("strength", checked["strength"], checked["steps"])
        if self.mask is not None:
            check_source("mask", self.mask, (torch.Tensor,))
            check_mask_shape(self.mask, size[::-1])
        return {"image": image, "size": size}

    def _variation(self, checked: Mapping[str, Any]) -> dict[str, Any]:
        """Return the checked seed of a variation, drawn if it is needed and not given."""
        if self.variation_seed is None and not checked["variation_strength"]:
            return {}
        return {"variation_seed": values.seed("variation_seed", self.variation_seed)}

    def _windows(self, checked: Mapping[str, Any]) -> dict[str, Any]:
        """Return the checked fields of the windows in which the picture is made."""
        if self.window is None:
            if self.window_stride is None:
                return {}
            return {"window_stride": values.whole_number("window_stride", self.window_stride, 8, MAX_SIDE)}
        window, size = check_size(self.window, "window"), checked.get("size")
        shown = "x".join(map(str, window))
        if size is None:
            raise InvalidRequest(f"window is {shown}, a part of the picture's size, which must then be given as size")
        if window[0] > size[0] or window[1] > size[1] or (window == size and not checked["wrap"]):
            raise InvalidRequest(
                f"window is {shown}, and the picture's size {size[0]}x{size[1]}; the picture must be larger than a "
                "window, or wrap around"
            )
        stride = window_stride(window, self.window_stride)
        stride = values.whole_number("window_stride", stride, 8, min(window))
        if stride % 8:
            raise InvalidRequest(f"window_stride is {stride}; it must be divisible by 8")
        window_count(size, window, stride, checked["wrap"])
        return {"window": window, "window_stride": stride}

    def _check_whole(self, checked: Mapping[str, Any]) -> None:
        """Raise InvalidRequest for what is not possible in windows."""
        if self.window is None:
            return
        reads = next((style.reads for style in checked["style"] if isinstance(style, ReferenceStyle)), None)
        pictured = [style for style in checked["style"] if isinstance(style, ImageStyle)]
        masked = any(segment.mask is not None for style in pictured for segment in style.segments)
        for name, given in (
            ("image", self.image is not None),
            ("upscale", checked["upscale"] > 1),
            ("control", bool(checked["control"])),
            ("a style with a mask", masked),
            ("a style whose reference is the call's first picture", reads is not None and reads.of_call),
        ):
            if given:
                raise InvalidRequest(f"{name} does not go together with window; leave one of them out")

    def _check_effects(self, checked: Mapping[str, Any]) -> None:
        """Raise InvalidRequest for settings of what the request does not have."""
        idle: dict[str, tuple[Any, str]] = {} if self.image is not None else {"strength": (STRENGTH, "image")}
        if checked["upscale"] == 1:
            idle |= {name: (_SINGLE[name], "upscale") for name in ("upscale_strength", "upscale_mode")}
        if self.window is None:
            idle |= {name: (_WHOLE[name], "window") for name in ("window_stride", "wrap")}
        if not checked["variation_strength"]:
            idle["variation_seed"] = (None, "variation_strength")
        for name, (usual, needed) in idle.items():
            if checked.get(name, usual) != usual:
                raise InvalidRequest(
                    f"{name} is {values.quoted(checked[name])}, which has no effect without {needed}; give that too, "
                    f"or leave {name} out"
                )

    def _check_steered(self, checked: Mapping[str, Any]) -> None:
        """Raise InvalidRequest for controls of a reference that does not run with the request."""
        if not any(control.steers_reference for control in checked["control"]):
            return
        reads = next((style.reads for style in checked["style"] if isinstance(style, ReferenceStyle)), None)
        if reads is None:
            why = "the request has no style that reads a reference"
        elif reads.of_call:
            why = "the style's reference is the call's first picture, whose own request says what steers it"
        elif reads.bank is not None and reads.bank.info.store != "latents":
            why = "the pages of the style's bank are finished"
        else:
            return
        raise InvalidRequest(f"a control says what steers the reference, but {why}; leave the control's reference out")

    def from_noise(self) -> "Request":
        """Return the request without its own pictures, windows and variation, as its references are made."""
        own = {"image": None, "strength": STRENGTH, "mask": None, "control": None, "size": self.window or self.size}
        return replace(self.first_pass(), **own, **_WHOLE, **_UNVARIED)

    def first_pass(self) -> "Request":
        """Return the request of the picture that a second pass begins with."""
        return replace(self, **_SINGLE)

    @property
    def controls(self) -> tuple[Control, ...]:
        """Return the request's control pictures; `control` is this tuple too, whatever it was made of."""
        assert isinstance(self.control, tuple)  # since `__post_init__`
        return self.control

    @property
    def negatives(self) -> str:
        """Return the negative prompts for both text encoders, one after the other."""
        return " ".join([self.negative_prompt, self.negative_prompt_2 or ""])

    @property
    def styles(self) -> tuple[Style, ...]:
        """Return the request's styles, in order; `style` is this tuple too, whatever it was made of."""
        assert isinstance(self.style, tuple)  # since `__post_init__`
        return self.style

    @property
    def lora_scales(self) -> Mapping[str, LoraScale]:
        """Return name -> strengths of the request's LoRAs; `loras` is this mapping too, whatever it was made of."""
        return normalise_loras(self.loras)

    def styles_of(self, kind: type[Kind]) -> list[Kind]:
        """Return the request's styles of one class, in order."""
        return [style for style in self.styles if isinstance(style, kind)]

    @property
    def reader(self) -> ReferenceStyle | None:
        """Return the request's style that reads references, if any."""
        return next(iter(self.styles_of(ReferenceStyle)), None)


@dataclass(frozen=True, eq=False)
class Result:
    """Result of `Engine.generate`, in the order of the prompts.

    Attributes:
        images: PIL images, or for output="np" float arrays [height, width, 3] in 0..1, or empty for "latents".
        latents: per picture [channels, h, w] fp32, before the VAE.
        metadata: per picture, enough to make it again.
    """

    images: list[Any]
    latents: list[torch.Tensor]
    metadata: list[dict[str, Any]] = field(repr=False)


def normalise_styles(style: Any) -> tuple[Style, ...]:
    """Return a tuple of styles for None, a style or a list of styles. Raises StyleError, InvalidRequest."""
    several = values.entries(style)
    styles = tuple(several) if several is not None else () if style is None else (style,)
    for one in styles:
        if not isinstance(one, Style):
            known = ", ".join(kinds())
            raise StyleError(
                f"style is {values.quoted(one)} ({type(one).__name__}); it must be {known}, or a list of them"
            )
        check_kind(type(one))
    readers = [type(one).__name__ for one in styles if isinstance(one, ReferenceStyle)]
    if len(readers) > 1:
        kinds_of = " or ".join(dict.fromkeys(readers))
        raise InvalidRequest(f"a request takes one {kinds_of}; give it several references: reference=[a, b]")
    return styles


def normalise_loras(loras: Any) -> Mapping[str, LoraScale]:
    """Return name -> strengths for None or a mapping of names to one or two numbers. Raises InvalidRequest."""
    if loras is None:
        return {}
    if not isinstance(loras, Mapping):
        raise InvalidRequest(
            f"loras is {values.quoted(loras)}; it must be names with strengths, such as {{'pixel': 0.8}}"
        )
    loras = values.mapping("loras", loras)
    if len(loras) > MAX_LORAS:
        raise InvalidRequest(f"the request names {len(loras)} LoRAs; at most {MAX_LORAS} are allowed")
    found = {}
    for name, strength in loras.items():
        name = values.text("the name of a LoRA", name, longest=values.QUOTED, empty=False)
        what = f"the strength of LoRA {values.quoted(name)}"
        both = values.entries(strength)
        both = [strength, strength] if both is None else both
        if len(both) != 2:
            raise InvalidRequest(f"{what} is {values.quoted(strength)}; give one number, or (UNet, text encoders)")
        limits = (-values.MAX_STRENGTH, values.MAX_STRENGTH)
        found[name] = LoraScale(*(values.real_number(what, one, *limits) for one in both))
    return found


def _check_strength(name: str, strength: float, steps: int) -> None:
    """Raise InvalidRequest for a strength that leaves no step to run."""
    if first_step(steps, strength) >= steps:
        raise InvalidRequest(
            f"{name} is {strength:g}, which of {steps} steps leaves none to run; give at least {1 / steps:.3f}, or "
            "more steps"
        )


def own_size(picture: Image.Image) -> tuple[int, int]:
    """Return the (width, height) of a picture rounded down to sides divisible by 8. Raises InvalidRequest."""
    width, height = (side - side % 8 for side in picture.size)
    try:
        return check_size((width, height))
    except InvalidRequest as error:
        raise InvalidRequest(
            f"image has {picture.width}x{picture.height} pixels, and without a size the picture becomes as large: "
            f"{error}; give size=(width, height)"
        ) from None


def check_size(size: Any, name: str = "size") -> tuple[int, int]:
    """Return (width, height) as whole numbers divisible by 8, from 16 to 8192. Raises InvalidRequest."""
    sides = values.entries(size) or ()
    if len(sides) != 2:
        raise InvalidRequest(f"{name} is {values.quoted(size)}; it must be (width, height) in pixels")
    part = "" if name == "size" else f"{name}'s "
    return _check_side(f"{part}width", sides[0]), _check_side(f"{part}height", sides[1])


def _check_side(name: str, side) -> int:
    number = values.whole_number(name, side)
    if number % 8 or not MIN_SIDE <= number <= MAX_SIDE:
        nearest = round(min(max(number, MIN_SIDE), MAX_SIDE) / 8) * 8
        raise InvalidRequest(
            f"{name} is {values.quoted(side)}; it must be divisible by 8, from {MIN_SIDE} to {MAX_SIDE}; try {nearest}"
        )
    return number
