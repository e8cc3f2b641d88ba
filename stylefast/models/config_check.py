"""Checks of a model's configs against `statements`: each setting is supported, rejected by name, or irrelevant."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from stylefast.errors import ModelFormatError
from stylefast.models.statements import (
    DISTILLED,
    EDM,
    EDM_SCHEDULERS,
    FEATURE_EXTRACTOR,
    IMAGE_ENCODER,
    MODEL_INDEX,
    OPTIONAL_PARTS,
    PART_CLASSES,
    PARTS,
    PIPELINES,
    SCHEDULER,
    TEXT_ENCODER,
    TINY_VAE,
    TOKENIZER,
    UNET,
    VAE,
    VP_SCHEDULERS,
    Rules,
)
from stylefast.sampling.noise_levels import alphas_cumprod
from stylefast.values import quoted, shown

logger = logging.getLogger(__name__)

# defaults of diffusers' schedulers for keys missing from a config; for other keys, sampling uses SDXL's values
_MISSING = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
_SDXL_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_DDIM = {"timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": True}
_DDPM = {"timestep_spacing": "leading", "clip_sample": True}
_LCM = {**_SDXL_BETAS, "beta_schedule": "scaled_linear", "timestep_spacing": "leading", "set_alpha_to_one": True}
_MISSING_IN: Mapping[str, Mapping[str, Any]] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "PNDMScheduler": {"timestep_spacing": "leading"},
    "HeunDiscreteScheduler": _SDXL_BETAS,
    "KDPM2DiscreteScheduler": _SDXL_BETAS,
    "KDPM2AncestralDiscreteScheduler": _SDXL_BETAS,
    "DPMSolverSDEScheduler": _SDXL_BETAS,
    "LCMScheduler": _LCM,
    "TCDScheduler": _LCM,
}
_DDPM_KIND = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler")
# classes whose steps clip x0 if their config says so
_CLIP_KEYS: Mapping[str, tuple[str, ...]] = {
    "clip_sample": (*_DDPM_KIND, "HeunDiscreteScheduler", "LCMScheduler"),
    "thresholding": (
        *_DDPM_KIND,
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
        "SASolverScheduler",
        "LCMScheduler",
        "EDMDPMSolverMultistepScheduler",
    ),
}
# keys that EDM classes read; others in their configs are left over from other schedulers
_EDM_READS = (
    "num_train_timesteps",
    "prediction_type",
    "sigma_min",
    "sigma_max",
    "final_sigmas_type",
    "thresholding",
    "lower_order_final",
    "euler_at_final",
    *EDM,
)

_EDM_ENDS = {"sigma_min": 0.002, "sigma_max": 80.0}  # defaults


def checked_scheduler(config: Mapping, what: str, file: str = "scheduler/scheduler_config.json") -> dict[str, Any]:
    """Return a supported scheduler config with missing keys set to diffusers' defaults.

    what: the model's name in messages. file: where to edit the config, for messages.
    Raises ModelFormatError for an unsupported scheduler or setting.
    """
    config = _mapping(config, f"the scheduler config of {what}")
    name = config.get("_class_name")
    if name not in (*VP_SCHEDULERS, *EDM_SCHEDULERS):
        raise ModelFormatError(
            f"the scheduler of {what} is {quoted(name)}{_kind_of(name)}; models that are sampled with timesteps "
            f"({', '.join(VP_SCHEDULERS[:3])}, ...) or in EDM's form ({' or '.join(EDM_SCHEDULERS)}) are supported"
        )
    edm = name in EDM_SCHEDULERS
    filled = {**({} if edm else {**_MISSING, **_MISSING_IN.get(name, {})}), **config, "_class_name": name}
    unread = {key for key in filled if edm and key in SCHEDULER and key not in _EDM_READS}
    unread |= {key for key, classes in _CLIP_KEYS.items() if name not in classes}
    rules: Rules = {**SCHEDULER, **EDM} if edm else SCHEDULER
    check_config(rules, filled, f"the scheduler ({name}) of {what}", file, unread=unread)
    if edm and config.get("prediction_type", "epsilon") == "sample":
        raise ModelFormatError(
            f"the scheduler ({name}) of {what} has prediction_type='sample', but EDM's preconditioning supports "
            "epsilon and v_prediction"
        )
    _check_levels(filled, f"the scheduler ({name}) of {what}", edm)
    if name in DISTILLED:
        logger.warning(
            "%s comes with %s: it was distilled to a few steps and needs requests with scheduler=%r",
            what,
            name,
            DISTILLED[name],
        )
    return filled


def check_unet(config: Mapping, what: str) -> None:
    """Raise ModelFormatError for a UNet config with unsupported settings."""
    _check_class(config, ("UNet2DConditionModel",), f"the UNet of {what}")
    check_config(UNET, config, f"the UNet of {what}", "unet/config.json")


def check_vae(config: Mapping, what: str, latent_channels: int | None = None) -> None:
    """Raise ModelFormatError for a VAE config with unsupported settings, or with other latents than the UNet's."""
    config = _mapping(config, f"the VAE config of {what}")
    tiny = config.get("_class_name") == "AutoencoderTiny"
    check_config(TINY_VAE if tiny else VAE, config, f"the VAE of {what}", "vae/config.json")
    channels = config.get("latent_channels", 4)
    if latent_channels is not None and channels != latent_channels:
        raise ModelFormatError(
            f"the VAE has {quoted(channels)} latent channels, the UNet {latent_channels}; use a VAE for SDXL"
        )
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (deviation is None):
        raise ModelFormatError(f"the VAE of {what} has only one of latents_mean and latents_std; it needs both or none")
    for name, values in (("latents_mean", mean), ("latents_std", deviation)):
        if values is not None and (not _numbers(values) or len(values) != channels):
            raise ModelFormatError(
                f"the VAE of {what} has {name}={quoted(values)}; it must be {channels} numbers, one for each channel"
            )
    if deviation is not None and min(deviation) <= 0:
        raise ModelFormatError(f"the VAE of {what} has latents_std={quoted(deviation)}; deviations must be above 0")
    scale = config.get("scaling_factor", 1.0)
    if not _numbers([scale]) or scale <= 0:
        raise ModelFormatError(f"the VAE of {what} has scaling_factor={quoted(scale)}; it must be a number above 0")


