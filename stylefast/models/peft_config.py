"""What peft writes beside a LoRA's tensors: alphas, their exceptions per module, and settings that change the meaning.

It stands in `adapter_config.json` in peft's own folders, and in the metadata of files that diffusers writes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stylefast.errors import AdapterError, ModelFormatError
from stylefast.models.lora_changes import Scaling
from stylefast.models.lora_names import PARTS

FILE = "adapter_config.json"
METADATA = "lora_adapter_metadata"
# what decides how training went, or where modules lie, which the tensors' names and shapes say anyway. A linear layer's
# weight is never stored the other way round here, so peft itself sets fan_in_fan_out back
_WITHOUT_EFFECT = {
    "r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
    "fan_in_fan_out", "bias", "modules_to_save", "use_dora", "lora_bias", "task_type", "auto_mapping", "peft_version",
    "base_model_name_or_path", "revision", "inference_mode", "megatron_config", "megatron_core", "qalora_group_size",
    "runtime_config", "eva_config", "loftq_config", "ensure_weight_tying",
}  # fmt: skip
_READ = {"peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights"}
# starting values that leave the base model as it is; others are taken off its weights, which the file does not hold
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_PATTERNS = 2000


@dataclass(frozen=True)
class PeftConfig:
    """The settings of one LoRA, or of one part of it."""

    alpha: float
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)  # pattern of a module's name -> its alpha
    rank_stabilised: bool = False
    part: str | None = None  # that the config says it was trained on

    def scaling(self, module: str) -> Scaling:
        """Give the scaling of a module, called as in the model that was trained."""
        for pattern, alpha in self.alpha_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return Scaling(alpha, self.rank_stabilised)
        return Scaling(self.alpha, self.rank_stabilised)


def read_folder_config(folder: Path) -> PeftConfig:
    """Read a folder's `adapter_config.json`. Raises ModelFormatError if it is damaged, AdapterError as `parse` does."""
    file = folder / FILE
    try:
        given = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFormatError(f"{file} can't be read: {str(error)[:120]}; copy the folder again") from error
    return parse(given, str(file))


def read_metadata(metadata: Mapping[str, str], where: str) -> dict[str, PeftConfig]:
    """Read what diffusers wrote into a file's metadata: part -> config; empty where there is none."""
    if METADATA not in metadata:
        return {}
    try:
        given = json.loads(metadata[METADATA])
        if not isinstance(given, dict):
            raise ValueError("no dictionary")
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{METADATA} of {where} is damaged ({str(error)[:120]}); fetch it again") from error
    parts: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        part, _, name = key.partition(".")
        if part not in PARTS:
            raise AdapterError(f"{METADATA} of {where} speaks of {key[:200]!r}; an SDXL model has {', '.join(PARTS)}")
        parts.setdefault(part, {})[name] = value
    return {part: parse(values, f"{METADATA} of {where}") for part, values in parts.items()}


def parse(given: Any, where: str) -> PeftConfig:
    """Check a config; `where` says in messages where it stands.

    Raises AdapterError for methods other than LoRA and for every setting that is neither done nor without effect,
    ModelFormatError for values of other kinds.
    """
    if not isinstance(given, dict):
        raise ModelFormatError(f"{where} holds a {type(given).__name__}, not a dictionary; copy it again")
    kind = given.get("peft_type") or "LORA"
    if kind != "LORA":
        raise AdapterError(f"{where} says peft_type {str(kind)[:200]!r}; of peft's methods LORA is read")
    for name, value in given.items():
        if name not in _WITHOUT_EFFECT | _READ and value:
            raise AdapterError(f"{where} sets {str(name)[:200]}={str(value)[:200]}, which is not known here; merge the "
                               "adapter into its model with peft, or train without it")  # fmt: skip
    start = given.get("init_lora_weights", True)
    if not isinstance(start, (bool, str, type(None))) or start not in _PLAIN_STARTS:
        raise AdapterError(f"{where} says init_lora_weights={str(start)[:200]!r}, which also changed the base model's "
                           "weights; save it with path_initial_model_for_weight_conversion=")  # fmt: skip
    stabilised = given.get("use_rslora", False)
    if not isinstance(stabilised, bool):
        raise ModelFormatError(f"{where} says use_rslora={str(stabilised)[:200]}; it must be true or false")
    patterns = given.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(patterns) > _PATTERNS:
        raise ModelFormatError(f"alpha_pattern in {where} is no dictionary of at most {_PATTERNS} names")
    checked = {_pattern(key, where): _alpha(value, where) for key, value in patterns.items()}
    # peft's own default, which its files always spell out
    return PeftConfig(_alpha(given.get("lora_alpha", 8), where), checked, stabilised, _trained_part(given))


def _alpha(value, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise ModelFormatError(f"{where} has the alpha {str(value)[:200]}; it must be a finite number")
    return float(value)


def _pattern(text: str, where: str) -> str:
    # a pattern is a module's name or a regular expression; one from a stranger's file must not run for hours
    tame = len(text) <= 300 and not re.search(r"\)[*+?{]", text) and len(re.findall(r"[*+?{]", text)) <= 4
    try:
        re.compile(text)
    except re.error:
        tame = False
    if not tame:
        raise AdapterError(f"alpha_pattern in {where} has {text[:200]!r}; name modules, or use a plain pattern")
    return text


def _trained_part(given: Mapping) -> str | None:
    mapping = given.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return {"UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder",
            "CLIPTextModelWithProjection": "text_encoder_2"}.get(name if isinstance(name, str) else "")  # fmt: skip
