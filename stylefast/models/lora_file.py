"""Reader of LoRAs in all published layouts; every tensor in a file is either used or named in an error or warning."""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import NamedTuple

import torch
from torch import Tensor

from stylefast import values
from stylefast.errors import AdapterError, ModelFormatError, ModelNotFound
from stylefast.models import peft_config
from stylefast.models.digests import all_finite
from stylefast.models.lora_changes import Change, Difference, Replacement, Scaling, ShapeMismatch, change_of
from stylefast.models.lora_names import PARTS, PEFT_PREFIX, ModuleNames, split_key
from stylefast.models.peft_config import PeftConfig
from stylefast.models.quantised import WAY_OUT, check_names
from stylefast.models.tensor_files import PICKLE_ENDINGS, Entry, open_tensors
from stylefast.models.weight_files import WeightHeader, recognise

logger = logging.getLogger(__name__)

BUNDLE = "bundle_emb."  # learned embeddings that OneTrainer and others store in LoRA files
# key patterns of other methods -> their names
_METHODS = (
    (r"\.oft_(blocks|diag|R)\b", "OFT or BOFT"),
    (r"\.on_input$", "(IA)^3"),
    (r"\.(a1|a2|b1|b2|bm)\.weight$", "GLoRA"),
    (r"\bvera_lambda_", "VeRA"),
    (r"\.lora_embedding_[AB]\b", "LoRA of an embedding table"),
    (r"_custom_diffusion\.", "Custom Diffusion"),
    (r"^lllite_", "ControlNet-LLLite"),
    (r"^lora_controlnet$", "Control-LoRA"),
    (r"\bmotion_modules\.", "AnimateDiff motion LoRA"),
    (r"\.bias_(indices|values|size)$", "LyCORIS with sparse biases"),
)
_OTHER_MODELS = (
    (r"(double|single)_blocks[._]|single_transformer_blocks[._]", "Flux"),
    (r"joint_(transformer_)?blocks[._]|^lora_te3_|^text_encoder_3\.", "Stable Diffusion 3"),
    (r"^lora_prior_", "Stable Cascade"),
)
# an adapter's name, which peft omits when saving
_NAMED = re.compile(r"\.lora_(A|B|magnitude_vector)\.([^.]+)\.(?:weight|bias)$")
_CROSS_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}


class Target(NamedTuple):
    """A weight that a LoRA changes: its shape, and its size in the model's type."""

    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read; `changes` and `targets` map (part, name of the weight) to its change and to the weight's form."""

    name: str
    digest: str  # SHA-256 of all files read
    changes: Mapping[tuple[str, str], Change]
    targets: Mapping[tuple[str, str], Target]


@dataclass(frozen=True)
class _Piece:
    """A file of a LoRA, its settings, and its part if the folder name gives one."""

    path: Path
    config: PeftConfig | None = None
    part: str | None = None


@dataclass
class _Module:
    """The tensors of one module by role, and its spelling in the file."""

    spelled: str
    tensors: dict[str, Tensor] = field(default_factory=dict)


def read_lora(source: str | Path, weights: Mapping[str, Mapping[str, Tensor]]) -> LoraFile:
    """Read a LoRA file, or a folder with one, for a model with these weights (part -> name -> tensor).

    Raises ModelNotFound, ModelFormatError for files that can't be read, and AdapterError for files that are not a LoRA,
    have an unknown kind or layout, are damaged, or were made for other shapes.
    """
    pieces, names = _pieces(source), ModuleNames(weights)
    changes: dict[tuple[str, str], Change] = {}
    with _Digest() as digest:
        for piece in pieces:
            found = _read_piece(piece, names, weights, digest)
            if double := found.keys() & changes.keys():
                raise AdapterError(
                    f"{source} changes {'.'.join(min(double))} in two of its files; give only one of them"
                )
            changes |= found
    changed = {(part, name): weights[part][name] for part, name in changes}
    targets = {
        key: Target(tuple(weight.shape), weight.numel() * weight.element_size()) for key, weight in changed.items()
    }
    path = Path(source)
    return LoraFile(path.stem if path.is_file() else pieces[0].path.stem, digest.value, changes, targets)