def check_text_encoder(config: Mapping, what: str) -> None:
    """Raise ModelFormatError for a text encoder other than CLIP's."""
    check_config(TEXT_ENCODER, config, what, "its config.json", strict=False)


def check_image_encoder(config: Mapping, what: str) -> None:
    """Raise ModelFormatError for an image encoder other than CLIP's."""
    check_config(IMAGE_ENCODER, config, what, "its config.json", strict=False)


def check_tokenizer(config: Mapping, what: str) -> None:
    """Raise ModelFormatError for a tokenizer that is not CLIP's or that tokenizes differently."""
    check_config(TOKENIZER, config, what, "its tokenizer_config.json", strict=False)


def check_feature_extractor(config: Mapping, what: str) -> None:
    """Raise ModelFormatError for an image processor that prepares pictures differently from CLIP's."""
    check_config(FEATURE_EXTRACTOR, config, what, "its preprocessor_config.json", strict=False)


def check_model_index(index: Mapping, what: str, given: tuple[str, ...] = ()) -> None:
    """Raise ModelFormatError for a pipeline of another kind, or one with unsupported parts.

    given: parts that the caller provides, so that their entries are not checked.
    """
    index = _mapping(index, f"model_index.json of {what}")
    _check_class(index, PIPELINES, what)
    for key, value in index.items():
        if key in PARTS:
            if key not in given:
                _check_part(key, value, what)
            continue
        if key not in MODEL_INDEX and isinstance(value, (list, tuple)):
            if value == [None, None]:
                continue
            raise ModelFormatError(
                f"{what} has a part {quoted(key)} ({quoted(value[-1] if value else value)}) that is not supported and "
                "would be left out; use a pipeline without it, or remove the part from model_index.json"
            )
        check_config(MODEL_INDEX, {key: value}, what, "model_index.json")


def indexed_scheduler(index: Mapping, config: Mapping, what: str) -> dict[str, Any]:
    """Return a folder's scheduler config with the class named in model_index.json, as diffusers loads it.

    Raises ModelFormatError if the two files differ and the index names an unsupported class.
    """
    config, named = dict(_mapping(config, f"the scheduler config of {what}")), index.get("scheduler")
    if named is None:
        return config
    kind, own = named[-1], config.get("_class_name")
    if own not in (None, kind):
        if kind not in (*VP_SCHEDULERS, *EDM_SCHEDULERS):
            raise ModelFormatError(
                f"model_index.json of {what} names the scheduler {quoted(kind)}{_kind_of(kind)}, which is not "
                f"supported, but scheduler/scheduler_config.json names {quoted(own)}; correct the wrong one"
            )
        logger.warning(
            "model_index.json of %s names the scheduler %s, but scheduler/scheduler_config.json names %s; the "
            "first is used, as in diffusers",
            what,
            kind,
            quoted(own),
        )
    return {**config, "_class_name": kind}


