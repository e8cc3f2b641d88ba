"""Lookup and loading of an SDXL model's two CLIP tokenizers."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from stylefast import values
from stylefast.errors import ModelFormatError, ModelNotFound
from stylefast.models.config_check import check_tokenizer
from stylefast.models.config_files import read_config
from stylefast.models.hub import HubOptions, hub_folder, wanted_files
from stylefast.models.weight_files import offline

_TOKENIZER_SOURCES = ("stabilityai/stable-diffusion-xl-base-1.0", "openai/clip-vit-large-patch14")


def given_folder(given: Any) -> Path:
    """Return the folder that a caller gives for tokenizers or configs. Raises ModelNotFound if it doesn't exist."""
    folder = values.path("the folder of tokenizers or configs", given)
    if not os.path.isdir(folder):
        shown = values.shown_path(folder)
        raise ModelNotFound(f"no folder at {shown}; tokenizer= and config= need a local folder")
    return folder


def has_vocabulary(folder: Path) -> bool:
    """Return whether a folder holds a CLIP tokenizer."""
    return any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json"))


def tokenizers_in(folder: Path) -> tuple:
    """Load both tokenizers of a folder, from `tokenizer` and `tokenizer_2`, or from the folder itself for both.

    Raises ModelNotFound and ModelFormatError.
    """
    if not (folder / "tokenizer").is_dir() and has_vocabulary(folder):
        # one vocabulary serves both encoders; the second pads with "!", id 0
        return _tokenizer(folder), _tokenizer(folder, pad_token="!")
    return _tokenizer(folder / "tokenizer"), _tokenizer(folder / "tokenizer_2")


def find_tokenizers(path: Path, given: str | Path | None, config: Path | None, hub: HubOptions) -> tuple:
    """Load tokenizers for a single file, which has none, from the first place that has them.

    The places are `given` (alone, if not None), `config`, the file's folder, the cache, the hub. Raises ModelNotFound
    and ModelFormatError.
    """
    if given is not None:
        return tokenizers_in(given_folder(given))
    for folder in filter(None, (config, path.parent)):
        if has_vocabulary(folder / "tokenizer") and has_vocabulary(folder / "tokenizer_2") or has_vocabulary(folder):
            return tokenizers_in(folder)

    def holds_one(folder: Path) -> bool:
        return has_vocabulary(folder) or has_vocabulary(folder / "tokenizer")

    for repo_id in _TOKENIZER_SOURCES:
        try:
            # only the last source is small enough to download; the first is used only if cached
            cached_only = hub.local_files_only or repo_id != _TOKENIZER_SOURCES[-1]
            asked = replace(hub, revision=None, force_download=False, local_files_only=cached_only)
            folder = hub_folder(repo_id, holds_one, lambda names: wanted_files(names, False, "none", ("",)), asked)
        except ModelNotFound:
            continue
        folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        return _tokenizer(folder), _tokenizer(folder, pad_token="!")
    reason = "downloads are switched off" if hub.local_files_only or offline() else "the hub can't be reached"
    raise ModelNotFound(
        f"{path.name} contains no tokenizer, no CLIP tokenizer is cached, and {reason}. Get the small files "
        f"vocab.json and merges.txt (on a machine with network: `hf download {_TOKENIZER_SOURCES[-1]} vocab.json "
        "merges.txt tokenizer_config.json --local-dir clip-tokenizer`) and pass tokenizer='clip-tokenizer', or put "
        "them next to the file"
    )


def _tokenizer(folder: Path, **arguments):
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ModelNotFound(f"{folder} contains no CLIP tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    if (folder / "tokenizer_config.json").is_file():
        config = read_config(folder / "tokenizer_config.json", folder)
        check_tokenizer(config, f"the tokenizer in {folder.name}")
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, **arguments)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFormatError(f"the tokenizer in {folder} can't be read ({error})") from error