def lora_digest(source: str | Path) -> str:
    """Return the SHA-256 of a LoRA's files, the `digest` of `read_lora`, without reading their tensors.

    Raises ModelNotFound, ModelFormatError for files that can't be read, and InvalidRequest for pipes and devices.
    """
    with _Digest() as digest:
        for file in files_of(source):
            values.no_device("the LoRA", file)
            digest.add(file)
    return digest.value


def files_of(source: str | Path) -> list[Path]:
    """List the files of a LoRA: each of its weights, then peft's settings. Raises ModelNotFound if there is none."""
    return [file for weights, config, _ in _places(source) for file in (weights, config) if file is not None]


def _pieces(source: str | Path) -> list[_Piece]:
    return [
        _Piece(file, None if config is None else peft_config.read_folder_config(config.parent), part)
        for file, config, part in _places(source)
    ]


def _places(source: str | Path) -> list[tuple[Path, Path | None, str | None]]:
    """Return (file, its peft config, its part) of each weight file. Raises ModelNotFound."""
    path = Path(source)
    # unlike Path's methods, os.path's don't raise for names that the system can't represent
    if os.path.isdir(path):
        if (path / peft_config.FILE).is_file():
            return [(_only_file(path, "adapter_model.*"), path / peft_config.FILE, None)]
        parts = [part for part in PARTS if (path / part / peft_config.FILE).is_file()]
        if parts:
            return [
                (_only_file(path / part, "adapter_model.*"), path / part / peft_config.FILE, part) for part in parts
            ]
        return [(_only_file(path, "*"), None, None)]
    if not os.path.isfile(path):
        values.no_device("the LoRA", path, error=ModelNotFound)
        raise ModelNotFound(
            f"no LoRA file at {values.quoted(str(path))}; give its path, or download one with `hf download <id> "
            "--local-dir loras`"
        )
    beside = path.name.startswith("adapter_model.") and (path.parent / peft_config.FILE).is_file()
    return [(path, path.parent / peft_config.FILE if beside else None, None)]


def _only_file(folder: Path, pattern: str) -> Path:
    files = sorted(folder.glob(pattern))
    found = [file for file in files if file.suffix == ".safetensors"]
    found = found or [file for file in files if file.suffix in PICKLE_ENDINGS]
    if len(found) != 1:
        raise ModelNotFound(f"{folder} holds {len(found)} LoRA files (.safetensors, .bin); name the file itself")
    return found[0]


def _read_piece(piece: _Piece, names: ModuleNames, weights, digest: "_Digest") -> dict[tuple[str, str], Change]:
    entries, metadata = open_tensors(piece.path)
    file = piece.path.name
    roles = _roles(entries, file, piece, metadata)
    for one in (piece.path, piece.path.parent / peft_config.FILE) if piece.config else (piece.path,):
        digest.add(one)
    modules, unknown = _modules(roles, entries, names, piece)
    configs = peft_config.read_metadata(metadata, file) if piece.config is None else dict.fromkeys(PARTS, piece.config)
    changes: dict[tuple[str, str], Change] = {}
    misfits: list[ShapeMismatch] = []
    idle = 0
    for (part, module), found in modules.items():
        scaling, alpha = _scaling(found, part, configs.get(part), file)
        idle += alpha == 0
        down = found.tensors.get("down")
        # also needed to scale the bias of a LoRA's second layer
        rank = down.shape[0] if down is not None and down.ndim else 0
        if "up_bias" in found.tensors and not rank:
            raise AdapterError(f"{file}: {found.spelled[:200]} has the bias of a LoRA but no factors; it is damaged")
        for name, tensors in _by_weight(module, found.tensors).items():
            where = f"{file}: {found.spelled[:200]}"
            weight = weights[part].get(name)
            if weight is None:
                raise AdapterError(f"{where} changes {part}.{name}, which this model does not have")
            try:
                changes[part, name] = _change(tensors, tuple(weight.shape), scaling, rank, where)
            except ShapeMismatch as error:
                misfits.append(error)
        config = configs.get(part)
        if config is not None and rank:
            config.check_module(_as_trained(found.spelled, part), found.tensors, rank)
    if misfits:
        raise AdapterError(
            f"{file} does not fit this model: {misfits[0]}, and {len(misfits) - 1} more differ; it was made for "
            f"another model{_family(entries, metadata)}"
        )
    if unknown:
        raise _unknown_layers(file, unknown, len(modules), entries, metadata)
    if not changes:
        raise AdapterError(f"{file} changes nothing; it contains only alphas or embeddings")
    for part in dict.fromkeys(part for part, _ in modules):
        config = configs.get(part)
        if config is not None:
            here = {module: found.tensors for (place, module), found in modules.items() if place == part}
            with_lora = {module for module, tensors in here.items() if "down" in tensors}
            config.check_whole(weights[part], {name for place, name in changes if place == part}, with_lora)
    if idle:
        logger.warning("%s gives %d of its %d layers the alpha 0; these have no effect", file, idle, len(modules))
    _announce_embeddings(entries, piece.path)
    return changes


