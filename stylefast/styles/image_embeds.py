"""Precomputed image embeddings, from tensors or files in diffusers format.

diffusers' `prepare_ip_adapter_image_embeds` returns, per adapter, [2, pictures, width] with those of "no picture"
first, or [1, pictures, width] without guidance; plus adapters add an axis of patches after the pictures.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stylefast import values
from stylefast.errors import ModelError, StyleError
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.tensor_files import is_pickle, load_pickle, open_safetensors

MAX_VALUES = 2**26  # per file or tensor: patch features of some hundred pictures


def read_image_embeds(source: Any) -> tuple[Tensor, str | None]:
    """Return embeddings as one float32 CPU tensor, and the path of their file or None.

    `source`: a tensor, a list with one (diffusers has one tensor per adapter), or a safetensors or pickle file that
    holds either. Raises StyleError for anything else, and for values that are not finite.
    """
    path = None
    if isinstance(source, (str, os.PathLike)):
        place = values.path("image_embeds", source, error=StyleError)
        source, path = _from_file(place), str(place)
    several = values.entries(source)
    if several is not None:
        if len(several) != 1:
            raise StyleError(
                f"image_embeds is a list of {len(several)}; diffusers has one tensor per adapter: give each to a "
                "separate InstantStyle"
            )
        source = several[0]
    if not isinstance(source, Tensor) or not source.is_floating_point():
        what = f"a tensor of {source.dtype}" if isinstance(source, Tensor) else values.quoted(source)
        raise StyleError(f"image_embeds is {what}; give floating-point numbers [pictures, width] as a tensor or a file")
    values.dense_tensor("image_embeds", source, error=StyleError)
    if not 1 <= source.ndim <= 4 or not 0 < source.numel() <= MAX_VALUES:
        raise StyleError(
            f"image_embeds has the shape {list(source.shape)}; it must be [pictures, width], or the output of "
            "prepare_ip_adapter_image_embeds"
        )
    # copied so that later changes of the caller's tensor don't affect the request
    found = source.detach().to("cpu", torch.float32, copy=True)
    if not torch.isfinite(found).all():
        raise StyleError("image_embeds contains NaN or infinity; compute it again")
    return found, path


def split_image_embeds(embeds: Tensor, adapter: IPAdapter) -> tuple[Tensor, Tensor | None]:
    """Split embeddings into an adapter's features [pictures, ...] and those of "no picture", or None without them.

    Raises StyleError if the shape doesn't fit the adapter's kind.
    """
    axes = 2 if adapter.kind == "global" else 3
    shape = "[pictures, width]" if axes == 2 else "[pictures, patches, width]"
    if embeds.ndim == axes - 1:
        return embeds[None], None
    if embeds.ndim == axes:
        return embeds, None
    if embeds.ndim != axes + 1 or len(embeds) > 2:
        raise StyleError(
            f"image_embeds has the shape {list(embeds.shape)}; {adapter.name} ({adapter.kind}) needs {shape}, or "
            "two of these stacked, with that of no picture first"
        )
    if len(embeds) == 1:
        return embeds[0], None
    negative = embeds[0]
    # usually the same for every picture; then one is enough
    return embeds[1], negative[:1] if torch.equal(negative, negative[:1].expand_as(negative)) else negative


def _from_file(path: Path):
    if not os.path.isfile(path):
        raise StyleError(f"no file of image embeddings found at {values.quoted(str(path))}; check the path")
    if path.stat().st_size > 8 * MAX_VALUES:
        raise StyleError(f"{path} has {path.stat().st_size} bytes; image embeddings take a few kilobytes per picture")
    try:
        if is_pickle(path):
            return load_pickle(path)
        entries, _ = open_safetensors(path)
    except ModelError as error:
        raise StyleError(f"can't read image embeddings: {error}") from error
    if len(entries) != 1:
        raise StyleError(
            f"{path} holds {len(entries)} tensors ({', '.join(entries)[:200]}); image embeddings are a single tensor"
        )
    return next(iter(entries.values())).read()
