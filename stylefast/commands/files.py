"""Output files: numbered names, written whole or not at all, with records in PNG text chunks or JPEG comments."""

import errno
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import MAX_TEXT_CHUNK, PngInfo

from stylefast.commands.folder_lock import LOCK, PICTURES, only_writer, remove_parts
from stylefast.commands.notices import warn
from stylefast.errors import ImageError, InvalidRequest, StyleFastError
from stylefast.provenance import MARKED, Provenance
from stylefast.values import free_bytes, load_json, quoted, typed_path
from stylefast.whole_files import write_whole

CHUNK, PARAMETERS = "stylefast", "parameters"
# longer chunks are compressed; some readers refuse long plain ones
PLAIN_LIMIT = 60_000
_PNG_LIMIT = 60_000_000  # bytes; Pillow reads 64 MiB of text in all, and 1 MiB of a compressed one
_DESCRIPTION = 0x010E  # EXIF's ImageDescription
_JPEG, _JPEG_LIMIT = PICTURES[1:], 65_000
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEAST = 1024  # bytes; a picture with its record always takes more
_NUMBER = re.compile(r"(\d{4,})-.*\.png")


class Destination:
    """The output files of one call.

    `out` ending in ".png" or ".jpg" is a file (with a number after the stem for several prompts), anything else a
    folder of files `0001-a-fish.png`. Without `overwrite`, numbering continues after the files in the folder, and an
    existing file is refused. Unwritable targets are refused here, before any work is done; names are taken when the
    pictures are written, so that several calls may write to one folder at once. `parameters`: write A1111's text beside
    the record; `provenance`: how pictures are marked. Raises InvalidRequest, and StyleFastError for a full disk.
    """

    def __init__(
        self,
        out: str | Path,
        prompts: Sequence[str],
        overwrite: bool = False,
        parameters: bool = True,
        provenance: Provenance = MARKED,
    ):
        out, self.overwrite = typed_path("--out", os.fspath(out)), overwrite
        self._parameters, self._provenance = parameters, provenance
        self._slugs = [slug(prompt) for prompt in prompts]
        if out.suffix.lower() in (".webp", ".avif"):
            raise InvalidRequest(f"--out is {out}; pictures are written as PNG or JPEG, which store their settings")
        self._file = out if out.suffix.lower() in PICTURES else None
        self.folder = out if self._file is None else out.parent
        self._check()

    def write(
        self, images: Sequence[Image.Image], metadata: Sequence[dict], sheet: Image.Image | None = None
    ) -> tuple[list[Path], StyleFastError | None]:
        """Write the pictures, then the sheet; return the paths written, and the error if something went wrong.

        Files are written whole or not at all. Pictures already written are kept if later ones fail, and pictures that
        don't fit into the folder go to the system's folder for temporary files.
        """
        options = {} if self._parameters else {"parameters": False}
        if self._file is not None and self._file.suffix.lower() in _JPEG:
            wanted = [self._jpeg(image, jpeg_info(one, **options)) for image, one in zip(images, metadata, strict=True)]
            wanted += [] if sheet is None else [self._jpeg(sheet, {})]
        else:
            wanted = [self._png(image, png_info(one, **options)) for image, one in zip(images, metadata, strict=True)]
            wanted += [] if sheet is None else [self._png(sheet, None)]
        written: list[Path] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with only_writer(self.folder, self.folder / LOCK) as alone:
                if alone:
                    remove_parts(self.folder)
                return written, self._write(wanted, written)
        except OSError as error:
            return written, self._rescue(wanted[len(written) :], written, error)

    def _png(self, image: Image.Image, info: PngInfo | None) -> bytes:
        return self._provenance.encode(image, "png", pnginfo=info)

    def _jpeg(self, image: Image.Image, options: Mapping[str, Any]) -> bytes:
        return self._provenance.encode(image.convert("RGB"), "jpeg", quality=95, subsampling=0, **options)

    def _write(self, wanted: Sequence[bytes], written: list[Path]) -> StyleFastError | None:
        number = first = 1 if self.overwrite else _highest_number(self.folder) + 1
        problem = None
        for place, content in enumerate(wanted):
            is_sheet = place == len(self._slugs)
            path = self._path(place, number, first, is_sheet)
            while True:
                try:
                    write_whole(path, content, overwrite=self.overwrite)
                    break
                except FileExistsError:
                    # made by a program that does not hold the lock
                    if self._file is None and not is_sheet:
                        number = _highest_number(self.folder) + 1
                        path = self._path(place, number, first, is_sheet)
                        continue
                    taken, path = path, _free_name(path)
                    problem = StyleFastError(
                        f"{taken} was created by another program in the meantime and is not replaced; the picture "
                        f"is in {path}"
                    )
            first = number if place == 0 else first
            number += 1
            written.append(path)
        return problem

    def _path(self, place: int, number: int, first: int, is_sheet: bool) -> Path:
        if self._file is None:
            return self.folder / (f"{first:04d}-grid.png" if is_sheet else f"{number:04d}-{self._slugs[place]}.png")
        if is_sheet:
            return self._file.with_name(f"{self._file.stem}-grid{self._file.suffix}")
        if len(self._slugs) == 1:
            return self._file
        return self._file.with_name(f"{self._file.stem}-{place + 1}{self._file.suffix}")

    def _rescue(self, left: Sequence[bytes], written: list[Path], error: OSError) -> StyleFastError:
        """Save the pictures that could not be written in a temporary folder; return the error to report."""
        full = error.errno in _NO_ROOM
        message = f"can't write to {self.folder} ({'the disk is full' if full else error.strerror or error})"
        if written:
            message += f"; {len(written)} of {len(written) + len(left)} files were written there and are kept"
        shelter = None
        try:
            shelter = Path(tempfile.mkdtemp(prefix="stylefast-"))
            for number, content in enumerate(left, len(written) + 1):
                path = shelter / f"{number:04d}{self._file.suffix if self._file is not None else '.png'}"
                write_whole(path, content, overwrite=False)
                written.append(path)
            message += f"; {'the others' if len(written) > len(left) else 'the pictures'} are in {shelter}"
        except OSError:
            # no room there either; keep what was written
            if shelter is not None and not any(shelter.iterdir()):
                shelter.rmdir()
            message += ", and the folder for temporary files has no room for the others"
        if full:
            return StyleFastError(f"{message}; free some space, or choose another --out")
        return InvalidRequest(f"{message}; choose another --out")

    def _check(self) -> None:
        holder = next((parent for parent in (self.folder, *self.folder.parents) if parent.exists()), Path())
        if not holder.is_dir():
            raise InvalidRequest(f"{holder} is a file, so no folder of that name can be created; choose another --out")
        if not os.access(holder, os.W_OK):
            raise InvalidRequest(f"{holder} can't be written to; choose another --out")
        free = free_bytes(holder)
        if free is None:
            # free space unknown: test by creating a file
            try:
                with tempfile.TemporaryFile(dir=holder):
                    pass
            except OSError as error:
                raise InvalidRequest(
                    f"{holder} does not accept files ({error.strerror}); choose another --out"
                ) from error
        elif free < _LEAST * len(self._slugs):
            raise StyleFastError(f"the disk of {holder} is full; free some space, or choose another --out")
        if self._file is None:
            return
        for place in range(len(self._slugs)):
            path = self._path(place, 1, 1, is_sheet=False)
            if path.is_dir():
                raise InvalidRequest(f"{path} is a folder; choose another --out")
            if path.exists() and not self.overwrite:
                raise InvalidRequest(f"{path} exists; pass --overwrite to replace it, or choose another --out")


