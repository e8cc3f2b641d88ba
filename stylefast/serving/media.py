"""Pictures that clients send and get: checked by their content before anything decodes them, and encoded with records.

An upload is PNG, JPEG or WebP, whatever its name and type say. Its size, frames and metadata are read from the file's
own structure, without a decoder, so that a small file that would unpack to gigabytes costs nothing.
"""

import base64
import binascii
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import MAX_TEXT_CHUNK, PngInfo

from stylefast.provenance import MARKED, Provenance
from stylefast.serving.replies import ApiError

MAX_PIXELS = 4096 * 4096
MIN_SIDE = 16
MAX_BYTES = 50 * 2**20  # of one picture
MAX_METADATA = 2 * 2**20  # bytes of text, profiles and thumbnails in an upload
_MOST_PARTS = 100_000  # chunks and segments of a file, each of which takes time to pass over; encoders need fewer
_MOST_SCANS = 100  # of a JPEG: each passes over all its pixels, however short it is
_FILLING = re.compile(rb"\xff+")
_LONGEST_PLAIN = 60_000  # characters of a text in a PNG
_JPEG_SEGMENT = 65_533  # bytes of a comment or of EXIF data
_DESCRIPTION, _EXIF_TAGS, _COMMENT = 0x010E, 0x8769, 0x9286  # tags of EXIF


@dataclass(frozen=True)
class Upload:
    """A picture that a client sent, not yet decoded."""

    content: bytes
    kind: str  # "png", "jpeg" or "webp"
    width: int
    height: int


@dataclass(frozen=True)
class Pixels:
    """8-bit RGB pixels on their way between processes."""

    width: int
    height: int
    content: bytes

    def image(self) -> Image.Image:
        """Return them as a PIL image."""
        return Image.frombytes("RGB", (self.width, self.height), self.content)


def upload(content: bytes, param: str) -> Upload:
    """Check a file that a client sent; `param` names its field. Raises ApiError."""
    if not content:
        raise ApiError(400, f"{param} is empty; send a PNG, JPEG or WebP picture", param=param, code="invalid_image")
    if len(content) > MAX_BYTES:
        raise ApiError(
            413,
            f"{param} has {len(content)} bytes; the limit is {MAX_BYTES}",
            param=param,
            code="image_too_large",
        )
    try:
        kind, width, height = _described(content)
    except _Refused as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="invalid_image") from None
    except (struct.error, IndexError, ValueError):
        raise ApiError(
            400, f"{param}: the file is damaged or truncated; save it again", param=param, code="invalid_image"
        ) from None
    if min(width, height) < MIN_SIDE or width * height > MAX_PIXELS:
        raise ApiError(
            400,
            f"{param} has {width} x {height} pixels; each side needs at least {MIN_SIDE}, and all together at most "
            f"{MAX_PIXELS}",
            param=param,
            code="invalid_image",
        )
    return Upload(content, kind, width, height)


def upload_in_text(text: Any, param: str) -> Upload:
    """Check a picture given as base64, or as a data URL. Raises ApiError."""
    if not isinstance(text, str):
        raise ApiError(400, f"{param} must be a picture in base64", param=param, code="invalid_image")
    if text.startswith("data:"):
        _, _, text = text.partition(",")
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise ApiError(413, f"{param} has more than {MAX_BYTES} bytes", param=param, code="image_too_large")
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param} is not base64", param=param, code="invalid_image") from None
    return upload(content, param)


class _Refused(Exception):
    """A file is of another kind, or has what is not accepted."""


