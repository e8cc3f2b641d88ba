"""Folders of captioned pictures, as training reads them: `fish.png` beside `fish.txt`."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import ImageOps

from stylefast import values
from stylefast.errors import ImageError, InvalidRequest, PromptError
from stylefast.models.pictures import SUFFIXES, open_picture

MOST_PICTURES = 100_000
_LONGEST_FILE = 1_000_000  # bytes of a caption's file


@dataclass(frozen=True)
class CaptionedPicture:
    """A picture's file and what it shows."""

    path: Path
    caption: str

    def __post_init__(self):
        object.__setattr__(self, "path", values.path("a training picture", self.path, error=ImageError))
        name = self.path.name[: values.QUOTED]
        object.__setattr__(self, "caption", values.prompt(f"the caption of {name}", self.caption))


def read_folder(folder: str | Path, caption: str | None = None) -> list[CaptionedPicture]:
    """Return the pictures of a folder, by name, each with the caption in the `.txt` file of its name.

    caption: for pictures without such a file; None: they are an error. Sub-folders and hidden files are not read.
    Raises InvalidRequest for a folder that is missing or has no picture or too many, and PromptError for captions that
    are missing, unreadable, or belong to no picture.
    """
    place = values.path("the folder of pictures", folder)
    if not place.is_dir():
        what = "is a file" if place.exists() else "does not exist"
        raise InvalidRequest(f"{values.shown_path(place)} {what}; give a folder of pictures with captions")
    files = sorted(file for file in place.iterdir() if file.is_file() and not file.name.startswith("."))
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not 1 <= len(pictures) <= MOST_PICTURES:
        raise InvalidRequest(
            f"{values.shown_path(place)} has {len(pictures)} pictures; training takes 1 to {MOST_PICTURES} files "
            f"({', '.join(SUFFIXES)}) that lie in the folder itself"
        )
    stems: dict[str, Path] = {}
    for picture in pictures:
        if picture.stem in stems:
            raise InvalidRequest(
                f"{values.quoted(stems[picture.stem].name)} and {values.quoted(picture.name)} would share one caption "
                "file; rename one of them"
            )
        stems[picture.stem] = picture
    lonely = next((file.name for file in files if file.suffix == ".txt" and file.stem not in stems), None)
    if lonely is not None:
        raise PromptError(
            f"the caption {values.quoted(lonely)} belongs to no picture; name it as its picture, or remove it"
        )
    return [CaptionedPicture(picture, _caption(picture, caption)) for picture in pictures]


def _caption(picture: Path, default: str | None) -> str:
    file = picture.with_suffix(".txt")
    shown = values.quoted(file.name)
    try:
        if (size := file.stat().st_size) > _LONGEST_FILE:
            raise PromptError(f"the caption {shown} has {size} bytes; at most {_LONGEST_FILE} are allowed")
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except FileNotFoundError:
        if default is None:
            raise PromptError(
                f"{values.quoted(picture.name)} has no caption; write what it shows to {shown} beside it, or give one "
                "caption for all (--caption)"
            ) from None
        return default
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"the caption {shown} can't be read ({error}); save it as UTF-8 text") from None


def cropped(path: Path, side: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return a picture as floats in -1..1, [3, side, side], and the UNet's six numbers on its size and crop.

    It is scaled to cover the square and cropped in its middle. The numbers are SDXL's (arXiv 2307.01952, section 2.2):
    height and width of the file's picture, top and left of the crop in the scaled one, height and width of the square.
    Raises ImageError.
    """
    picture = open_picture(path)
    width, height = picture.size
    ratio = side / min(width, height)
    left, top = ((max(side, round(length * ratio)) - side) // 2 for length in (width, height))
    square = ImageOps.fit(picture, (side, side))
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(side, side, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1, (height, width, top, left, side, side)