def jpeg_info(metadata: dict, parameters: bool = True) -> dict[str, bytes]:
    """Return Pillow's options for a JPEG with the record as its comment, and A1111's text in its EXIF data.

    JPEG limits both to 64 KB; what is longer is left out, with a warning on stderr.
    """
    from stylefast.infotext import exif_of, write

    record = json.dumps(metadata, separators=(",", ":")).encode("ascii")
    if len(record) > _JPEG_LIMIT:
        warn(f"the record has {len(record)} bytes, JPEG's comments at most {_JPEG_LIMIT}, so it is left out; use PNG")
    found = {"comment": record} if len(record) <= _JPEG_LIMIT else {}
    if parameters:
        found["exif"] = exif_of(write(metadata))
        if len(found["exif"]) > _JPEG_LIMIT:
            warn(f"the parameters text is longer than JPEG's {_JPEG_LIMIT} bytes, so it is left out; use PNG")
            del found["exif"]
    return found


def png_info(metadata: dict, parameters: bool = True) -> PngInfo:
    """Return text chunks "stylefast" (the record as JSON) and "parameters" (the text that A1111 and others read).

    A record beyond what Pillow reads back is left out, with a warning on stderr.
    """
    from stylefast.infotext import write

    info = PngInfo()
    text = json.dumps(metadata, separators=(",", ":"))
    if len(text) > _PNG_LIMIT:
        warn(f"the record has {len(text)} bytes, of which programs read at most {_PNG_LIMIT}, so it is left out")
    else:
        info.add_text(CHUNK, text, zip=PLAIN_LIMIT < len(text) <= MAX_TEXT_CHUNK)
    if parameters:
        info.add_text(PARAMETERS, write(metadata))
    return info