def _described(content: bytes) -> tuple[str, int, int]:
    """Return kind, width and height. Raises _Refused, and struct.error and the like for damaged files."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png", *_png(content)
    if content.startswith(b"\xff\xd8\xff"):
        return "jpeg", *_jpeg(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp", *_webp(content)
    raise _Refused("the file is no PNG, JPEG or WebP picture, whatever its name says")


def _png(content: bytes) -> tuple[int, int]:
    size, metadata = None, 0
    for kind, start, length in _png_chunks(content):
        if size is None:
            if kind != b"IHDR" or length < 13:
                raise _Refused("the file is damaged: a PNG begins with its size")
            size = struct.unpack_from(">II", content, start)
        elif kind == b"acTL":
            raise _Refused("the picture is animated; send a single frame")
        elif kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf"):
            metadata = _counted(metadata + length)
        elif kind == b"IEND":
            return size
    raise _Refused("the file is truncated; send all of it")


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    place = 8
    for _ in range(_MOST_PARTS):
        if place + 8 > len(content):
            return
        length, kind = struct.unpack_from(">I4s", content, place)
        if place + 12 + length > len(content):
            return
        yield kind, place + 8, length
        place += 12 + length
    raise _too_many()


def _jpeg(content: bytes) -> tuple[int, int]:
    if content.count(b"\xff\xda") > _MOST_SCANS:
        raise _Refused(f"the file has more than {_MOST_SCANS} scans; save it again")
    place, metadata, size = 2, 0, None
    for _ in range(_MOST_PARTS):
        filled = _FILLING.match(content, place)
        if not filled:
            raise _Refused("the file is damaged: a JPEG marker is missing")
        metadata = _counted(metadata + len(filled[0]) - 1)
        place = filled.end() - 1
        marker = content[place + 1]
        if marker in (0x01, *range(0xD0, 0xD9)):
            place += 2
            continue
        if marker == 0xDA and size is not None:
            return size
        if marker in (0xD9, 0xDA):
            raise _Refused("the file is damaged: a JPEG has its size before its pixels")
        (length,) = struct.unpack_from(">H", content, place + 2)
        if length < 2:
            raise _Refused("the file is damaged: a JPEG segment has no length")
        if marker in (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF):
            if size is not None:
                raise _Refused("the file is damaged: a JPEG has one size")
            height, width = struct.unpack_from(">HH", content, place + 5)
            size = width, height
        if marker >= 0xE0:
            metadata = _counted(metadata + length)
        place += 2 + length
    raise _too_many()


def _webp(content: bytes) -> tuple[int, int]:
    (whole,) = struct.unpack_from("<I", content, 4)
    if whole + 8 > len(content):
        raise _Refused("the file is truncated; send all of it")
    size, metadata, place, parts = None, 0, 12, 0
    while place + 8 <= min(len(content), whole + 8):
        parts += 1
        if parts > _MOST_PARTS:
            raise _too_many()
        kind, length = struct.unpack_from("<4sI", content, place)
        start = place + 8
        if kind == b"VP8X":
            if content[start] & 0x02:
                raise _Refused("the picture is animated; send a single frame")
            wide, high = content[start + 4 : start + 7], content[start + 7 : start + 10]
            size = 1 + int.from_bytes(wide, "little"), 1 + int.from_bytes(high, "little")
        elif kind == b"VP8 ":
            width, height = struct.unpack_from("<HH", content, start + 6)
            size = size or (width & 0x3FFF, height & 0x3FFF)
        elif kind == b"VP8L":
            (bits,) = struct.unpack_from("<I", content, start + 1)
            size = size or (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
        elif kind in (b"ANIM", b"ANMF"):
            raise _Refused("the picture is animated; send a single frame")
        elif kind in (b"EXIF", b"XMP ", b"ICCP"):
            metadata = _counted(metadata + length)
        place = start + length + length % 2
    if size is None:
        raise _Refused("the file is damaged: a WebP without pixels")
    return size


def _too_many() -> _Refused:
    return _Refused(f"the file has more than {_MOST_PARTS} parts; save it again")


def _counted(size: int) -> int:
    if size > MAX_METADATA:
        raise _Refused(f"the file has more than {MAX_METADATA} bytes of metadata; remove it")
    return size


def encoded(
    image: Image.Image,
    form: str,
    quality: int,
    record: str | None,
    parameters: str | None,
    provenance: Provenance = MARKED,
    short: str | None = None,
    finished: bool = True,
) -> bytes:
    """Return a picture as PNG, JPEG or WebP, marked as generated.

    record: our own, JSON, from which `stylefast generate --from` makes the picture again; parameters: A1111's text.
    finished: whether it is no preview, which is marked but not signed.
    PNG takes both as text chunks, JPEG as comment and EXIF, WebP as description and comment of its EXIF. JPEG has no
    room for more than 64 KB each: it takes the `short` record if the other is longer, and what is still longer is left
    out.
    """
    save = partial(provenance.encode, image, form, sign=finished)
    if form == "png":
        info = PngInfo()
        if record is not None:
            # some readers refuse long plain texts, and ours refuses packed ones that are longer still
            info.add_text("stylefast", record, zip=_LONGEST_PLAIN < len(record) <= MAX_TEXT_CHUNK)
        if parameters is not None:
            info.add_text("parameters", parameters)
        return save(pnginfo=info, compress_level=1)
    if form == "webp":
        return save(quality=quality, exif=_exif(parameters, record))
    options: dict[str, Any] = {}
    if parameters is not None and len(exif := _exif(parameters)) <= _JPEG_SEGMENT:
        options["exif"] = exif
    if record is not None and len(record) > _JPEG_SEGMENT and short is not None:
        record = short
    if record is not None and len(record) <= _JPEG_SEGMENT:
        options["comment"] = record.encode("ascii")
    return save(quality=min(quality, 95), subsampling=0, **options)


def _exif(comment: str | None, description: str | None = None) -> bytes:
    """Return EXIF data with a comment, as A1111 writes it, and a description."""
    exif = Image.Exif()
    if description is not None:
        exif[_DESCRIPTION] = description
    if comment is not None:
        exif.get_ifd(_EXIF_TAGS)[_COMMENT] = b"UNICODE\0" + comment.encode("utf-16-be", "replace")
    return exif.tobytes()
