"""What the server and the engine's process say to each other. All of it is pickled, so both sides are the same code."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stylefast.serving.media import Pixels

# from the server


@dataclass(frozen=True)
class Run:
    """Order to make the pictures of a call.

    call: as in a request file (`stylefast.record.from_record`); a picture that was sent along is {"upload": number}.
    previews: how many previews are wanted. seconds: until the deadline; None: there is none. request: its id, for the
    log.
    """

    ticket: str
    call: Mapping[str, Any]
    uploads: Sequence[bytes] = ()
    previews: int = 0
    seconds: float | None = None
    request: str = ""


@dataclass(frozen=True)
class Cancel:
    """Order to stop a call after its current step."""

    ticket: str


@dataclass(frozen=True)
class LoadStyle:
    """Order to read a registered style, so that it is known to work and stays usable when it is deleted.

    folder: of a style that is not registered yet; it is then only tried. None: the registered one.
    """

    ticket: str
    name: str
    folder: str | None = None


@dataclass(frozen=True)
class BakeStyle:
    """Order to bake a style into the file `path`; settings: as of `Engine.bake`. The answer is what requests need."""

    ticket: str
    name: str
    settings: Mapping[str, Any]
    path: str


@dataclass(frozen=True)
class Stop:
    """Order to end the process once all calls are done."""


# from the engine's process


@dataclass(frozen=True)
class Ready:
    """The model is loaded and warm."""

    facts: Mapping[str, Any]  # see `engine_process.facts_of`


@dataclass(frozen=True)
class NotReady:
    """The model can't be loaded."""

    message: str


@dataclass(frozen=True)
class Progress:
    """Steps done of a call's longest picture, with previews if they are due."""

    ticket: str
    step: int
    steps: int
    previews: Sequence[Pixels] = ()


@dataclass(frozen=True)
class Made:
    """One finished picture: its pixels, our record as JSON, and A1111's text.

    short: the record with digests in place of uploads, for formats without room for them; None if it holds none.
    A picture that a check replaced has neither record nor text.
    """

    pixels: Pixels
    record: str | None
    parameters: str | None
    seed: int
    warnings: Sequence[str] = ()
    short: str | None = None


@dataclass(frozen=True)
class Done:
    """A call's pictures.

    seconds: from its start in the engine. text_tokens: of its prompts, without padding. kinds: of each picture, the
    classes of its styles.
    """

    ticket: str
    pictures: Sequence[Made]
    seconds: float
    text_tokens: int = 0
    kinds: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Answer:
    """Result of a message that makes no pictures."""

    ticket: str
    value: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A call ended with an error, named by its class."""

    ticket: str
    error: str
    message: str


@dataclass(frozen=True)
class Capacity:
    """Number of pictures that may be with the engine now; 0: none, and requests wait."""

    pictures: int


@dataclass(frozen=True)
class Counts:
    """Report on what the engine does, for metrics.

    values: counts since it was loaded, by the names in `metrics.COUNTED`. levels: what it holds now, by those in
    `metrics.LEVELS`. steps: of each call of the UNet since the last report, its seconds and its pictures.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    levels: Mapping[str, float] = field(default_factory=dict)
    steps: Sequence[tuple[float, int]] = ()
