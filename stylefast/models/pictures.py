"""Opens pictures that people hand in, and refuses what is damaged, disguised or absurd before it is decoded."""

import os
import struct
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from stylefast.errors import ImageError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 4096 * 4096
MIN_SIDE = 16
MAX_ASPECT = 32  # the image encoder scales the short side to its own size; a long thin strip would explode there

PictureSource: TypeAlias = str | os.PathLike | bytes | Image.Image | np.ndarray

# all that Pillow's decoders were seen to raise on damaged files; DecompressionBombWarning only under `-W error`
_DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)


def open_picture(source: PictureSource) -> Image.Image:
    """A picture as 8-bit RGB, upright.

    `source` is a path, the bytes of a file, a PIL image, or an array `[h, w]`, `[h, w, 1]`, `[h, w, 3]` or
    `[h, w, 4]` (uint8, uint16, or floats in [0, 1]). EXIF orientation is applied, transparency is laid over white,
    grey, palette, CMYK and 16-bit pictures are converted.

    Raises ImageError for files that are missing, damaged, truncated, animated or neither PNG, JPEG nor WEBP, and for
    pictures above 16.8 megapixels, with a side below 16 pixels, or more than 32 times as long as wide. The size is
    read from the header, so a small file that would unpack to gigabytes costs nothing.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        name = "the picture"
        _check_size(source, name)
        return _decode(source, name)

    if isinstance(source, (bytes, bytearray, memoryview)):
        name, stream = f"the picture ({len(source)} bytes)", BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        name, stream = _open_path(source)
    else:
        raise ImageError(
            f"a picture is a path, bytes, a PIL image or an array, not {type(source).__name__}; convert it first"
        )
    with stream:
        try:
            image = Image.open(stream, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name} is too large: {error}; the limit is {_megapixels(MAX_PIXELS)}") from error
        except Image.UnidentifiedImageError as error:
            raise ImageError(
                f"{name} is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture, whatever its name says; "
                "save it as PNG and try again"
            ) from error
        except _DECODER_ERRORS as error:
            raise ImageError(f"{name} can't be read: {error}; save it anew as PNG") from error
        _check_size(image, name)
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise ImageError(f"{name} is an animation of {frames} frames; save the one frame that you mean as PNG")
        return _decode(image, name)


def _open_path(source: str | os.PathLike):
    text = os.fspath(source)
    shown = text if len(text) <= 200 else text[:200] + "..."
    if isinstance(text, str) and text.startswith(("http://", "https://", "data:")):
        raise ImageError(f"{shown} is an address, not a file; download the picture and pass its path")
    try:
        return shown, Path(text).open("rb")
    except FileNotFoundError as error:
        raise ImageError(f"there is no picture at {shown}; check the path") from error
    except IsADirectoryError as error:
        raise ImageError(f"{shown} is a folder; pass the path of one picture in it") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{shown} can't be opened: {error}") from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
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


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), name)
    except ImageError:
        raise
    except _DECODER_ERRORS as error:
        raise ImageError(f"{name} is damaged or cut short: {error}; save it anew as PNG") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{name} holds floating point pixels; pass them as an array in [0, 1]")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16 bits at 255 instead of scaling
        pixels = np.asarray(image).astype(np.int64)
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > 65535:
            raise ImageError(f"{name} holds grey values from {low} to {high}; 16-bit pictures hold 0 to 65535")
        return Image.fromarray(_eight_bits(pixels)).convert("RGB")
    if image.mode in ("RGBa", "La"):
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    return ((pixels.astype(np.int64) + 128) // 257).astype(np.uint8)


def _from_array(pixels: np.ndarray) -> Image.Image:
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(
            f"an array of shape {list(pixels.shape)} is no picture; the shape is [height, width] or "
            "[height, width, channels] with 1, 3 or 4 channels"
        )
    if np.issubdtype(pixels.dtype, np.floating):
        # written so that NaN fails it too
        if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ImageError(
                f"an array of floats holds values from {pixels.min():g} to {pixels.max():g}; a picture's are in "
                "[0, 1]; divide by its maximum or pass uint8"
            )
        pixels = np.rint(pixels.astype(np.float32) * 255).astype(np.uint8)
    elif pixels.dtype == np.uint16:
        pixels = _eight_bits(pixels)
    elif pixels.dtype != np.uint8:
        raise ImageError(f"an array of {pixels.dtype} is no picture; pass uint8, uint16 or floats in [0, 1]")
    if pixels.shape[0] * pixels.shape[1] == 0:
        raise ImageError(f"an array of shape {list(pixels.shape)} holds no pixels")
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels))
    _check_size(image, "the array")
    return _to_rgb(image, "the array")
