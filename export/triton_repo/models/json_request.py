"""Conversion of client requests, a JSON object and pictures, to requests of the engine.

Pictures are referred to by number, banks and learned styles by names that the server knows: a request contains no
paths, so clients can't read the server's files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import stylefast as sf
from stylefast.errors import ImageError, InvalidRequest, StyleError
from stylefast.record import PICTURES, read_style
from stylefast.styles.style import Style, find_kind, kinds
from stylefast.values import did_you_mean, load_json, quoted, real_number, seeds, whole_number

# those of `sf.Request` that all pictures of an order share; not loras and control, whose files the server would have
# to know
_SHARED = (
    "prompt_2",
    "negative_prompt",
    "negative_prompt_2",
    "prompt_syntax",
    "clip_skip",
    "steps",
    "guidance",
    "size",
    "scheduler",
    "guidance_rescale",
    "guidance_interval",
    "spacing",
    "image",
    "strength",
    "mask",
    "upscale",
    "upscale_strength",
    "upscale_mode",
    "variation_seed",
    "variation_strength",
    "window",
    "window_stride",
    "wrap",
)
_FIELDS = ("prompt", "seed", "style", "preview_every", "deadline", *_SHARED)
_MOST_PROMPTS = 64
_LARGEST_TEXT = 2**20


@dataclass(frozen=True)
class Order:
    """One client's order: pictures that are made together, and options of the answers."""

    requests: tuple[sf.Request, ...]
    preview_every: int  # steps; 0: no previews
    deadline: float | None  # seconds


@dataclass(frozen=True)
class Shelf:
    """Source of the styles that a request names: a folder of banks, and learned styles by name."""

    banks: Path | None
    learned: Mapping[str, Path]

    def bank(self, name: Any) -> sf.StyleBank:
        """Load the bank of a name. Raises StyleError."""
        if self.banks is None:
            raise StyleError("this server has no style banks; name its folder when the repository is written")
        known = sorted(path.stem for path in self.banks.glob("*.bank"))
        if not isinstance(name, str) or name not in known:
            raise StyleError(f"bank {quoted(name)} is not on this server; there are {', '.join(known) or 'none'}")
        return sf.StyleBank.load(self.banks / f"{name}.bank")

    def style(self, name: Any) -> Path:
        """Return the file of a learned style. Raises StyleError."""
        if not isinstance(name, str) or name not in self.learned:
            raise StyleError(
                f"learned style {quoted(name)} is not in this model; there are {', '.join(self.learned)}"
                f"{did_you_mean(name, self.learned)}"
            )
        return self.learned[name]


def read_order(text: bytes, pictures: Sequence[bytes], shelf: Shelf) -> Order:
    """Parse a request's JSON into an order. Raises InvalidRequest and its subclasses."""
    given = _parse(text)
    _only("the request", given, _FIELDS)
    prompts = given.get("prompt")
    prompts = prompts if isinstance(prompts, list) else [prompts]
    if not 1 <= len(prompts) <= _MOST_PROMPTS:
        raise InvalidRequest(f"{len(prompts)} prompts; a request takes 1 to {_MOST_PROMPTS}")
    numbered = zip(prompts, seeds("seed", given.get("seed", 0), len(prompts)), strict=True)
    shared = {name: given[name] for name in _SHARED if name in given}
    sent = _Sent(pictures, shelf)
    shared["style"] = _styles(given.get("style"), sent)
    for name in PICTURES:
        if shared.get(name) is not None:
            shared[name] = sent.picture(shared[name], name == "mask")
    every = whole_number("preview_every", given.get("preview_every", 0), 0)
    deadline = given.get("deadline")
    if deadline is not None:
        deadline = real_number("deadline", deadline, above=0)
    requests = tuple(sf.Request(prompt, seed=seed, **shared) for prompt, seed in numbered)
    return Order(requests, every, deadline)


def split_pictures(content: bytes, lengths: Sequence[int]) -> list[bytes]:
    """Split concatenated files. Raises ImageError."""
    if any(length < 1 for length in lengths) or sum(lengths) != len(content):
        raise ImageError(
            f"picture_bytes says {list(lengths)}, and pictures holds {len(content)} bytes; give the length of each file"
        )
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [content[end - length : end] for end, length in zip(ends, lengths)]


def _parse(text: bytes) -> dict[str, Any]:
    try:
        return load_json(text, "the request", kind=dict, largest=_LARGEST_TEXT)
    except InvalidRequest as error:
        raise InvalidRequest(f'{error}; send e.g. {{"prompt": "a boat"}}') from error


class _Sent:
    """Pictures by the numbers, banks and learned styles by the names that a client gives; no paths.

    A style reads its fields from it as from the `record_values.Sources` of a record.
    """

    def __init__(self, pictures: Sequence[bytes], shelf: Shelf):
        self._pictures, self._shelf = pictures, shelf

    def is_bank(self, entry: Any) -> bool:
        """Return whether a reference is a bank of the shelf."""
        return isinstance(entry, Mapping) and {*entry} == {"bank"}

    def bank(self, entry: Mapping) -> sf.StyleBank:
        """Return a bank of the shelf. Raises StyleError."""
        return self._shelf.bank(entry["bank"])

    def embedding(self, entry: Any) -> tuple[Path, None]:
        """Return the file of a learned style of the shelf, in which any vectors are right. Raises StyleError."""
        return self._shelf.style(entry["name"] if isinstance(entry, Mapping) and {*entry} == {"name"} else entry), None

    def picture(self, entry: Any, mask: bool = False) -> bytes | None:
        """Return the bytes of the picture of a number; None for no mask. Raises ImageError."""
        if entry is None and mask:
            return None
        if isinstance(entry, bool) or not isinstance(entry, int) or not 0 <= entry < len(self._pictures):
            what = "a mask" if mask else "a picture"
            sent = f"{len(self._pictures)} pictures were sent, and are named by number from 0"
            raise ImageError(f"{what} is {quoted(entry)}; {sent}")
        return self._pictures[entry]

    def tensor(self, entry: Any) -> NoReturn:
        """Raise StyleError: a client's request has no tensors."""
        raise StyleError(f"{quoted(entry)} stands for a tensor, which a request to a server can't hold; send a picture")

    image_embeds = tensor


def _styles(given: Any, sent: _Sent) -> list[Style]:
    if given is None:
        return []
    styles = []
    for entry in given if isinstance(given, list) else [given]:
        if not isinstance(entry, dict) or "method" not in entry:
            methods = ", ".join(kind.option or name for name, kind in kinds().items())
            raise StyleError(f"style is {quoted(entry)}; it must be an object with a method out of {methods}")
        arguments = dict(entry)
        kind = find_kind(arguments.pop("method"))
        for name, field in kind.served.items():
            if name in arguments:
                if field in arguments:
                    raise StyleError(f"{kind.__name__} takes {quoted(name)} or {quoted(field)}, not both")
                arguments[field] = {name: arguments.pop(name)}
        styles.append(read_style(kind, arguments, sent))
    return styles


def _only(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InvalidRequest(
            f"{what} has no {quoted(unknown[0])}; it takes {', '.join(known)}{did_you_mean(unknown[0], known)}"
        )
