"""peft's settings of a LoRA: alphas, their exceptions per module, and options that change the tensors' meaning.

They are in `adapter_config.json` in peft's own folders, and in the metadata of files that diffusers writes.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stylefast import values
from stylefast.errors import AdapterError, ModelFormatError
from stylefast.models.lora_changes import Scaling
from stylefast.models.lora_names import PARTS

FILE = "adapter_config.json"
METADATA = "lora_adapter_metadata"
# settings of training, or of module locations, which the tensors' names and shapes show anyway. These models' linear
# weights are never transposed, so peft itself resets fan_in_fan_out
_WITHOUT_EFFECT = {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "fan_in_fan_out",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "eva_config",
    "loftq_config",
    "ensure_weight_tying",
}
_READ = {"peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights"}
# settings that the tensors must match; a file with missing tensors is incomplete
_COMPARED = {"r", "rank_pattern", "use_dora", "lora_bias", "bias", "modules_to_save"}
_BIASES = ("none", "all", "lora_only")
# initialisations that leave the base model unchanged; others are subtracted from its weights, which the file lacks
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_PATTERNS = 2000


@dataclass(frozen=True)
class PeftConfig:
    """Settings of one LoRA, or of one part of it."""

    alpha: float
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)  # pattern of a module's name -> its alpha
    rank_stabilised: bool = False
    part: str | None = None  # the trained part, if the config names it
    where: str = FILE  # location for messages
    rank: int | None = None  # None: not given
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    decomposed: bool = False
    lora_bias: bool = False
    bias: str = "none"
    saved_modules: tuple[str, ...] = ()

    def scaling(self, module: str) -> Scaling:
        """Return the scaling of a module, given its name in the trained model."""
        pattern = _matching(self.alpha_pattern, module)
        return Scaling(self.alpha if pattern is None else self.alpha_pattern[pattern], self.rank_stabilised)

    def check_module(self, module: str, roles: Collection[str], rank: int) -> None:
        """Raise AdapterError unless the tensors of a module's LoRA match the settings."""
        pattern = _matching(self.rank_pattern, module)
        said = self.rank if pattern is None else self.rank_pattern[pattern]
        if said is not None and said != rank:
            setting = f"r={said}" if pattern is None else f"rank_pattern={values.quoted({pattern: said})}"
            raise self._incomplete(setting, f"the tensors of {module[:200]} have the rank {rank}")
        if self.decomposed and "magnitude" not in roles:
            raise self._incomplete("use_dora=True", f"{module[:200]} has no lora_magnitude_vector")
        if self.lora_bias and "up_bias" not in roles:
            raise self._incomplete("lora_bias=True", f"{module[:200]} has no lora_B.bias")

    def check_whole(self, weights: Collection[str], changed: Collection[str], with_lora: Collection[str]) -> None:
        """Raise AdapterError unless all weights that the settings mark as trained are in `changed`.

        weights: names of the model's weights; with_lora: modules that have a LoRA.
        """
        if self.bias != "none":
            biases = [name for name in weights if name.endswith(".bias")]
            wanted = [name for name in biases if self.bias == "all" or name.removesuffix(".bias") in with_lora]
            self._check_held(f"bias={values.quoted(self.bias)}", wanted, changed)
        for module in self.saved_modules:
            place = re.compile(rf"{re.escape(module)}\.(.*\.)?[^.]+$")
            wanted = [name for name in weights if place.search(name)]
            if not wanted:
                raise self._incomplete(self._saved(), f"neither the model nor the file has {module[:200]}")
            self._check_held(self._saved(), wanted, changed)

    def _check_held(self, setting: str, wanted: Collection[str], changed: Collection[str]) -> None:
        missing = [name for name in wanted if name not in changed]
        if missing:
            raise self._incomplete(setting, f"{len(missing)} of {len(wanted)} such tensors are missing: {missing[0]}")

    def _saved(self) -> str:
        return f"modules_to_save={values.quoted(list(self.saved_modules))}"

    def _incomplete(self, setting: str, found: str) -> AdapterError:
        return AdapterError(
            f"{self.where} has {setting}, but {found}; the adapter is incomplete, or the settings belong to another "
            "one: save it with peft again"
        )


def read_folder_config(folder: Path) -> PeftConfig:
    """Read a folder's `adapter_config.json`. Raises ModelFormatError if it is damaged, AdapterError as `parse` does."""
    file = folder / FILE
    return parse(values.read_json(file, f"{file}: it", kind=dict, error=ModelFormatError), str(file))