def _check_part(key: str, value: Any, what: str) -> None:
    """Raise ModelFormatError for a part of model_index.json that is missing or of another class."""
    known = PART_CLASSES.get(key)  # a scheduler's class is checked together with its config
    library = "diffusers" if key in ("unet", "vae", "scheduler") else "transformers"
    example = quoted([library, (known or VP_SCHEDULERS)[0]])
    if value in (None, [None, None]):
        if key not in OPTIONAL_PARTS:
            raise ModelFormatError(
                f"model_index.json of {what} has {key}={quoted(value)}, but an SDXL model needs this part; write "
                f"its library and class there, such as {example}"
            )
        return
    pair = isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(one, str) for one in value)
    if not pair or value[0] not in ("diffusers", "transformers") or (known is not None and value[1] not in known):
        raise ModelFormatError(
            f"model_index.json of {what} has {key}={quoted(value)}, but only parts such as {example} are supported; "
            "correct it if it is wrong"
        )


def check_config(
    rules: Rules, config: Mapping, what: str, file: str, *, strict: bool = True, unread: frozenset | set = frozenset()
) -> None:
    """Check the keys of a config, except private ones and `unread`, against `rules`.

    Keys without a rule are rejected unless switched off (null, false or empty); with strict=False, for configs from
    which a library builds its own modules, they are only logged.

    Raises ModelFormatError.
    """
    for key, value in _mapping(config, f"the config of {what}").items():
        if str(key).startswith("_") or key in unread:
            continue
        rule = rules.get(key)
        if rule is None:
            if value in (None, False, "", [], {}, ()):
                continue
            said = f"{what} has {shown(key)}={quoted(value)}, which is unknown to stylefast and may change its pictures"
            if strict:
                raise ModelFormatError(f"{said}; if it does not, remove it from {file}")
            logger.warning("%s; the library that builds the part handles it", said)
        elif not rule.takes(value):
            needed = rule.kind or " or ".join(map(repr, rule.allowed or ()))
            raise ModelFormatError(
                f"{what} has {key}={quoted(value)}, but it must be {needed} to be supported ({rule.why}); see {file}"
            )


def _check_levels(config: Mapping, what: str, edm: bool) -> None:
    """Raise ModelFormatError for noise levels that don't rise or are out of range."""
    low, high = (config.get(key, _EDM_ENDS[key] if edm else None) for key in ("sigma_min", "sigma_max"))
    if low is not None and high is not None and low >= high:
        raise ModelFormatError(
            f"{what} has sigma_min={quoted(low)} and sigma_max={quoted(high)}; the first must be smaller"
        )
    if edm:
        return
    betas = config.get("trained_betas")
    if betas is not None:
        _check_betas(betas, config, what)
    elif config["beta_schedule"] != "squaredcos_cap_v2" and config["beta_start"] >= config["beta_end"]:
        raise ModelFormatError(
            f"{what} has beta_start={quoted(config['beta_start'])} and beta_end={quoted(config['beta_end'])}; the "
            "first must be smaller"
        )
    over = (alphas_cumprod(config)[:-1] == 0).sum()
    if over:
        raise ModelFormatError(
            f"{what} has noise levels of which {over} before the last one leave nothing of the picture; correct its "
            "betas or num_train_timesteps"
        )


def _check_betas(betas, config: Mapping, what: str) -> None:
    if len(betas) != config["num_train_timesteps"]:
        raise ModelFormatError(
            f"{what} has {len(betas)} trained_betas for {config['num_train_timesteps']} num_train_timesteps; the "
            "counts must be equal"
        )
    # with zero terminal SNR the last beta is 1
    rising = betas[:-1] if config.get("rescale_betas_zero_snr") and betas[-1] == 1 else betas
    odd = next((i for i, beta in enumerate(rising) if not 0 < beta < 1), None)
    if odd is not None:
        raise ModelFormatError(
            f"{what} has {quoted(betas[odd])} as number {odd} of its trained_betas; each must be above 0 and below 1"
        )


def _check_class(config: Mapping, known: tuple[str, ...], what: str) -> None:
    name = _mapping(config, what).get("_class_name")
    if name is not None and name not in known:
        raise ModelFormatError(f"{what} is of the class {quoted(name)}; {' or '.join(known)} is supported")


def _kind_of(name) -> str:
    return " (flow matching)" if isinstance(name, str) and name.startswith("Flow") else ""


def _mapping(config, what: str) -> Mapping:
    if not isinstance(config, Mapping):
        raise ModelFormatError(f"{what} contains {quoted(config)}, but must be an object")
    # configs in memory may hold arrays and tensors; convert them to lists, as in JSON
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in config.items()}


def _numbers(values) -> bool:
    return isinstance(values, (list, tuple)) and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in values
    )
