"""What peft writes beside a LoRA's tensors: alphas, their exceptions per module, and settings that change the meaning.

It stands in `adapter_config.json` in peft's own folders, and in the metadata of files that diffusers writes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stylefast import values
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
    return parse(values.read_json(file, f"{file}: it", kind=dict, error=ModelFormatError), str(file))


def read_metadata(metadata: Mapping[str, str], where: str) -> dict[str, PeftConfig]:
    """Read what diffusers wrote into a file's metadata: part -> config; empty where there is none."""
    if METADATA not in metadata:
        return {}
    given = values.load_json(metadata[METADATA], f"{METADATA} of {where}", kind=dict, error=ModelFormatError)
    parts: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        part, _, name = key.partition(".")
        if part not in PARTS:
            raise AdapterError(
                f"{METADATA} of {where} speaks of {values.quoted(key)}; an SDXL model has {', '.join(PARTS)}"
            )
        parts.setdefault(part, {})[name] = value
    return {part: parse(settings, f"{METADATA} of {where}") for part, settings in parts.items()}


def parse(given: Mapping[str, Any], where: str) -> PeftConfig:
    """Check a config; `where` says in messages where it stands.

    Raises AdapterError for methods other than LoRA and for every setting that is neither done nor without effect,
    ModelFormatError for values of other kinds.
    """
    kind = given.get("peft_type") or "LORA"
    if kind != "LORA":
        raise AdapterError(f"{where} says peft_type {values.quoted(kind)}; of peft's methods LORA is read")
    for name, value in given.items():
        if name not in _WITHOUT_EFFECT | _READ and value:
            raise AdapterError(f"{where} sets {name[:200]}={values.quoted(value)}, which is not known here; merge the "
                               "adapter into its model with peft, or train without it")  # fmt: skip
    start = given.get("init_lora_weights", True)
    if not isinstance(start, (bool, str, type(None))) or start not in _PLAIN_STARTS:
        raise AdapterError(f"{where} says init_lora_weights={values.quoted(start)}, which also changed the base model; "
                           "save it with path_initial_model_for_weight_conversion=")  # fmt: skip
    stabilised = values.flag(f"use_rslora in {where}", given.get("use_rslora", False), error=ModelFormatError)
    patterns = given.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(patterns) > _PATTERNS:
        raise ModelFormatError(f"alpha_pattern in {where} is no dictionary of at most {_PATTERNS} names")
    checked = {_pattern(key, where): _alpha(value, where) for key, value in patterns.items()}
    # peft's own default, which its files always spell out
    return PeftConfig(_alpha(given.get("lora_alpha", 8), where), checked, stabilised, _trained_part(given))


def _alpha(value, where: str) -> float:
    return values.real_number(f"the alpha in {where}", value, error=ModelFormatError)


def _pattern(text: str, where: str) -> str:
    # a pattern is a module's name or a regular expression; one from a stranger's file must not run for hours
    tame = len(text) <= 300 and not re.search(r"\)[*+?{]", text) and len(re.findall(r"[*+?{]", text)) <= 4
    try:
        re.compile(text)
    except re.error:
        tame = False
    if not tame:
        raise AdapterError(f"alpha_pattern in {where} has {values.quoted(text)}; name modules, or use a plain pattern")
    return text


def _trained_part(given: Mapping) -> str | None:
    mapping = given.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return {"UNet2DConditionModel": "unet", "CLIPTextModel": "text_encoder",
            "CLIPTextModelWithProjection": "text_encoder_2"}.get(name if isinstance(name, str) else "")  # fmt: skip