def _roles(entries: Mapping[str, Entry], file: str, piece: _Piece, metadata) -> dict[str, tuple[str, str]]:
    """Return key -> (module as spelled, role) of every tensor. Raises AdapterError for tensors not part of a LoRA."""
    roles, rest = {}, []
    for key in entries:
        if key.startswith(BUNDLE):
            continue
        found = split_key(key)
        if found is None and key.startswith(PEFT_PREFIX) and key.endswith((".weight", ".bias")):
            # fully trained tensors; peft names the original layer of a LoRA `base_layer`
            found = key.rpartition(".")[0].removesuffix(".base_layer"), f"whole_{key.rpartition('.')[2]}"
        if found is None:
            rest.append(key)
        else:
            roles[key] = found
    if any(key.startswith(("ip_adapter.", "image_proj.")) for key in entries):
        raise AdapterError(f"{file} is not a LoRA but an IP-Adapter; give it as adapter=, or to engine.load_adapter")
    check_names(entries, file)
    for pattern, method in _METHODS:
        example = next((key for key in entries if re.search(pattern, key)), None)
        if example is not None:
            raise AdapterError(
                f"{file} is {method} ({example[:200]}); the supported kinds are LoRA, LoCon, LoHa, LoKr, DoRA and "
                "full differences: merge it into a checkpoint with the tool that made it"
            )
    named = next((found for key in rest if (found := _NAMED.search(key))), None)
    if named is not None:
        raise AdapterError(
            f"{file} contains an adapter under its name in memory, {values.quoted(named[2])} "
            f"({named.string[:200]}); save it with peft's save_pretrained, which omits the name"
        )
    if not roles and not rest and entries:
        raise AdapterError(
            f"{file} contains only learned embeddings ({_some(list(entries))}) and no LoRA; give it as "
            "style=DreamStyler(file)"
        )
    if not roles:
        header = WeightHeader(piece.path, {key: ("", entry.shape) for key, entry in entries.items()}, metadata)
        kind = recognise(header)
        if kind == "LoRA":
            raise AdapterError(
                f"{file} is a LoRA in an unknown layout ({_some(rest)}); convert it with the tool that made it"
            )
        raise AdapterError(f"{file} is not a LoRA, but: {kind}")
    if rest:
        raise AdapterError(
            f"{file} holds {_some(rest)}, which belong to no known kind of LoRA; its layout is unknown, so the file "
            "was not used"
        )
    return roles


