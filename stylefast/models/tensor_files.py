"""Files of tensors that people pass around: LoRAs, image adapters, learned vectors, image embeddings.

What a file is stands in its first bytes; endings are often wrong. Pickles are read as tensors alone (`weights_only`),
so that code in them never runs.
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
    """One tensor of a file: its shape, known before anything is read, and a way to read it."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def is_pickle(path: Path) -> bool:
    """Tell whether the file is PyTorch's: a zip archive, or the bare pickle of an old version.

    Raises ModelFormatError for a file that can't be read.
    """
    start = first_bytes(path)
    return not _is_safetensors(start) and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80")


def first_bytes(path: Path) -> bytes:
    """Read the beginning of a file, by which its kind is known. Raises ModelFormatError for one that can't be read."""
    values.no_device("the file", path, error=ModelFormatError)
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise ModelFormatError(f"can't read {path.name}: {error.strerror or error}") from error


def load_pickle(path: Path) -> Any:
    """Load what PyTorch wrote, as far as it is tensors and plain values.

    Raises ModelFormatError for damaged files and for those that would run code.
    """
    try:
        with warnings.catch_warnings(), path.open("rb") as source:
            # torch warns of its own deprecated storage classes, which the file has and the user can't change
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True)
    # torch reports bad archives, cut pickles and forbidden code by many types of error
    except Exception as error:
        raise ModelFormatError(
            f"{path.name} can't be read as tensors alone ({_first_line(error)}); it is damaged, or a pickle that "
            "carries code, which stylefast refuses to run: get the .safetensors edition"
        ) from error


def open_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Open a safetensors file: its tensors by name, none of them read yet, and its free-form metadata.

    Raises ModelFormatError, saying what the file is, if it is none.
    """
    stored = StoredTensors(path, any_ending=path.suffix in PICKLE_ENDINGS)
    entries = {name: Entry(stored.shape(name), lambda name=name: stored.read(name)) for name in stored}
    return entries, dict(stored.header.metadata)


def open_tensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Open a file of tensors, safetensors or pickled: its tensors by (flat) name, and its metadata.

    Raises ModelFormatError for anything else.
    """
    if not is_pickle(path):
        return open_safetensors(path)
    return flat_entries(load_pickle(path), path.name, stored=True), {}


def flat_entries(content: Any, name: str, stored: bool = False) -> dict[str, Entry]:
    """Lay a pickled dictionary out flat: {"image_proj": {"norm": ..}} has the key "image_proj.norm".

    The wrapper `state_dict` that training programs put around weights falls away. Raises ModelFormatError for content
    that is no dictionary of dense tensors; `name` is the file's in messages. Of what is `stored`, all numbers must be
    there; a model in memory may be an empty one, on the device meta.
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
        if not isinstance(value, torch.Tensor):
            raise ModelFormatError(f"{name} holds a {type(value).__name__} under {key[:200]!r}, not a tensor")
        if stored or not value.is_meta:
            values.dense_tensor(f"{key[:200]} of {name}", value, error=ModelFormatError)
    return {key: Entry(tuple(value.shape), lambda value=value: value.detach().clone()) for key, value in flat.items()}


def _is_safetensors(start: bytes) -> bool:
    # eight bytes of length, then JSON; a zip archive has its version in the ninth byte, a pickle its second frame
    return start[8:9] == b"{"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
