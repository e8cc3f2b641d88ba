"""Provenance of style banks: the fields that decide whether a bank fits a request."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from stylefast import values
from stylefast.errors import StyleError
from stylefast.models.prompt_syntax import SYNTAXES
from stylefast.sampling.guidance import BRANCHES
from stylefast.styles.bank_size import DTYPES, STORES

FORMAT = 1
NOISES = ("generated", "forward", "ddim")


@dataclass(frozen=True)
class BankInfo:
    """Provenance of a bank; `StyleBank.check_fits` compares fields in this order. Raises StyleError for bad values."""

    format: int
    model: str
    fingerprint: str
    store: str  # "kv", "hidden" or "latents"
    dtype: str  # of keys, values or hidden states; latents are float32
    scheduler: str
    schedule: str  # digest of the schedule's tables
    steps: int
    size: tuple[int, int]  # (width, height) in pixels
    guidance: float | None  # None for a real picture, whose latents don't depend on guidance
    guidance_rescale: float | None
    branches: tuple[str, ...]
    negative_prompt: str
    prompt: str
    seed: int
    noise: str  # "generated" from the prompt, or a picture noised "forward" or by "ddim" inversion
    references: int
    layers: tuple[int, ...]  # stored self-attention layers, registry order; empty in a bank of latents
    styles: str  # digest of the other styles shared with the reference, "" for none
    created: str  # UTC
    stylefast: str  # version
    negative_prompt_2: str | None = None  # for text encoder 2; None: the same
    prompt_syntax: str = "plain"  # of all of them
    clip_skip: int = 0  # of the reference's prompt
    loras: str = ""  # digests and strengths of the LoRAs that the reference was made under, "" for none
    lora_names: tuple[str, ...] = ()  # what messages say of them

    def __post_init__(self):
        if self.format != FORMAT:
            raise StyleError(
                f"the style bank has format {values.quoted(self.format)}; this version of stylefast reads format "
                f"{FORMAT}: bake the style again, or use the version that wrote it"
            )
        checked: dict = {}
        for name in ("size", "branches", "layers", "lora_names"):
            checked[name] = tuple(values.several(_what(name), getattr(self, name), error=StyleError))
        for name, allowed in (("store", STORES), ("dtype", DTYPES), ("noise", NOISES)):
            checked[name] = values.one_of(_what(name), getattr(self, name), allowed, error=StyleError)
        for name in (
            "model",
            "fingerprint",
            "scheduler",
            "schedule",
            "negative_prompt",
            "prompt",
            "styles",
            "loras",
            "created",
            "stylefast",
        ):
            checked[name] = values.text(_what(name), getattr(self, name), error=StyleError)
        for one in checked["lora_names"]:
            values.text(_what("lora_names"), one, error=StyleError)
        if self.negative_prompt_2 is not None:
            name = "negative_prompt_2"
            checked[name] = values.text(_what(name), self.negative_prompt_2, error=StyleError)
        name = "prompt_syntax"
        checked[name] = values.one_of(_what(name), self.prompt_syntax, SYNTAXES, error=StyleError)
        for name, least, most in (
            ("steps", 1, None),
            ("references", 1, None),
            ("seed", 0, values.MAX_SEED),
            ("clip_skip", 0, None),
        ):
            checked[name] = values.whole_number(_what(name), getattr(self, name), least, most, error=StyleError)
        for name, least in (("size", 1), ("layers", 0)):
            whole = (values.whole_number(_what(name), one, least, error=StyleError) for one in checked[name])
            checked[name] = tuple(whole)
        for name in ("guidance", "guidance_rescale"):
            if getattr(self, name) is not None:
                checked[name] = values.real_number(_what(name), getattr(self, name), 0, error=StyleError)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if len(self.size) != 2:
            raise StyleError(
                f"size of a style bank is {values.quoted(self.size)}; it must be (width, height) in pixels"
            )
        known = [isinstance(branch, str) and branch in BRANCHES for branch in self.branches]
        if not known or not all(known) or len(set(self.branches)) < len(self.branches):
            raise StyleError(
                f"branches of a style bank are {values.quoted(self.branches)}; choose from {BRANCHES}, each at most "
                "once"
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise StyleError(
                f"layers of a style bank are {values.quoted(self.layers)}; they must be ascending, without repetition"
            )
        if self.store == "latents" and (self.layers or self.dtype != "float32"):
            raise StyleError(
                f"a bank of latents has no layers and the type float32, not {len(self.layers)} layers in {self.dtype}"
            )
        if self.store != "latents" and not self.layers:
            raise StyleError(f"a bank with store={values.quoted(self.store)} needs at least one self-attention layer")

    def to_json(self) -> dict:
        """Return the fields in order as JSON-compatible types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping) -> "BankInfo":
        """Build from the output of `to_json`.

        Raises StyleError for another format, then for missing or unknown fields, then for bad values.
        """
        if not isinstance(content, Mapping):
            raise StyleError(f"the style bank's metadata is a {type(content).__name__}, but must be an object")
        names = [entry.name for entry in fields(cls)]
        # banks from before LoRAs per row, syntaxes of prompts, or with no other clip skip, lack them
        later = {"loras": "", "lora_names": (), "negative_prompt_2": None, "prompt_syntax": "plain", "clip_skip": 0}
        given: dict[str, Any] = {**later, **content}
        if given.get("format") == FORMAT and set(names) != set(given):
            odd = values.quoted(", ".join(sorted(set(names) ^ set(given))))
            raise StyleError(f"the style bank's metadata has missing or unknown fields: {odd}; bake the style again")
        return cls(**{name: given.get(name, ()) for name in names})


def _what(name: str) -> str:
    return f"{name} of a style bank"
