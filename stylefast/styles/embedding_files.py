"""Readers of learned styles in many tools' formats, recognised by their keys, not by file names."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stylefast import values
from stylefast.errors import ModelFormatError, StyleError
from stylefast.models.lora_file import BUNDLE
from stylefast.models.tensor_files import Entry, first_bytes, is_pickle, load_pickle, open_safetensors

MAX_BYTES = 256 * 2**20
PAIR_NAMES = ("learned_embeds", "learned_embeds_2")
_STAGE_KEY = re.compile(r"(?P<token>.+)-T(?P<stage>\d+)")
_BOTH = (("stages.clip_l", "stages.clip_g"), ("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))


@dataclass(frozen=True)
class StyleFile:
    """Vectors as read: `clip_l` [T, n, width 1], `clip_g` [T, n, width 2], with the file's name and metadata."""

    path: str
    name: str
    clip_l: Tensor
    clip_g: Tensor
    pooled_policy: str = "eos"
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_files(source: str | os.PathLike | Sequence[str | Path], name: str | None = None) -> StyleFile:
    """Read one file, or a pair of files (encoder 1, encoder 2). Raises StyleError, also for what is neither."""
    if isinstance(source, str | os.PathLike):
        return read_single(source, name)
    files = values.entries(source)
    if files is None:
        raise StyleError(f"a learned style is a path or a pair of paths, not {type(source).__name__}")
    if len(files) != 2:
        raise StyleError(f"{len(files)} files given; a learned style is one file or a pair (encoder 1, encoder 2)")
    return read_pair(*files)


def read_single(source: str | os.PathLike, name: str | None = None) -> StyleFile:
    """Read the vectors of both encoders from one file, or from a folder with diffusers' two.

    `name` picks one of several embeddings in a LoRA file. Raises StyleError for other files.
    """
    path = values.path("a learned style", source, error=StyleError)
    if os.path.isdir(path):
        return read_pair(*(_in_folder(path, stem) for stem in PAIR_NAMES))
    content, metadata = _read(path, name)
    content = _unwrapped(content)
    for first, second in _BOTH:
        if first in content and second in content:
            _check_rest(content, path)
            stages = first.startswith("stages.")
            policy = "first_added_token" if first.startswith("text_encoders") else "eos"
            name = str(metadata.get("token") or content.get("name") or path.stem)
            clip_l, clip_g = (_rows(content[key], path, key, stages) for key in (first, second))
            return StyleFile(str(path), name, clip_l, clip_g, policy, metadata)
    _, rows = _one_encoder(content, path)
    width = rows.shape[-1]
    if width == 1280:
        raise StyleError(
            f"{path} contains vectors of width 1280 for text encoder 2 (clip_g) only; give both files of the pair: "
            "(encoder 1, encoder 2)"
        )
    raise StyleError(
        f"{path} contains vectors of width {width} for one text encoder only (clip_g is missing): a Stable "
        "Diffusion 1.x or 2.x embedding can't be used with SDXL; if it is the first file of an SDXL pair, give "
        "both: (encoder 1, encoder 2)"
    )


def read_pair(first: str | Path, second: str | Path) -> StyleFile:
    """Read two files with the vectors of one encoder each, in the order (encoder 1, encoder 2). Raises StyleError."""
    first, second = (values.path("a learned style", one, error=StyleError) for one in (first, second))
    tokens, rows = zip(*(_one_encoder(_unwrapped(_read(p)[0]), p) for p in (first, second)), strict=True)
    if rows[0].shape[:2] != rows[1].shape[:2]:
        raise StyleError(
            f"{first} holds {tuple(rows[0].shape[:2])} stages and vectors, {second} {tuple(rows[1].shape[:2])}; "
            "the two files do not belong together"
        )
    if (rows[0].shape[2], rows[1].shape[2]) == (1280, 768):
        raise StyleError(f"{first} is made for encoder 2 and {second} for encoder 1; swap them: (encoder 1, encoder 2)")
    return StyleFile(str(first), tokens[0] or first.stem, rows[0], rows[1], "first_added_token")


def _check_rest(content: Mapping, path: Path) -> None:
    known = {key for pair in _BOTH for key in pair}
    rest = [str(key) for key, value in content.items() if isinstance(value, Tensor) and key not in known]
    if rest:
        raise StyleError(
            f"{path} also contains {values.listed(rest)}, for outputs of text encoders or for encoders that SDXL "
            "does not have; use an embedding made for SDXL, with only clip_l and clip_g"
        )


def _in_folder(folder: Path, stem: str) -> Path:
    for suffix in (".safetensors", ".bin"):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise StyleError(
        f"{folder} contains no {stem}.safetensors; a folder must contain {PAIR_NAMES[0]} and {PAIR_NAMES[1]}, "
        "otherwise give the file itself"
    )


