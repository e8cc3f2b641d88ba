"""Vocabulary of a small model whose text encoders were trained on a fixed list of words."""

from pathlib import Path

from stylefast import values
from stylefast.errors import ModelFormatError

FILE = "known_words.json"


def known_words(folder: Path) -> tuple[str, ...] | None:
    """Read the words in a model folder's `known_words.json`, in lower case; return None without such a file.

    Raises ModelFormatError if the file is not a list of words.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    what = f"{FILE} in {folder.name}"
    words = values.read_json(file, what, kind=list, error=ModelFormatError)
    return tuple(values.text(f"a word of {what}", word, empty=False, error=ModelFormatError).lower() for word in words)