def _modules(roles, entries, names: ModuleNames, piece: _Piece) -> tuple[dict[tuple[str, str], _Module], list[str]]:
    """Return the tensors by module of this model, and the spellings of modules it lacks. Raises AdapterError."""
    default = piece.part or (piece.config.part if piece.config else None) or _part_by_shape(roles, entries, names)
    modules: dict[tuple[str, str], _Module] = {}
    places: dict[str, tuple[str, str] | None] = {}
    for key, (spelled, role) in roles.items():
        if spelled not in places:
            found = names.find(spelled, default)
            if len(found) > 1:
                raise AdapterError(
                    f"{piece.path.name} does not say to which text encoder {spelled[:200]} belongs; prefix the "
                    "names with text_encoder. or text_encoder_2., or put the file into a folder of that name"
                )
            places[spelled] = found[0] if found else None
        place = places[spelled]
        if place is None:
            continue
        module = modules.setdefault(place, _Module(spelled))
        if role in module.tensors:
            raise AdapterError(f"{piece.path.name} holds {role} of {spelled[:200]} twice, as {key[:200]} too")
        module.tensors[role] = _finite(entries[key].read(), key, role, piece.path.name)
    # ignore modules with only an alpha, which change nothing: removing layers from a file often leaves those behind
    changing = {spelled for spelled, role in roles.values() if role != "alpha"}
    return modules, [spelled for spelled, place in places.items() if place is None and spelled in changing]


def _part_by_shape(roles, entries, names: ModuleNames) -> str | None:
    """Return the only text encoder whose shapes fit the names without a prefix; None if several or none fit."""
    fitting: set[str] | None = None
    for key, (spelled, role) in roles.items():
        found = names.find(spelled) if role in ("down", "up") else []
        if len(found) > 1:
            axis = 1 if role == "down" else 0
            if len(entries[key].shape) <= axis:
                continue  # damaged, reported when read
            fits = {part for part, module in found if names.shape(part, module)[axis] == entries[key].shape[axis]}
            fitting = fits if fitting is None else fitting & fits
    return fitting.pop() if fitting is not None and len(fitting) == 1 else None


def _finite(tensor: Tensor, key: str, role: str, file: str) -> Tensor:
    # alphas are often integers; factors stored as integers or powers of two lack their scales
    integer = not tensor.dtype.is_floating_point and role != "alpha"
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise AdapterError(f"{file}: {key[:200]} has the type {tensor.dtype}; weights must be floating-point numbers")
    if integer or re.search("e8m0|float4", str(tensor.dtype)):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise AdapterError(f"{file} holds {key[:200]} as {kind}, quantised in an unsupported way; {WAY_OUT}")
    # used in float32, so that a larger float64 is infinite
    if not all_finite(tensor if tensor.dtype.is_floating_point and tensor.itemsize <= 4 else tensor.float()):
        raise AdapterError(f"{file}: {key[:200]} contains NaN or infinity; the file is damaged, or training diverged")
    return tensor


def _scaling(module: _Module, part: str, config: PeftConfig | None, file: str) -> tuple[Scaling, float | None]:
    """Return the module's scaling, and its alpha or None. Raises AdapterError."""
    alpha = module.tensors.pop("alpha", None)
    factors = module.tensors.keys() - {"diff", "diff_b", "whole_weight", "whole_bias"}
    if not factors:
        return Scaling(None), None  # full differences have neither rank nor alpha
    if alpha is not None:
        if alpha.numel() != 1:
            raise AdapterError(
                f"{file}: the alpha of {module.spelled[:200]} has the shape {list(alpha.shape)}; it must be one number"
            )
        return Scaling(float(alpha)), float(alpha)
    if config is not None:
        scaling = config.scaling(_as_trained(module.spelled, part))
        return scaling, scaling.alpha
    if module.spelled.startswith(PEFT_PREFIX):
        raise AdapterError(
            f"{file} was written by peft, whose alphas are in {peft_config.FILE}; put that next to it, and give the "
            "folder"
        )
    return Scaling(None), None


def _as_trained(spelled: str, part: str) -> str:
    """Return the module's name in the trained model."""
    return spelled.removeprefix(PEFT_PREFIX).removeprefix(f"{part}.").removeprefix(PEFT_PREFIX)


