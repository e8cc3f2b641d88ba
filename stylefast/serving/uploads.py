"""Pictures sent along with a call, in the engine's process: as the engine will use them, and as records hold them.

A reference is scaled before anything else is made of it. Done here, the record holds the few pixels that count, without
loss, and the engine's own scaling leaves them as they are, so the record gives the same picture as the upload.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from stylefast.errors import ImageError
from stylefast.models.image_encoder import CROPS
from stylefast.models.masks import open_mask
from stylefast.models.pictures import MIN_SIDE, open_picture
from stylefast.record_values import ORIGIN, Origin, pixel_digest
from stylefast.values import whole_number

if TYPE_CHECKING:
    from stylefast.engine import Engine

RECORD_LIMIT = 1_000_000  # base64 characters of all uploads in one record
_UPLOAD = "upload"


class Uploads:
    """The uploads of one call."""

    def __init__(self, contents: Sequence[bytes], requests: Sequence[Mapping[str, Any]], engine: "Engine"):
        self._contents, self._engine = contents, engine
        self._room = RECORD_LIMIT
        sizes = {tuple(request.get("window") or request.get("size") or engine.native_size) for request in requests}
        self._size = sizes.pop() if len(sizes) == 1 else None
        self._uses: dict[Any, list[Any]] = {}
        for request in requests:
            for number in _numbers(request.get("image")):
                # with a mask, both are scaled alike, so the picture stays whole
                fits = self._size is not None and request.get("mask") is None and request.get("upscale", 1) == 1
                self._uses.setdefault(number, []).append(("latents", self._size) if fits else None)
            for control in request.get("control") or ():
                fits = self._size is not None and request.get("upscale", 1) == 1
                for number in (n for name in ("image", "reference") for n in _numbers(control.get(name))):
                    self._uses.setdefault(number, []).append(("latents", self._size) if fits else None)
            for style in request.get("style") or ():
                for number, use in self._uses_in(style):
                    self._uses.setdefault(number, []).append(use)
        self._opened: dict[int, Image.Image] = {}
        self._digests: dict[str, dict[str, Any]] = {}  # by the digest of what a record holds: what names it alone

    def picture(self, entry: Mapping[str, Any], mask: bool = False) -> Any:
        """Return the picture or mask of {"upload": number}. Raises ImageError."""
        number = whole_number(_UPLOAD, entry[_UPLOAD], 0, error=ImageError)
        if number >= len(self._contents):
            raise ImageError(f"upload is {number}, and {len(self._contents)} pictures were sent along")
        if mask:
            return open_mask(self._contents[number])
        if number not in self._opened:
            self._opened[number] = self._open(number)
        return self._opened[number]

    def short(self, record: Mapping[str, Any]) -> str | None:
        """Return a record as JSON with digests in place of uploads; None if it holds none."""
        if not self._digests:
            return None
        return json.dumps(self._without(record), separators=(",", ":"))

    def _without(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            if "png" in value and value.get("sha256") in self._digests:
                return self._digests[value["sha256"]]
            return {name: self._without(one) for name, one in value.items()}
        return [self._without(one) for one in value] if isinstance(value, list) else value

    def _open(self, number: int) -> Image.Image:
        original = open_picture(self._contents[number])
        named = {
            "in_memory": f"an upload of {original.width}x{original.height} pixels",
            "sha256": pixel_digest(original),
        }
        found = self._scaled(original, self._uses.get(number, ()))
        text = "" if found.width * found.height > RECORD_LIMIT else _png(found)
        if not text or len(text) > self._room:
            # its file, given to `--from`, is the whole picture, so the engine gets that as well
            original.info[ORIGIN] = Origin(named)
            return original
        self._room -= len(text)
        entry = {"png": text, "sha256": pixel_digest(found)}
        self._digests[entry["sha256"]] = named
        found.info[ORIGIN] = Origin(entry)
        return found

    def _scaled(self, picture: Image.Image, uses: Sequence[Any]) -> Image.Image:
        """Return a picture as all its uses have it after scaling; as it is if they differ, or scaling enlarges it."""
        if not uses or None in uses or any(use != uses[0] for use in uses):
            return picture
        kind, how = uses[0]
        found = ImageOps.fit(picture, how) if kind == "latents" else kind.scaled(picture, how)
        smaller = found.width * found.height < picture.width * picture.height
        return found if smaller and min(found.size) >= MIN_SIDE else picture

    def _uses_in(self, style: Any) -> Iterator[tuple[Any, Any]]:
        """Yield the number of every upload in a style as a request writes it, and how it is scaled; None: unknown."""
        if not isinstance(style, Mapping):
            return
        known: Any = None
        if style.get("kind") == "StyleAligned" and self._size is not None:
            known = "reference", ("latents", self._size)
        elif style.get("kind") == "InstantStyle" and (encoder := self._encoder(style.get("adapter"))) is not None:
            crop = style.get("crop", "center")
            known = ("image", (encoder, crop)) if crop in CROPS else None
        for name, value in style.items():
            for number in _numbers(value):
                yield number, known[1] if known is not None and name == known[0] else None

    def _encoder(self, adapter: Any) -> Any:
        found = self._engine.adapters.get(adapter) if isinstance(adapter, str) else None
        if found is None and adapter is None and len(self._engine.adapters) == 1:
            (found,) = self._engine.adapters.values()
        return None if found is None else found[1]


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        if isinstance(value.get(_UPLOAD), int):
            yield value[_UPLOAD]
        for one in value.values():
            yield from _numbers(one)
    elif isinstance(value, list):
        for one in value:
            yield from _numbers(one)


def _png(picture: Image.Image) -> str:
    stream = BytesIO()
    # not `optimize`, which takes seconds for a megapixel
    picture.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")
