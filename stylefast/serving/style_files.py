"""A registered style: a folder with `style.json` and the files that it names, all of them in that folder.

    {"format": "stylefast-style/1",
     "styles": [{"kind": "InstantStyle", "image": "reference.png", "scale": 0.8}],
     "loras": {"ink.safetensors": 0.6},
     "defaults": {"steps": 20, "scheduler": "euler"},
     "banks": [{"file": "bank-0123456789ab.bank", "style": 0}],
     "licence": "CC-BY-4.0", "description": "...", "created": "2026-11-30T12:00:00+00:00",
     "files": {"reference.png": {"sha256": "...", "bytes": 12345}, ...}}

"styles" are written as in a request file; their pictures, learned vectors and banks are names of files in the folder.
A bank in "banks" stands in for the reference of a style where a request has the settings that it was baked with.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from stylefast import values
from stylefast.errors import StyleError
from stylefast.values import quoted

FORMAT, MANIFEST = "stylefast-style/1", "style.json"
MANIFEST_BYTES = 2**20
MOST_STYLES, MOST_FILES, MOST_TEXT = 8, 64, 2000
# settings of a request that a style may bring
DEFAULTS = (
    "steps",
    "scheduler",
    "guidance",
    "size",
    "negative_prompt",
    "negative_prompt_2",
    "guidance_rescale",
    "guidance_interval",
    "spacing",
    "clip_skip",
    "prompt_syntax",
)
_FIELDS = ("format", "styles", "loras", "defaults", "banks", "licence", "description", "created", "files")
# ASCII alone, so that no two names look alike
_NAME, _FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"), re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}
# clients send these as OpenAI's own styles, which do nothing
_RESERVED = ("vivid", "natural")


def safe_name(name: Any, what: str = "the name of a style") -> str:
    """Return a name that is a folder's on every system: 1 to 64 letters, digits, - and _. Raises StyleError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in _DEVICES:
        raise StyleError(
            f"{what} is {quoted(name)}; it must have 1 to 64 of the characters a-z, A-Z, 0-9, - and _, begin with a "
            "letter or digit, and not be the name of a device such as nul"
        )
    if name.lower() in _RESERVED:
        raise StyleError(f"{what} is {quoted(name)}, which clients send without a meaning; choose another")
    return name


def safe_file(name: Any) -> str:
    """Return the name of a file of a style, without folders. Raises StyleError."""
    fits = isinstance(name, str) and _FILE.fullmatch(name) and not name.endswith(".")
    if not fits or name.partition(".")[0].lower() in _DEVICES or name.lower() == MANIFEST:
        raise StyleError(
            f"a file of the style is called {quoted(name)}; names have up to 128 of the characters a-z, A-Z, 0-9, "
            ". - and _, no folders, and begin with a letter or digit"
        )
    return name