def _by_weight(module: str, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split a module's tensors into those that change its weight and those that change its bias."""
    biases = ("diff_b", "up_bias", "whole_bias")
    split = {
        f"{module}.weight": {role: tensor for role, tensor in tensors.items() if role not in biases},
        f"{module}.bias": {role: tensor for role, tensor in tensors.items() if role in biases},
    }
    return {name: found for name, found in split.items() if found}


def _change(tensors: dict[str, Tensor], shape: tuple[int, ...], scaling: Scaling, rank: int, where: str) -> Change:
    role, tensor = next(iter(tensors.items()))
    if role not in ("diff_b", "up_bias", "whole_bias", "whole_weight"):
        return change_of(tensors, shape, scaling, where)
    if len(tensors) > 1:
        raise AdapterError(f"{where} has {' and '.join(sorted(tensors))}, which do not belong together")
    if tuple(tensor.shape) != shape:
        raise ShapeMismatch(where, tuple(tensor.shape), shape)
    if role == "up_bias":
        return Difference(scaling.of(rank) * tensor.float())
    return Difference(tensor) if role == "diff_b" else Replacement(tensor)


def _unknown_layers(file: str, unknown: list[str], matched: int, entries, metadata) -> AdapterError:
    family = _family(entries, metadata)
    if not matched:
        why = f"it was made for another model{family}" if family else "the layout of its keys is unknown"
        return AdapterError(f"{file} names no layer of this model ({_some(unknown)}); {why}")
    why = (
        f"it was made for another model{family}"
        if family
        else ("they are of an unknown layout, or of a model with more layers; the file was not used")
    )
    return AdapterError(
        f"{file} changes {matched + len(unknown)} layers, of which this model has {matched}; unknown layers: "
        f"{_some(unknown)}: {why}"
    )


def _family(entries, metadata: Mapping[str, str]) -> str:
    """Return the file's base model, such as " (Stable Diffusion 1)", if keys, shapes or metadata show it, else ""."""
    for pattern, model in _OTHER_MODELS:
        if any(re.search(pattern, key) for key in entries):
            return f" ({model})"
    for key, entry in entries.items():
        found = split_key(key)
        if found and found[1] == "down" and re.search(r"attn2[._](processor\.)?to_[kv]$", found[0]):
            width = entry.shape[1] if len(entry.shape) > 1 else 0
            if width in _CROSS_WIDTHS:
                return f" ({_CROSS_WIDTHS[width]})"
    said = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture") or ""
    return f" (it says: {said[:80]})" if said and "xl" not in said.lower() else ""


def _announce_embeddings(entries: Iterable[str], path: Path) -> None:
    bundled = sorted({key.removeprefix(BUNDLE).split(".")[0] for key in entries if key.startswith(BUNDLE)})
    if bundled:
        logger.warning(
            "%s also contains the learned embedding %s, which loading a LoRA does not apply; to use it, give "
            "style=DreamStyler(%r%s) and write <%s> in the prompt",
            path.name,
            ", ".join(bundled),
            str(path),
            f", name={values.quoted(bundled[0])}" if len(bundled) > 1 else "",
            bundled[0],
        )


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(key[:100] for key in keys[:3])
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown


class _Digest:
    """A SHA-256 of files, computed beside the reading of their tensors, which takes as long; `value` is its result.

    Leaving the context waits for it, or ends it if an exception is the reason.
    """

    def __init__(self):
        self._digest, self._stopped = hashlib.sha256(), Event()
        self._thread = ThreadPoolExecutor(1)
        self._added: list[Future] = []

    def add(self, file: Path) -> None:
        """Add a file's content, after that of all files before it."""
        self._added.append(self._thread.submit(self._read, file))

    def __enter__(self) -> "_Digest":
        return self

    def __exit__(self, kind, *_):
        if kind is not None:
            self._stopped.set()
        self._thread.shutdown()

    @property
    def value(self) -> str:
        """Return the digest as 64 hex digits. Raises ModelFormatError for a file that could not be read to its end."""
        for added in self._added:
            added.result()
        return self._digest.hexdigest()

    def _read(self, file: Path) -> None:
        try:
            with file.open("rb") as stream:
                while (block := stream.read(2**20)) and not self._stopped.is_set():
                    self._digest.update(block)
        except OSError as error:
            raise ModelFormatError(f"can't read {file.name}: {error.strerror or error}") from error
