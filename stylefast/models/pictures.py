"""Opening of untrusted pictures; damaged, disguised or absurdly sized ones are rejected before decoding if possible."""

import logging
import os
import stat
from collections.abc import Sequence
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, features

from stylefast import values
from stylefast.errors import ImageError

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # AVIF only if Pillow was built with it
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
MAX_PIXELS = 4096 * 4096
MIN_SIDE = 16
MAX_ASPECT = 32  # the image encoder scales the short side to its own size; a long thin strip would become huge
WHITE, BLACK = (255, 255, 255, 255), (0, 0, 0, 255)

PictureSource: TypeAlias = str | os.PathLike | bytes | Image.Image | np.ndarray
_KINDS = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray)
_MOST_SOURCES = 256
# (offset, magic bytes, name) of common formats that Pillow does not read
_FOREIGN = (
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "SVG or XML"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
)


def open_picture(source: PictureSource, ground: tuple[int, int, int, int] = WHITE) -> Image.Image:
    """Open a picture as upright 8-bit RGB.

    `source` is a path, the bytes of a file, a PIL image, or an array `[h, w]`, `[h, w, 1]`, `[h, w, 3]` or
    `[h, w, 4]` (uint8, uint16, bool, or floats in [0, 1]). EXIF orientation is applied, transparency is composited over
    `ground`, grey, palette, CMYK, 16-bit and floating point pictures are converted. For animations and multi-page files
    the first frame is used, with a logged warning; for phone JPEGs with several pictures, the photo.

    Raises ImageError for files that are missing, damaged, truncated, not regular files or not in FORMATS, and for
    pictures above 16.8 megapixels, with a side below 16 pixels, or more than 32 times as long as wide. The size is
    read from the header, so that a small file that would unpack to gigabytes is rejected cheaply.
    """
    _check_array("the picture", source)
    if isinstance(source, np.ndarray):
        return _from_array(source, ground)
    if isinstance(source, Image.Image):
        return _decode(source, "the picture", ground)
    if isinstance(source, (bytes, bytearray, memoryview)):
        try:
            content = bytes(source)  # a caller's view may have any stride, or be released
        except ValueError as error:
            raise ImageError(f"the picture's memoryview can't be read: {error}") from error
        name, stream = f"the picture ({len(content)} bytes)", BytesIO(content)
    elif isinstance(source, (str, os.PathLike)):
        name, stream = _open_path(source)
    else:
        raise ImageError(
            f"a picture must be a path, bytes, a PIL image or an array, not {type(source).__name__}; convert it first"
        )
    with stream:
        image = _identified(stream, name)
        _check_size(image.size, name)
        return _decode(image, name, ground, from_file=True)


def check_sources(name: str, given: Any, more: tuple[type, ...] = ()) -> Any:
    """Check only the types of a picture source or a list of them, and return it, a list as a tuple.

    more: further allowed types. Raises ImageError for other types and for an empty list.
    """
    several = values.entries(given)
    if several is None:
        return check_source(name, given, more)
    if not several:
        raise ImageError(f"{name} is an empty list; give at least one picture")
    if len(several) > _MOST_SOURCES:
        raise ImageError(f"{name} has {len(several)} pictures; at most {_MOST_SOURCES} are allowed")
    return tuple(check_source(f"{name}[{i}]", one, more) for i, one in enumerate(several))


def check_source(name: str, given: Any, more: tuple[type, ...] = ()) -> Any:
    """Check only the type of a picture source, and return it; more: further allowed types. Raises ImageError."""
    if not isinstance(given, (*_KINDS, *more)):
        raise ImageError(
            f"{name} is {values.quoted(given)} ({type(given).__name__}); it must be a path, bytes, a PIL image or "
            "an array"
        )
    if isinstance(given, (str, os.PathLike)):
        values.path(name, given, error=ImageError)
    elif isinstance(given, torch.Tensor):
        values.dense_tensor(name, given, error=ImageError)
    _check_array(name, given)
    return given


def _check_array(name: str, given: Any) -> None:
    if isinstance(given, np.ndarray) and np.ma.is_masked(given):
        raise ImageError(f"{name} is a masked array, but pictures have no mask; fill it first: .filled(255)")


@lru_cache(maxsize=256)
def say_once(message: str) -> None:
    """Log a warning unless it was logged recently, since one call opens its pictures several times."""
    logger.warning(message)


@cache
def readable_formats() -> tuple[str, ...]:
    """Return the FORMATS that the installed Pillow reads, and HEIF if a plugin for it is registered."""
    Image.init()
    known = tuple(form for form in FORMATS if form in Image.OPEN and (form != "AVIF" or features.check("avif")))
    return known + (("HEIF",) if "HEIF" in Image.OPEN else ())


def _open_path(source: str | os.PathLike) -> tuple[str, BinaryIO]:
    text = str.__str__(source) if isinstance(source, str) else ""
    if text.startswith(("http://", "https://", "data:")):
        raise ImageError(f"{values.quoted(text)} is an address, not a file; download the picture and pass its path")
    path = values.path("the picture's path", source, error=ImageError)
    return values.shown_path(path), open_file(path)


