"""Defensive reading of a model's JSON files: they get edited and truncated, and their numbers decide how much a library
allocates.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from stylefast import values
from stylefast.errors import ModelFormatError, ModelNotFound

Built = TypeVar("Built")
_LARGEST = 2**31  # limit for integers in a config; widths and vocabularies are far smaller
_DEPTHS = ("num_hidden_layers", "layers_per_block", "num_encoder_blocks", "num_decoder_blocks")
_MOST_ENTRIES = 64  # limit for lists in a config


def read_config(file: Path, folder: Path) -> dict[str, Any]:
    """Read one JSON file of a model's folder as a dictionary.

    Raises ModelNotFound if it is missing, ModelFormatError if it is not a JSON object.
    """
    name = file.relative_to(folder)
    if not file.is_file():
        raise ModelNotFound(f"{name} is missing in {folder}; a diffusers SDXL folder needs it")
    return values.read_json(file, f"{name} in {folder}", kind=dict, error=ModelFormatError, infinite=True)


def build(make: Callable[[], Built], config: Mapping, tensors: int, what: str) -> Built:
    """Build a config's module on the meta device, where it takes no memory.

    tensors: number of tensors in the files, an upper bound for layer counts. Raises ModelFormatError, naming the key
    if known, for a config that can't be built.
    """
    for key, value in config.items():
        _check_size(key, value, what)
        depths = value if isinstance(value, (list, tuple)) else [value]
        if key in _DEPTHS and any(isinstance(depth, int) and depth > tensors for depth in depths):
            raise ModelFormatError(
                f"the config of {what} has {key}={values.quoted(value)}, but the weights have only {tensors} tensors"
            )
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:  # other libraries' constructors raise arbitrary errors for unexpected values
        reason = values.quoted(" ".join(str(error).split()))
        raise ModelFormatError(f"the config of {what} does not describe a model of its kind ({reason})") from error


def style_modules(folder: Path, known: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    """Return the attention modules that carry style, from a folder's `stylefast.json`, or `default` without one.

    Raises ModelFormatError for other keys, and for modules not in `known`.
    """
    file = folder / "stylefast.json"
    if not file.is_file():
        return default
    config = read_config(file, folder)
    unknown = sorted(config.keys() - {"style_modules"})
    if unknown or "style_modules" not in config:
        raise ModelFormatError(
            f"stylefast.json in {folder} has the keys {values.quoted(sorted(config))}; it may contain only "
            "style_modules"
        )
    modules = values.several(f"style_modules in {file}", config["style_modules"], least=1, error=ModelFormatError)
    return tuple(values.one_of(f"style_modules in {file}", name, known, error=ModelFormatError) for name in modules)


def _check_size(key: str, value: Any, what: str) -> None:
    if isinstance(value, (list, tuple)):
        if len(value) > _MOST_ENTRIES and key not in ("trained_betas", "latents_mean", "latents_std"):
            raise ModelFormatError(
                f"the config of {what} has {len(value)} entries for {values.shown(key)}; at most {_MOST_ENTRIES} are "
                "allowed"
            )
        for one in value:
            _check_size(key, one, what)
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise ModelFormatError(
            f"the config of {what} has {values.shown(key)}={values.quoted(value)}, which no model has"
        )


def config_of(module: nn.Module) -> Mapping[str, Any]:
    """Return the config of a module of diffusers. Raises ModelFormatError for a module without one."""
    config = getattr(module, "config", None)
    if not isinstance(config, Mapping):
        raise ModelFormatError(f"a {type(module).__name__} has no config; give a module of diffusers")
    return config
