"""Files of tensors that people pass around: LoRAs, image adapters, learned vectors, image embeddings.

What a file is stands in its first bytes; endings are often wrong. Pickles are read as tensors alone (`weights_only`),
so that code in them never runs.
"""

import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stylefast.errors import ModelFormatError
from stylefast.models.weight_files import read_header

PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".ipadpt")


class Entry(NamedTuple):
    """One tensor of a file: its shape, known before anything is read, and a way to read it."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def is_pickle(path: Path) -> bool:
    """Tell whether the file is PyTorch's: a zip archive, or the bare pickle of an old version."""
    with path.open("rb") as file:
        start = file.read(9)
    return not _is_safetensors(start) and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80")


def load_pickle(path: Path, *, mapped: bool = False) -> Any:
    """Load what PyTorch wrote, as far as it is tensors and plain values.

    `mapped` leaves large tensors in the file until they are copied out, which must be before the file may change.
    Raises ModelFormatError for damaged files and for those that would run code.
    """
    try:
        # given a path, torch goes by its ending; given a stream, it can't map
        mapped = mapped and path.suffix in PICKLE_ENDINGS and zipfile.is_zipfile(path)
        with warnings.catch_warnings(), nullcontext(path) if mapped else path.open("rb") as source:
            # torch warns of its own deprecated storage classes, which the file has and the user can't change
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
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
    from safetensors import SafetensorError, safe_open

    if path.suffix not in PICKLE_ENDINGS:
        read_header(path)  # which has a name for web pages, LFS pointers and files that are cut short or contradictory
    try:
        file = safe_open(str(path), framework="pt", device="cpu")
        # a copy, since the file's own pages would change, or end the process, when the file is written anew
        entries = {
            name: Entry(tuple(file.get_slice(name).get_shape()), lambda name=name: file.get_tensor(name).clone())
            for name in file.keys()  # noqa: SIM118 (the handle is no dictionary)
        }
        return entries, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ModelFormatError(
            f"{path.name} is no readable safetensors file: {_first_line(error)}; fetch it again"
        ) from error


def open_tensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Open a file of tensors, safetensors or pickled: its tensors by (flat) name, and its metadata.

    Raises ModelFormatError for anything else.
    """
    if not is_pickle(path):
        return open_safetensors(path)
    return flat_entries(load_pickle(path, mapped=True), path.name), {}


def flat_entries(content: Any, name: str) -> dict[str, Entry]:
    """Lay a pickled dictionary out flat: {"image_proj": {"norm": ..}} has the key "image_proj.norm".

    The wrapper `state_dict` that training programs put around weights falls away. Raises ModelFormatError for content
    that is no dictionary of tensors; `name` is the file's in messages.
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
    return {key: Entry(tuple(value.shape), lambda value=value: value.detach().clone()) for key, value in flat.items()}


def _is_safetensors(start: bytes) -> bool:
    # eight bytes of length, then JSON; a zip archive has its version in the ninth byte, a pickle its second frame
    return start[8:9] == b"{"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
