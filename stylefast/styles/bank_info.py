"""What a style bank was made from: the fields by which a request finds out whether the bank fits it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from stylefast.errors import StyleError
from stylefast.sampling.guidance import BRANCHES
from stylefast.styles.bank_size import DTYPES, STORES

FORMAT = 1
NOISES = ("generated", "forward", "ddim")


@dataclass(frozen=True)
class BankInfo:
    """What a bank was made from; `check_fits` compares in the order of these fields. Raises StyleError."""

    format: int
    model: str
    fingerprint: str
    store: str  # "kv", "hidden" or "latents"
    dtype: str  # of keys, values or hidden states; latents are float32
    scheduler: str
    schedule: str  # digest of the schedule's tables
    steps: int
    size: tuple[int, int]  # (width, height) in pixels
    guidance: float | None  # None for a picture, whose latents don't depend on guidance
    guidance_rescale: float | None
    branches: tuple[str, ...]
    negative_prompt: str
    prompt: str
    seed: int
    noise: str  # "generated" from the prompt, or a picture brought to a noise level "forward" or by "ddim" inversion
    references: int
    layers: tuple[int, ...]  # stored self-attention layers, registry order; none in a bank of latents
    styles: str  # digest of other styles that the reference shares, "" for none
    created: str  # UTC
    stylefast: str  # version

    def __post_init__(self):
        if self.format != FORMAT:
            raise StyleError(
                f"the style bank has format {self.format!r}; this version of stylefast reads format {FORMAT}: "
                "bake the style again, or use the version that wrote it"
            )
        for name in ("size", "branches", "layers"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):
                raise StyleError(f"{name} of a style bank is {value!r}; it must be a tuple")
            object.__setattr__(self, name, tuple(value))
        for name, allowed in (("store", STORES), ("dtype", DTYPES), ("noise", NOISES)):
            if getattr(self, name) not in allowed:
                raise StyleError(
                    f"{name} of a style bank is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}"
                )
        for name in ("model", "fingerprint", "scheduler", "schedule", "negative_prompt", "prompt", "styles", "created",
                     "stylefast"):  # fmt: skip
            if not isinstance(getattr(self, name), str):
                raise StyleError(f"{name} of a style bank is {getattr(self, name)!r}; it must be a string")
        numbers = [("steps", self.steps, 1), ("references", self.references, 1), ("seed", self.seed, 0)]
        numbers += [("size", side, 1) for side in self.size] + [("layers", layer, 0) for layer in self.layers]
        for name, value, least in numbers:
            if type(value) is not int or value < least:
                raise StyleError(f"{name} of a style bank is {value!r}; it must be a whole number of at least {least}")
        if len(self.size) != 2:
            raise StyleError(f"size of a style bank is {self.size}; it must be (width, height) in pixels")
        for name in ("guidance", "guidance_rescale"):
            value = getattr(self, name)
            if value is not None and not (type(value) in (int, float) and math.isfinite(value) and value >= 0):
                raise StyleError(f"{name} of a style bank is {value!r}; it must be None or a number of at least 0")
        if not self.branches or len(set(self.branches)) < len(self.branches) or not {*self.branches} <= {*BRANCHES}:
            raise StyleError(f"branches of a style bank are {self.branches}; allowed are {BRANCHES}, each once")
        if list(self.layers) != sorted(set(self.layers)):
            raise StyleError(f"layers of a style bank are {self.layers}; they must ascend, without repetition")
        if self.store == "latents" and (self.layers or self.dtype != "float32"):
            raise StyleError(
                f"a bank of latents has no layers and the type float32, not {len(self.layers)} layers in {self.dtype}"
            )
        if self.store != "latents" and not self.layers:
            raise StyleError(f"a bank with store={self.store!r} needs at least one self-attention layer")

    def to_json(self) -> dict:
        """The fields as types that JSON knows, in their order."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping) -> "BankInfo":
        """Back from `to_json`. Raises StyleError for another format first, then for missing or unknown fields."""
        if not isinstance(content, Mapping):
            raise StyleError(f"the style bank's metadata is a {type(content).__name__} where an object is expected")
        names = [entry.name for entry in fields(cls)]
        if content.get("format") == FORMAT and set(names) != set(content):
            odd = sorted(set(names) ^ set(content))
            raise StyleError(f"the style bank's metadata lacks or adds {', '.join(odd)}; bake the style again")
        return cls(**{name: content.get(name, ()) for name in names})
