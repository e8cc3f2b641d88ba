"""Conversion of client requests, a JSON object and pictures, to requests of the engine.

Pictures are referred to by number, banks and learned styles by names that the server knows: a request contains no
paths, so clients can't read the server's files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import stylefast as sf
from stylefast.errors import ImageError, InvalidRequest, StyleError
from stylefast.values import did_you_mean, load_json, quoted, real_number, seeds, whole_number

_SHARED = (
    "negative_prompt",
    "steps",
    "guidance",
    "size",
    "scheduler",
    "guidance_rescale",
    "guidance_interval",
    "spacing",
)
_FIELDS = ("prompt", "seed", "style", "preview_every", "deadline", *_SHARED)
_MOST_PROMPTS = 64
_LARGEST_TEXT = 2**20
# style arguments that are pictures
_PICTURES = {"reference", "image", "mask", "negative_image"}


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
    shared["style"] = _styles(given.get("style"), pictures, shelf)
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


def _styles(given: Any, pictures: Sequence[bytes], shelf: Shelf) -> list:
    if given is None:
        return []
    makers: dict[str, Callable[..., Any]] = {"aligned": _aligned, "instant": _instant, "learned": _learned}
    styles = []
    for entry in given if isinstance(given, list) else [given]:
        method = entry.get("method") if isinstance(entry, dict) else None
        if not isinstance(method, str) or method not in makers:
            raise StyleError(f"style is {quoted(entry)}; it must be an object with a method out of {', '.join(makers)}")
        arguments = {name: value for name, value in entry.items() if name != "method"}
        for name in _PICTURES & arguments.keys():
            arguments[name] = _picture(name, arguments[name], pictures)
        styles.append(makers[method](arguments, shelf))
    return styles


def _aligned(arguments: dict[str, Any], shelf: Shelf) -> sf.StyleAligned:
    _only("style aligned", arguments, (*_arguments_of(sf.StyleAligned), "bank"))
    bank = arguments.pop("bank", None)
    if bank is not None:
        if "reference" in arguments:
            raise StyleError("style aligned takes a reference or a bank, not both")
        arguments["reference"] = shelf.bank(bank)
    return sf.StyleAligned(**arguments)


def _instant(arguments: dict[str, Any], _shelf: Shelf) -> sf.InstantStyle:
    _only("style instant", arguments, _arguments_of(sf.InstantStyle))
    if arguments.get("image") is None:
        raise StyleError('style instant needs a picture; send one and give its number: "image": 0')
    return sf.InstantStyle(**arguments)


def _learned(arguments: dict[str, Any], shelf: Shelf) -> sf.DreamStyler:
    _only("style learned", arguments, ("name", "context", "template", "style_prompt"))
    return sf.DreamStyler(shelf.style(arguments.pop("name", None)), **arguments)


def _picture(name: str, given: Any, pictures: Sequence[bytes]) -> Any:
    """Return the bytes of the picture or pictures given by number. Raises ImageError."""
    if given is None:
        return None
    if isinstance(given, list):
        return [_picture(name, one, pictures) for one in given]
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < len(pictures):
        shown = quoted(given)
        raise ImageError(f"{name} is {shown}; {len(pictures)} pictures were sent, and are named by number from 0")
    return pictures[given]


def _arguments_of(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind) if field.init)


def _only(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InvalidRequest(
            f"{what} has no {quoted(unknown[0])}; it takes {', '.join(known)}{did_you_mean(unknown[0], known)}"
        )