def _read(path: Path, name: str | None = None) -> tuple[Mapping | Tensor, dict[str, str]]:
    if not os.path.isfile(path):
        raise StyleError(f"no style file found at {values.quoted(str(path))}; check the path")
    try:
        head, size = first_bytes(path), path.stat().st_size
    except ModelFormatError as error:
        raise StyleError(str(error)) from error
    entries, metadata = {}, {}
    if head[8:9] == b"{":
        try:
            entries, metadata = open_safetensors(path)
        except ModelFormatError as error:
            raise StyleError(f"{path} is damaged or truncated: {error}") from error
        if any(key.startswith(BUNDLE) for key in entries):
            return _bundled(path, entries, name), {}
    if size > MAX_BYTES:
        raise StyleError(
            f"{path} has {size / 2**20:.0f} MiB; learned styles have a few KiB, and the limit is "
            f"{MAX_BYTES // 2**20} MiB: this is another kind of file, perhaps a checkpoint"
        )
    try:
        if head[8:9] == b"{":
            return {key: entry.read() for key, entry in entries.items()}, metadata
        if is_pickle(path):
            return load_pickle(path), {}
    except ModelFormatError as error:
        raise StyleError(str(error)) from error
    raise StyleError(
        f"{path} is neither safetensors nor a torch file ({size} bytes); give a .safetensors, .bin or .pt embedding"
    )


def _bundled(path: Path, entries: Mapping[str, Entry], name: str | None) -> dict:
    """Read the vectors of an embedding in a LoRA file; `name` picks one of several."""
    keys = [key.removeprefix(BUNDLE) for key in entries if key.startswith(BUNDLE)]
    names = sorted({key.partition(".")[0] for key in keys})
    if len(names) > 1 and name not in names:
        raise StyleError(
            f"{path} contains the embeddings {values.listed(names)}; choose one: name={values.quoted(names[0])}"
        )
    picked = name if name in names else names[0]
    content = {key.partition(".")[2]: entries[BUNDLE + key].read() for key in keys if key.startswith(f"{picked}.")}
    return content | {"name": picked}


def _unwrapped(content) -> Mapping:
    # A1111 nests the tensors in string_to_param, sometimes as a prefix of flat keys
    if isinstance(content, Mapping) and isinstance(content.get("string_to_param"), Mapping):
        return dict(content["string_to_param"]) | ({"name": content["name"]} if "name" in content else {})
    if isinstance(content, Mapping):
        return {str(key).removeprefix("string_to_param."): value for key, value in content.items()}
    return {"*": content} if isinstance(content, Tensor) else content


def _one_encoder(content, path: Path) -> tuple[str, Tensor]:
    # -> (token or "", [T, n, width])
    if not isinstance(content, Mapping):
        raise StyleError(f"{path} holds a {type(content).__name__}, not learned vectors")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    staged = {key: match for key in tensors if (match := _STAGE_KEY.fullmatch(key))}
    if staged and len(staged) == len(tensors):
        order = {int(match["stage"]): key for key, match in staged.items()}
        token = {match["token"] for match in staged.values()}
        if sorted(order) != list(range(len(staged))) or len(token) != 1:
            raise StyleError(
                f"{path} holds the keys {values.listed(sorted(staged))}; one token with stages T0, T1, ... is expected"
            )
        stages = [_rows(tensors[order[k]], path, order[k], False)[0] for k in range(len(order))]
        if len({tuple(rows.shape) for rows in stages}) > 1:
            raise StyleError(f"{path} holds stages of the shapes {[tuple(r.shape) for r in stages]}; all must agree")
        return token.pop(), torch.stack(stages)
    if len(tensors) == 1:
        ((key, rows),) = tensors.items()
        own = key if key not in ("*", "emb_params", "clip_l", "clip_g") else str(content.get("name") or "")
        return own, _rows(rows, path, key, False)
    keys = values.listed(sorted(map(str, content)))
    raise StyleError(
        f"{path} holds {len(tensors)} tensors (keys: {keys}), but no clip_l with clip_g, text_encoders_0/1, "
        "<token>-T0, T1, ... or single tensor: it is not a learned style"
    )


def _rows(value, path: Path, key: str, stages: bool) -> Tensor:
    # -> [T, n, width]
    name = f"{values.shown(key)} of {path}"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise StyleError(f"{name} is not a tensor of floating-point numbers; the file is not a learned style")
    rows = value.detach()
    if not stages and rows.ndim == 1:
        rows = rows[None]
    if not stages and rows.ndim == 2:
        rows = rows[None]
    if rows.ndim != 3 or (not stages and rows.shape[0] != 1):
        limit = "[stages, vectors, width]" if stages else "[vectors, width] or [width]"
        raise StyleError(f"{name} has the shape {tuple(value.shape)}; it must be {limit}")
    return rows.float()
