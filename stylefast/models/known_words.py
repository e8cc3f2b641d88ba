"""The vocabulary of a small model, whose text encoders were trained on a list of words and on nothing else."""

from pathlib import Path

from stylefast import values
from stylefast.errors import ModelFormatError

FILE = "known_words.json"


def known_words(folder: Path) -> tuple[str, ...] | None:
    """Read the words that a model folder's `known_words.json` lists, in lower case; None where there is no such file.

    Raises ModelFormatError for a file that is no list of words.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    what = f"{FILE} in {folder.name}"
    words = values.read_json(file, what, kind=list, error=ModelFormatError)
    return tuple(values.text(f"a word of {what}", word, empty=False, error=ModelFormatError).lower() for word in words)