def read_metadata(metadata: Mapping[str, str], where: str) -> dict[str, PeftConfig]:
    """Read diffusers' entry in a file's metadata as part -> config, empty without it. Raises as `parse` does."""
    if METADATA not in metadata:
        return {}
    given = values.load_json(metadata[METADATA], f"{METADATA} of {where}", kind=dict, error=ModelFormatError)
    parts: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        part, _, name = key.partition(".")
        if part not in PARTS:
            raise AdapterError(
                f"{METADATA} of {where} mentions {values.quoted(key)}; an SDXL model has {', '.join(PARTS)}"
            )
        parts.setdefault(part, {})[name] = value
    return {part: parse(settings, f"{METADATA} of {where}") for part, settings in parts.items()}


def parse(given: Mapping[str, Any], where: str) -> PeftConfig:
    """Check and parse a config; `where` is its location for messages.

    Raises AdapterError for methods other than LoRA and for unsupported settings that have an effect, ModelFormatError
    for values of the wrong type.
    """
    kind = given.get("peft_type") or "LORA"
    if kind != "LORA":
        raise AdapterError(f"{where} has peft_type {values.quoted(kind)}; of peft's methods only LORA is supported")
    for name, value in given.items():
        if name not in _WITHOUT_EFFECT | _READ | _COMPARED and value:
            raise AdapterError(
                f"{where} sets {name[:200]}={values.quoted(value)}, which is unknown; merge the adapter into its "
                "model with peft, or train without it"
            )
    start = given.get("init_lora_weights", True)
    if not isinstance(start, (bool, str, type(None))) or start not in _PLAIN_STARTS:
        raise AdapterError(
            f"{where} has init_lora_weights={values.quoted(start)}, which also changed the base model; save it with "
            "path_initial_model_for_weight_conversion="
        )
    stabilised = values.flag(f"use_rslora in {where}", given.get("use_rslora", False), error=ModelFormatError)
    decomposed, lora_bias = (
        values.flag(f"{name} in {where}", given.get(name) or False, error=ModelFormatError)
        for name in ("use_dora", "lora_bias")
    )
    saved = values.several(f"modules_to_save in {where}", given.get("modules_to_save") or (), error=ModelFormatError)
    rank = given.get("r")
    return PeftConfig(
        # peft's default; its files always state it
        _alpha(given.get("lora_alpha", 8), where),
        _patterns("alpha_pattern", given, where, _alpha),
        stabilised,
        _trained_part(given),
        where,
        None if rank is None else _rank(rank, where),
        _patterns("rank_pattern", given, where, _rank),
        decomposed,
        lora_bias,
        values.one_of(f"bias in {where}", given.get("bias") or "none", _BIASES, error=ModelFormatError),
        tuple(values.text(f"modules_to_save in {where}", name, empty=False, error=ModelFormatError) for name in saved),
    )


def _alpha(value, where: str) -> float:
    return values.real_number(f"the alpha in {where}", value, error=ModelFormatError)


def _rank(value, where: str) -> int:
    return values.whole_number(f"the rank in {where}", value, 1, error=ModelFormatError)


def _patterns(name: str, given: Mapping[str, Any], where: str, check: Callable[[Any, str], Any]) -> dict[str, Any]:
    patterns = given.get(name) or {}
    if not isinstance(patterns, dict) or len(patterns) > _PATTERNS:
        raise ModelFormatError(f"{name} in {where} is not a dictionary of at most {_PATTERNS} names")
    return {_pattern(key, name, where): check(value, where) for key, value in patterns.items()}


def _matching(patterns: Iterable[str], module: str) -> str | None:
    """Return the first pattern that matches a module, or None."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)


def _pattern(text: str, name: str, where: str) -> str:
    # a pattern is a module's name or a regular expression; limit it, since untrusted expressions could run for hours
    tame = len(text) <= 300 and not re.search(r"\)[*+?{]", text) and len(re.findall(r"[*+?{]", text)) <= 4
    try:
        re.compile(text)
    except re.error:
        tame = False
    if not tame:
        raise AdapterError(f"{name} in {where} has {values.quoted(text)}; name modules, or use a plain pattern")
    return text


def _trained_part(given: Mapping) -> str | None:
    mapping = given.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return {
        "UNet2DConditionModel": "unet",
        "CLIPTextModel": "text_encoder",
        "CLIPTextModelWithProjection": "text_encoder_2",
    }.get(name if isinstance(name, str) else "")