def foreign_parameters(path: str | Path) -> str | None:
    """Return A1111's parameters text of a picture without our record, None for all others.

    Raises ImageError for a file that can't be opened, InvalidRequest for damaged EXIF data.
    """
    from stylefast.infotext import text_of
    from stylefast.models.pictures import open_file, readable_formats

    stream = open_file(typed_path("--from", os.fspath(path)))
    try:
        with stream, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of Pillow, on entries of EXIF that it skips
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(stream, formats=readable_formats()) as picture:
                if picture.format == "PNG":
                    picture.load()  # text may follow the pixels
                return None if _record(picture) is not None else text_of(picture)
    except InvalidRequest:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None  # `read_metadata` says why


def read_metadata(path: str | Path) -> tuple[dict, Image.Image]:
    """Return the record inside a picture, and its pixels. Raises ImageError; InvalidRequest if it has no record."""
    from stylefast.models.pictures import open_file

    path = typed_path("--from", os.fspath(path))
    stream = open_file(path)
    try:
        with stream, warnings.catch_warnings():
            # a picture that decompresses to gigabytes was not written by stylefast
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(stream, formats=["PNG", "JPEG", "WEBP"]) as picture:
                picture.load()
                text = _record(picture)
                pixels = picture.convert("RGB")
                pixels.info["lossy"] = picture.format != "PNG"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{path} can't be read as PNG, JPEG or WebP ({error}); settings survive only in the file as made"
        ) from error
    if text is None:
        raise InvalidRequest(
            f"{path} has no settings; only pictures written by `stylefast generate` (grids aside), A1111 and its "
            "relatives have them, and other programs remove them when saving"
        )
    try:
        metadata = load_json(text, "their text", kind=dict)
        place, call, fingerprint = metadata["index"], metadata["call"], metadata["fingerprint"]
        whole = isinstance(fingerprint, str) and isinstance(place, int) and 0 <= place < len(call["requests"])
    except (InvalidRequest, KeyError, TypeError) as error:
        raise InvalidRequest(f"the settings in {path} are damaged ({error}); use an unedited copy") from error
    if not whole:
        raise InvalidRequest(f"the settings in {path} are damaged (index {quoted(place)}); use an unedited copy")
    return metadata, pixels


def _record(picture: Image.Image) -> str | None:
    """Return our record's text in an opened picture: PNG's chunk, JPEG's comment or WebP's description.

    The last two only if they begin as the record does.
    """
    if picture.format == "PNG":
        return picture.info.get(CHUNK)
    if picture.format == "WEBP":
        found = picture.getexif().get(_DESCRIPTION)
        return found if isinstance(found, str) and found.startswith(f'{{"{CHUNK}":') else None
    comment = picture.info.get("comment")
    if isinstance(comment, bytes) and comment.startswith(f'{{"{CHUNK}":'.encode()):
        return comment.decode("utf-8", "replace")
    return None


def _highest_number(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return max((int(match[1]) for file in folder.iterdir() if (match := _NUMBER.fullmatch(file.name))), default=0)


def _free_name(path: Path) -> Path:
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return next(free for free in numbered if not free.exists())


def slug(prompt: str) -> str:
    """Return a prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"
