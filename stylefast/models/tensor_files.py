"""Shared tensor files: LoRAs, image adapters, learned vectors, image embeddings.

File types are recognised by the first bytes, since endings are often wrong. Pickles are loaded with `weights_only`, so
that code in them never runs.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stylefast import values
from stylefast.errors import ModelFormatError
from stylefast.models.stored_tensors import StoredTensors

PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".ipadpt")


class Entry(NamedTuple):
    """One tensor of a file: its shape, known without reading it, and a function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def is_pickle(path: Path) -> bool:
    """Return whether the file was written by PyTorch: a zip archive, or a bare pickle of old versions.

    Raises ModelFormatError for a file that can't be read.
    """
    start = first_bytes(path)
    return not _is_safetensors(start) and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80")


def first_bytes(path: Path) -> bytes:
    """Read the first 16 bytes of a file, which show its type. Raises ModelFormatError if it can't be read."""
    values.no_device("the file", path, error=ModelFormatError)
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise ModelFormatError(f"can't read {path.name}: {error.strerror or error}") from error


def load_pickle(path: Path) -> Any:
    """Load a PyTorch file that holds only tensors and plain values.

    Raises ModelFormatError for damaged files and for files that would run code.
    """
    try:
        with warnings.catch_warnings(), path.open("rb") as source:
            # torch warns about deprecated storage classes in the file, which users can't change
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True)
    # torch raises many error types for bad archives, truncated pickles and forbidden code
    except Exception as error:
        raise ModelFormatError(
            f"{path.name} can't be read as plain tensors ({_first_line(error)}); it is damaged, or a pickle that "
            "contains code, which stylefast does not run: get the .safetensors edition"
        ) from error


def open_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Open a safetensors file; returns its tensors by name, not read yet, and its free-form metadata.

    Raises ModelFormatError, naming the actual format, for other files.
    """
    stored = StoredTensors(path, any_ending=path.suffix in PICKLE_ENDINGS)
    entries = {name: Entry(stored.shape(name), lambda name=name: stored.read(name)) for name in stored}
    return entries, dict(stored.header.metadata)


def open_tensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Open a safetensors or pickle file; returns its tensors by (flat) name, and its metadata.

    Raises ModelFormatError for anything else.
    """
    if not is_pickle(path):
        return open_safetensors(path)
    return flat_entries(load_pickle(path), path.name, stored=True), {}


def flat_entries(content: Any, name: str, stored: bool = False) -> dict[str, Entry]:
    """Flatten a pickled dictionary: {"image_proj": {"norm": ..}} becomes the key "image_proj.norm".

    A `state_dict` wrapper, as written by training programs, is removed. `name` is the file's name in messages. `stored`
    content must not have meta tensors, which models in memory may have. Raises ModelFormatError for anything but a
    dictionary of dense tensors.
    """
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ModelFormatError(f"{name} holds a {type(content).__name__}, not a dictionary of tensors")
    flat: dict[str, Any] = {}
    for key, value in content.items():
        inner = value.items() if isinstance(value, Mapping) else ((None, value),)
        flat |= {str(key) if place is None else f"{key}.{place}": tensor for place, tensor in inner}
    for key, value in flat.items():
        values.text(f"the name of a tensor in {name}", key, error=ModelFormatError)
        if not isinstance(value, torch.Tensor):
            raise ModelFormatError(
                f"{name} holds a {type(value).__name__} under {values.quoted(key[:200])}, not a tensor"
            )
        if stored or not value.is_meta:
            values.dense_tensor(f"{key[:200]} of {name}", value, error=ModelFormatError)
    return {key: Entry(tuple(value.shape), lambda value=value: value.detach().clone()) for key, value in flat.items()}


def _is_safetensors(start: bytes) -> bool:
    # eight bytes of length, then JSON; the ninth byte is never "{" in zip archives (version flags) and pickles
    return start[8:9] == b"{"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
