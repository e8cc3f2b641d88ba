"""A call as JSON: everything that determines its pictures, and which requests shared a style object.

`to_record` writes it; `from_record` reads it, and also files written by hand. Pictures are stored by path, with a
digest of their decoded pixels, or inside the record if they came from memory and are small; learned vectors likewise.
Requests that share one style object may form a group, so styles are listed once and requests refer to them by number.
A style writes and reads its own fields (`Style.write_field`, `Style.read_field`).
"""

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from stylefast.errors import InvalidRequest, StyleError, StyleFastError
from stylefast.models.checkpoint import TINY
from stylefast.record_values import Sources, Store, plain
from stylefast.runtime.plan.control import NONE, SAME, Control
from stylefast.runtime.plan.notices import warnings_of
from stylefast.runtime.plan.request import Request
from stylefast.styles.style import Style, find_kind, kinds
from stylefast.values import builtins, check_fields, listed, quoted

FORMAT = "stylefast-call/1"
MAX_REQUESTS = 1000
PICTURES = ("image", "mask")  # of a request
_TOP = ("format", "styles", "requests")
_SIZE = re.compile(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*")


def to_record(requests: Sequence[Request], model_folder: Path = TINY) -> dict[str, Any]:
    """Return the call as a dictionary that `json.dumps` accepts.

    Files inside `model_folder` are stored relative to it, so that the record works on another machine. Pictures and
    vectors from memory are stored inside as long as they take fewer than 48,000 characters together; larger ones leave
    only their digest. Raises ImageError for pictures that can't be read, StyleError for values that JSON can't hold.
    """
    store = Store(model_folder)
    styles, places, entries = [], {}, []
    for request in requests:
        for style in request.styles:
            if id(style) not in places:
                places[id(style)] = len(styles)
                styles.append(_style_entry(style, store))
        others = ("style", "control", *PICTURES)
        entry = {f.name: plain(getattr(request, f.name)) for f in fields(Request) if f.name not in others}
        entry |= {name: store.picture(getattr(request, name), name == "mask") for name in PICTURES}
        entry["control"] = [_control_entry(control, store) for control in request.controls]
        entries.append(entry | {"style": [places[id(style)] for style in request.styles]})
    return {"format": FORMAT, "styles": styles, "requests": entries}


def from_record(
    record: Mapping | Sequence,
    base: str | Path | None = None,
    model_folder: Path = TINY,
    sources: Sources | None = None,
) -> list[Request]:
    """Return the requests of a record, or of a file written by hand.

    `record`: the result of `to_record`; or a list of requests; or {"requests": [...], "styles": [...] or {name: ...}}.
    A request's "style" is null, a style written out ({"kind": its class's name in any spelling, ...}), the number or
    name of one in "styles", or a list of those. A picture is a path, relative to `base`, or the name of one that ships
    in `model_folder`.

    Raises InvalidRequest for unknown fields and values out of range, StyleError for pictures and learned styles that
    changed since, or that were only in memory, ImageError for pictures that can't be read.
    """
    record = builtins("the call", record)
    if isinstance(record, (list, tuple)):
        record = {"requests": record}
    if not isinstance(record, Mapping):
        raise InvalidRequest(f'a call is a list of requests or {{"requests": [...]}}, not {quoted(record)}')
    check_fields("the call", record, _TOP)
    if record.get("format", FORMAT) != FORMAT:
        raise InvalidRequest(
            f"the call has the format {quoted(record['format'])}, not {quoted(FORMAT)}; update stylefast"
        )
    sources = sources or Sources(None if base is None else Path(base), model_folder)
    styles = _read_styles(record.get("styles", []), sources)
    entries = record.get("requests")
    if not isinstance(entries, (list, tuple)) or not entries:
        raise InvalidRequest(f'"requests" is {quoted(entries)}; it must be a list of at least one request')
    if len(entries) > MAX_REQUESTS:
        raise InvalidRequest(f"the call has {len(entries)} requests; at most {MAX_REQUESTS} are allowed at once")
    return [_in_place(f"request {i}", _read_request, entry, styles, sources) for i, entry in enumerate(entries)]


def metadata(requests: Sequence[Request], version: str, model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each picture's metadata, enough to make it again: the call, versions, and facts about the model.

    "warnings" lists what its request contradicts, such as guidance that a few-step preset was not made for.
    """
    packages = ("torch", "diffusers", "transformers")
    versions = {"stylefast": version, "python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in packages}
    common = {"stylefast": version, **model, "versions": versions, "call": to_record(requests)}
    return [
        {**common, "index": i, "seed": request.seed, "warnings": warnings_of(request)}
        for i, request in enumerate(requests)
    ]


def style_digest(styles: Sequence) -> str:
    """Return 16 hexadecimal digits that identify the contents of styles; "" for no styles."""
    if not styles:
        return ""
    entries = [_style_entry(style, Store(TINY)) for style in styles]
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]


# writing


def _style_entry(style: Style, store: Store) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": type(style).__name__}
    for f in fields(style):
        value = getattr(style, f.name)
        if f.init and not _is_default(value, f):
            entry[f.name] = style.write_field(f.name, value, store)
    return entry


def _is_default(value, f) -> bool:
    if value is None or f.default is MISSING or not isinstance(value, (str, bool, int, float, tuple, dict)):
        return value is None and f.default is None
    # a style may keep a missing dictionary as an empty one
    return value == f.default or (value == {} and f.default is None)


def _control_entry(control: Control, store: Store) -> dict[str, Any]:
    entry = {f.name: plain(getattr(control, f.name)) for f in fields(Control) if f.name not in ("image", "reference")}
    entry["image"], reference = store.picture(control.image), control.reference
    named = isinstance(reference, str) and reference in (NONE, SAME)
    return entry | {"reference": reference if named else store.picture(reference)}


# reading


def _read_styles(given, sources: Sources) -> dict[int | str, Any]:
    if isinstance(given, Mapping):
        named = given.items()
    elif isinstance(given, (list, tuple)):
        named = enumerate(given)
    else:
        raise InvalidRequest(f'"styles" is {quoted(given)}; it must be a list, or a dictionary of named styles')
    return {name: _in_place(f"style {quoted(name)}", _read_style, entry, sources) for name, entry in named}


def _read_request(entry, styles: Mapping, sources: Sources) -> Request:
    if not isinstance(entry, Mapping):
        raise InvalidRequest(f'a request is a dictionary such as {{"prompt": "a fish"}}, not {quoted(entry)}')
    check_fields("a request", entry, [f.name for f in fields(Request)])
    if "prompt" not in entry:
        raise InvalidRequest('"prompt" is missing; say what the picture shows, e.g. "prompt": "a fish"')
    values = dict(entry)
    for name in ("size", "window"):
        if isinstance(values.get(name), str):
            values[name] = parse_size(values[name], name)
        elif isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    for name in PICTURES:
        if values.get(name) is not None:
            values[name] = sources.picture(values[name], name == "mask")
    values["control"] = _read_controls(values.get("control"), sources)
    wanted = values.pop("style", None)
    wanted = wanted if isinstance(wanted, (list, tuple)) else [] if wanted is None else [wanted]
    return Request(**values, style=[_pick_style(one, styles, sources) for one in wanted])


def _read_controls(given, sources: Sources) -> list[Control]:
    """Return control pictures: null, one or a list, each a path or a dictionary with "image"."""
    found = []
    for entry in given if isinstance(given, (list, tuple)) else [] if given is None else [given]:
        if isinstance(entry, str):
            entry = {"image": entry}
        if not isinstance(entry, Mapping):
            raise InvalidRequest(
                f'a control is a path, or a dictionary such as {{"image": "edges.png"}}, not {quoted(entry)}'
            )
        check_fields("a control", entry, [f.name for f in fields(Control)])
        values: dict[str, Any] = dict(entry)
        if "image" not in values:
            raise InvalidRequest('a control lacks "image", its picture')
        values["image"] = sources.picture(values["image"])
        reference = values.get("reference", NONE)
        if reference not in (NONE, SAME):
            values["reference"] = sources.picture(reference)
        if isinstance(values.get("window"), list):
            values["window"] = tuple(values["window"])
        found.append(Control(**values))
    return found


def _pick_style(wanted, styles: Mapping, sources: Sources):
    if isinstance(wanted, Mapping):
        return _read_style(wanted, sources)
    if isinstance(wanted, bool) or not isinstance(wanted, (int, str)) or wanted not in styles:
        raise InvalidRequest(
            f'style is {quoted(wanted)}; "styles" has {listed(map(quoted, styles))}; use one of them, or write the '
            "style here in full"
        )
    return styles[wanted]


def _read_style(entry, sources: Sources):
    if not isinstance(entry, Mapping):
        known = next(iter(kinds()))
        raise InvalidRequest(f'a style is a dictionary such as {{"kind": "{known}"}}, not {quoted(entry)}')
    values = dict(entry)
    if "kind" in values and "type" in values:
        raise InvalidRequest('a style has "kind" and "type"; they mean the same, so use only one')
    return read_style(find_kind(values.pop("kind" if "kind" in values else "type", None)), values, sources)


def read_style(kind: type[Style], given: Mapping[str, Any], sources: Any) -> Style:
    """Return a style from its fields as a record holds them; sources: a `record_values.Sources`, or like one.

    Raises InvalidRequest for unknown fields, StyleError and ImageError.
    """
    values = dict(given)
    for alias, field_name in kind.aliases.items():
        if alias in values and field_name not in values:
            values[field_name] = values.pop(alias)
    known = {f.name: f for f in fields(kind) if f.init}
    check_fields(kind.__name__, values, [*known])
    missing = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING and n not in values]
    if missing:
        raise StyleError(f"{kind.__name__} lacks {quoted(missing[0])}")
    read = {n: None if value is None else kind.read_field(n, value, sources) for n, value in values.items()}
    style = kind(**read)
    style.check_recorded(values, sources)
    return style


def parse_size(text: str, name: str = "size") -> tuple[int, int]:
    """Return (1024, 768), width and height, for "1024x768". Raises InvalidRequest."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"{name} is {quoted(text)}; it must be WIDTHxHEIGHT in pixels, e.g. 1024x1024")
    return int(match[1]), int(match[2])


def _in_place(where: str, read, *arguments):
    try:
        return read(*arguments)
    except StyleFastError as error:
        raise type(error)(f"{where}: {error}") from error