@dataclass(frozen=True)
class StyleFile:
    """Entry of a file in a manifest."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The content of a `style.json`, checked as far as that is possible without a model."""

    styles: Sequence[Mapping[str, Any]]
    files: Mapping[str, StyleFile]
    loras: Mapping[str, Any] = field(default_factory=dict)  # by file: strength, or [UNet's, text encoders']
    defaults: Mapping[str, Any] = field(default_factory=dict)
    banks: Sequence[tuple[str, int]] = ()  # file, number of the style that it stands in for
    licence: str = ""
    description: str = ""
    created: str = ""

    @classmethod
    def of(cls, content: Any) -> "Manifest":
        """Return the manifest in parsed JSON. Raises StyleError, naming what is wrong."""
        content = values.mapping(MANIFEST, content, error=StyleError)
        if content.get("format") != FORMAT:
            raise StyleError(f"{MANIFEST} has the format {quoted(content.get('format'))}, not {quoted(FORMAT)}")
        for name in content:
            if name not in _FIELDS:
                raise StyleError(f"{MANIFEST} has the unknown field {quoted(name)}{values.did_you_mean(name, _FIELDS)}")
        files = _files(content.get("files", {}))
        styles = values.several("styles", content.get("styles", []), most=MOST_STYLES, error=StyleError)
        styles = [values.mapping(f"style {i}", style, error=StyleError) for i, style in enumerate(styles)]
        loras = values.mapping("loras", content.get("loras", {}), error=StyleError)
        if not styles and not loras:
            raise StyleError(f"{MANIFEST} has neither styles nor loras; give one of them")
        defaults = values.mapping("defaults", content.get("defaults", {}), error=StyleError)
        for name in defaults:
            if name not in DEFAULTS:
                near = values.did_you_mean(name, DEFAULTS)
                raise StyleError(f"defaults has {quoted(name)}; it takes {', '.join(DEFAULTS)}{near}")
        banks = [_bank(one, len(styles)) for one in values.several("banks", content.get("banks", []), error=StyleError)]
        for name in [*loras, *(file for file, _ in banks)]:
            if name not in files:
                raise StyleError(f"{quoted(name)} is not among the files of {MANIFEST}; add it with its digest")
        return cls(
            styles,
            files,
            {name: _strength(name, strength) for name, strength in loras.items()},
            _settings(defaults),
            banks,
            *(_text(name, content.get(name, "")) for name in ("licence", "description", "created")),
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as parsed JSON."""
        return {
            "format": FORMAT,
            "styles": [dict(style) for style in self.styles],
            "loras": dict(self.loras),
            "defaults": dict(self.defaults),
            "banks": [{"file": file, "style": style} for file, style in self.banks],
            "licence": self.licence,
            "description": self.description,
            "created": self.created,
            "files": {name: {"sha256": one.sha256, "bytes": one.bytes} for name, one in self.files.items()},
        }


def _files(given: Any) -> dict[str, StyleFile]:
    given = values.mapping("files", given, error=StyleError)
    if len(given) > MOST_FILES:
        raise StyleError(f"the style has {len(given)} files; at most {MOST_FILES} are allowed")
    found: dict[str, StyleFile] = {}
    for name, entry in given.items():
        if safe_file(name).lower() in {other.lower() for other in found}:
            raise StyleError(f"{quoted(name)} differs from another file's name only by capital letters; rename one")
        entry = values.mapping(f"the file {name}", entry, error=StyleError)
        digest = entry.get("sha256")
        if {*entry} != {"sha256", "bytes"} or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise StyleError(f'the file {name} has {quoted(entry)}; it needs "sha256", 64 digits, and "bytes"')
        found[name] = StyleFile(digest, values.whole_number("bytes", entry["bytes"], 0, 2**48, error=StyleError))
    return found


def _bank(entry: Any, styles: int) -> tuple[str, int]:
    entry = values.mapping("a bank", entry, error=StyleError)
    if {*entry} != {"file", "style"}:
        raise StyleError(f'a bank has {quoted(sorted(entry))}; it needs "file", and "style", a number')
    number = values.whole_number("the style of a bank", entry["style"], 0, styles - 1, error=StyleError)
    return values.text("the file of a bank", entry["file"], error=StyleError), number


def _strength(name: str, given: Any) -> Any:
    pair = given if isinstance(given, list) else [given]
    if len(pair) not in (1, 2):
        raise StyleError(f"the strength of {name} is {quoted(given)}; give a number, or two: [UNet, text encoders]")
    limit = values.MAX_STRENGTH
    checked = [values.real_number(f"the strength of {name}", one, -limit, limit, error=StyleError) for one in pair]
    return checked if isinstance(given, list) else checked[0]


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check what the server itself needs of default settings; the rest is the engine's, with each request."""
    found = dict(given)
    if found.get("size") is not None:
        sides = values.several("the default size", found["size"], least=2, most=2, error=StyleError)
        found["size"] = [values.whole_number("the default size", side, 16, 8192, error=StyleError) for side in sides]
        if any(side % 8 for side in found["size"]):
            raise StyleError(f"the default size is {quoted(sides)}; both sides must be divisible by 8")
    return {name: value for name, value in found.items() if value is not None}


def _text(name: str, given: Any) -> str:
    return values.text(name, given, longest=MOST_TEXT, error=StyleError)


def file_digest(stream: BufferedReader) -> str:
    """Return 64 hex digits of the rest of a file."""
    return hashlib.file_digest(stream, "sha256").hexdigest()


class StyleFolder:
    """A style's folder, opened once: what it reads lies in it, whatever links somebody puts there meanwhile.

    Raises StyleError if the path is a link or no folder, and FileNotFoundError if there is none. Close it, or use it in
    a `with` block.
    """

    def __init__(self, path: Path):
        self.path = path
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StyleError(f"{quoted(path.name)} is no folder ({error.strerror}); links are not followed") from None

    def __enter__(self) -> "StyleFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the folder."""
        os.close(self._descriptor)

    @contextmanager
    def open(self, name: str) -> Iterator[BufferedReader]:
        """Open a file of the folder for reading. Raises StyleError if there is none, or it is a link or a pipe."""
        name = name if name == MANIFEST else safe_file(name)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(name, flags, dir_fd=self._descriptor)
        except FileNotFoundError:
            raise StyleError(f"the style's file {name} is missing; put it back") from None
        except OSError as error:
            raise StyleError(
                f"the style's file {name} can't be read ({error.strerror}); links are not followed"
            ) from None
        with os.fdopen(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise StyleError(f"the style's file {name} is no regular file; links are not followed")
            yield stream

    def manifest(self) -> Manifest:
        """Read `style.json`. Raises StyleError."""
        with self.open(MANIFEST) as stream:
            content = stream.read(MANIFEST_BYTES + 1)
        return Manifest.of(values.load_json(content, MANIFEST, kind=dict, error=StyleError, largest=MANIFEST_BYTES))

    def stamp(self, name: str) -> tuple[int, int, int]:
        """Return what changes when a file does: its number, size and time. Raises StyleError."""
        try:
            found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except OSError as error:
            raise StyleError(f"the style's file {name} can't be read ({error.strerror}); put it back") from None
        if not stat.S_ISREG(found.st_mode):
            raise StyleError(f"the style's file {name} is no regular file; links are not followed")
        return found.st_ino, found.st_size, found.st_mtime_ns

    def check(self, name: str, wanted: StyleFile) -> None:
        """Raise StyleError unless a file is the one that the manifest means."""
        with self.open(name) as stream:
            self._check(name, wanted, os.fstat(stream.fileno()).st_size, file_digest(stream))

    def read(self, name: str, wanted: StyleFile) -> bytes:
        """Return a small file's content, checked. Raises StyleError."""
        with self.open(name) as stream:
            size = os.fstat(stream.fileno()).st_size
            content = stream.read() if size == wanted.bytes else b""
        self._check(name, wanted, size, hashlib.sha256(content).hexdigest())
        return content

    @staticmethod
    def _check(name: str, wanted: StyleFile, size: int, digest: str) -> None:
        if (size, digest) != (wanted.bytes, wanted.sha256):
            raise StyleError(
                f"the style's file {name} was altered: it has {size} bytes and sha256 {digest[:12]}, and {MANIFEST} "
                f"says {wanted.bytes} and {wanted.sha256[:12]}; put the original back"
            )