def open_file(path: Path) -> BinaryIO:
    """Open a picture file. Raises ImageError if it is missing, unreadable, a folder, a pipe or a device."""
    shown = values.shown_path(path)
    try:
        # O_NONBLOCK, since opening a pipe without a writer would block
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ImageError(f"no picture found at {shown}; check the path") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{shown} can't be opened: {error}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device, not a file"
        raise ImageError(f"{shown} is {what}; pass the path of one picture")
    return os.fdopen(descriptor, "rb")


def _identified(stream: BinaryIO, name: str) -> Image.Image:
    """Return the picture in a stream after reading only its header. Raises ImageError.

    `Image.open` would do the same, but warn on the terminal about sizes that are rejected here anyway.
    """
    try:
        start, damaged = stream.read(16), None
    except OSError as error:
        raise ImageError(f"{name} can't be read: {error.strerror or error}") from error
    for form in readable_formats():
        factory, accepts = Image.OPEN[form]
        answer = accepts is None or accepts(start)
        # plugins return a string for files of their format that they can't read
        if not answer or isinstance(answer, str):
            continue
        stream.seek(0)
        try:
            return factory(stream, "")
        except SyntaxError as error:  # raised by Pillow for other formats and for damaged headers
            damaged = error
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise arbitrary errors for damaged headers
            raise ImageError(f"{name} can't be read: {error}; save it again as PNG") from error
    foreign = next((kind for place, mark, kind in _FOREIGN if start[place:].startswith(mark)), None)
    if damaged is not None and foreign is None:
        raise ImageError(f"{name} is damaged or truncated: {damaged}; save it again as PNG") from damaged
    what = f"a {foreign} file" if foreign else "another kind of file, whatever its name says"
    raise ImageError(
        f"{name} is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture that can be read, but {what}; save it as "
        "PNG or JPEG and try again"
    )


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {width} x {height} pixels ({_megapixels(width * height)}); the limit is "
            f"{_megapixels(MAX_PIXELS)}; scale it down"
        )
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name} has {width} x {height} pixels; each side needs at least {MIN_SIDE}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{name} has {width} x {height} pixels; the limit is {MAX_ASPECT} : 1; crop it")


def _megapixels(pixels: int) -> str:
    return f"{pixels / 1e6:.1f} megapixels"


def _decode(image: Image.Image, name: str, ground: tuple[int, ...], from_file: bool = False) -> Image.Image:
    try:
        _check_size(image.size, name)
        if from_file and image.format != "MPO" and getattr(image, "is_animated", False):
            what = "pages" if image.format == "TIFF" else "frames"
            say_once(f"{name} has several {what}; the first one is used")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), name, ground)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise arbitrary errors for damaged pixels
        raise ImageError(f"{name} is damaged or truncated: {error}; save it again as PNG") from error


def _to_rgb(image: Image.Image, name: str, ground: tuple[int, ...]) -> Image.Image:
    if image.mode == "F":
        return _from_array(np.asarray(image), ground, f"{name}, which holds floating point pixels,")
    clear = image.info.get("transparency")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16 bits at 255 instead of scaling
        pixels = np.asarray(image).astype(np.int64)
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > 65535:
            raise ImageError(f"{name} holds grey values from {low} to {high}; 16-bit pictures must have 0 to 65535")
        grey = _eight_bits(pixels)
        if isinstance(clear, int):
            grey = np.where(pixels == clear, np.uint8(ground[0]), grey)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBa", "La"):
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if image.mode in ("RGBA", "LA", "PA") or clear is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    return ((pixels.astype(np.int64) + 128) // 257).astype(np.uint8)


def _from_array(pixels: np.ndarray, ground: tuple[int, ...], name: str = "the array") -> Image.Image:
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(
            f"an array of shape {_shape(pixels.shape)} is not a picture; the shape must be [height, width] or "
            "[height, width, channels] with 1, 3 or 4 channels"
        )
    if pixels.size == 0:
        raise ImageError(f"an array of shape {_shape(pixels.shape)} has no pixels")
    # checked before any copy is made: a broadcast array takes no memory, but its copy may be huge
    _check_size((pixels.shape[1], pixels.shape[0]), name)
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = float(pixels.min()), float(pixels.max())
        # phrased so that NaN fails too
        if not (low >= 0 and high <= 1):
            raise ImageError(
                f"{name} has values from {low:g} to {high:g}, but a picture needs [0, 1]; divide by its maximum or "
                "pass uint8"
            )
        pixels = np.rint(pixels.astype(np.float32) * 255).astype(np.uint8)
    elif pixels.dtype.newbyteorder("=") == np.uint16:
        pixels = _eight_bits(pixels)
    elif pixels.dtype == np.bool_:
        pixels = pixels * np.uint8(255)
    elif pixels.dtype != np.uint8:
        raise ImageError(
            f"an array of {values.quoted(pixels.dtype)} is not a picture; pass uint8, uint16 or floats in [0, 1]"
        )
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels))
    return _to_rgb(image, name, ground)


def _shape(shape: Sequence[int]) -> str:
    return values.quoted(list(shape))
