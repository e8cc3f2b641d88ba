"""Marker keys and metadata of a single file.

`v_pred` and `ztsnr` mark v-prediction and zero terminal SNR, `edm_vpred.*` CosXL's noise levels, and `edm_mean` and
`edm_std` Playground v2.5, whose latents they normalise. Metadata follows the model spec (`modelspec.*`).
"""

import logging
import re
from collections.abc import Mapping

import torch

from stylefast.errors import ModelFormatError
from stylefast.models.config_check import checked_scheduler
from stylefast.models.stored_tensors import StoredTensors
from stylefast.models.weight_files import WeightHeader
from stylefast.values import quoted

logger = logging.getLogger(__name__)

SDXL_SCHEDULER_CONFIG = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
# the authors' sampler settings; CosXL's noise levels are in the file
_PLAYGROUND = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "prediction_type": "epsilon",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
}
_COSXL = {
    "_class_name": "EDMEulerScheduler",
    "prediction_type": "v_prediction",
    "sigma_min": 0.002,
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
}
_PLAYGROUND_SCALING_FACTOR = 0.5
_MARKS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_PARTS = ("model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1.", "first_stage_model.")
# leftovers of training (averaged weights, and the noise schedule, which merges copy from their base), and the marker of
# scaled weights, which `quantised` reads
_LEFT_BEHIND = re.compile(
    r"model_ema\.|denoiser\.|(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|"
    r"lvlb_weights|scale_factor|global_step|state_dict|scaled_fp8)$"
)
_PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}
_ELSE = ("refiner", "inpaint", "edit", "lora", "controlnet", "textual-inversion", "hypernetwork", "locon", "lyco")


def marked_scheduler(header: WeightHeader, given: Mapping | None = None) -> dict:
    """Return the scheduler config given by the file's markers and metadata, with SDXL's values as defaults.

    given: the scheduler config of the caller's config folder, which takes precedence.
    Raises ModelFormatError if the two contradict each other, and for an unknown or unsupported prediction or setting.
    """
    name, metadata = header.path.name, header.metadata
    said = metadata.get("modelspec.prediction_type", metadata.get("modelspec.predict_key"))
    if said is not None and said.lower() not in _PREDICTIONS:
        raise ModelFormatError(
            f"the metadata of {name} declare the prediction type {quoted(said)}; 'epsilon' and 'v' are supported"
        )
    said = None if said is None else _PREDICTIONS[said.lower()]
    marked = _marked(header)
    config = {**SDXL_SCHEDULER_CONFIG, "prediction_type": said or "epsilon"} if marked is None else marked
    if "ztsnr" in header.tensors:
        config["rescale_betas_zero_snr"] = True
    if said not in (None, config["prediction_type"]):
        logger.warning(
            "the metadata of %s say %s, but its keys say %s; the keys are used", name, said, config["prediction_type"]
        )
    if given is None:
        return checked_scheduler(config, name)
    given = checked_scheduler(given, f"the config folder of {name}")
    kinds = [(one["_class_name"].startswith("EDM"), one.get("prediction_type", "epsilon")) for one in (config, given)]
    if (marked or said) and kinds[0] != kinds[1]:
        raise ModelFormatError(
            f"{name} declares {_shown(config)} for sampling, but the scheduler of its config folder has "
            f"{_shown(given)}; remove the folder's scheduler, or correct it"
        )
    return given


def marked_vae(header: WeightHeader) -> dict:
    """Return the changes that the file's markers make to its VAE's config; empty for SDXL's own."""
    if not {"edm_mean", "edm_std"} <= header.tensors.keys():
        return {}
    mean, deviation = (_tensor(header, name).flatten().tolist() for name in ("edm_mean", "edm_std"))
    return {"latents_mean": mean, "latents_std": deviation, "scaling_factor": _PLAYGROUND_SCALING_FACTOR}


def marked_size(header: WeightHeader) -> list[int] | None:
    """Return the training size as [height, width] in latents, if the metadata state it."""
    found = re.fullmatch(r"(\d{2,4})x(\d{2,4})", header.metadata.get("modelspec.resolution", ""))
    if found is None or any(int(side) % 8 for side in found.groups()):
        return None
    width, height = (int(side) // 8 for side in found.groups())
    return [height, width]


def check_marks(header: WeightHeader) -> None:
    """Raise ModelFormatError if the metadata or markers are not a base model's; log ignored settings and tensors."""
    name, metadata = header.path.name, header.metadata
    architecture = metadata.get("modelspec.architecture", "")
    if any(kind in architecture.lower() for kind in _ELSE):
        raise ModelFormatError(
            f"the metadata of {name} call it {quoted(architecture)}; an SDXL base checkpoint is needed"
        )
    if ("edm_mean" in header.tensors) != ("edm_std" in header.tensors):
        raise ModelFormatError(f"{name} has only one of edm_mean and edm_std; it needs both or none")
    layer = metadata.get("modelspec.encoder_layer")
    if layer not in (None, "", "2"):
        logger.warning(
            "%s was trained on the text encoders' layer %s from the end, but is used like SDXL, with the second "
            "from the end",
            name,
            quoted(layer),
        )
    steps = metadata.get("modelspec.timestep_range")
    if steps is not None and re.sub(r"\s", "", steps) not in ("0,1000", "0,999", "0-1000", "0-999", ""):
        logger.warning("%s was trained on the timesteps %s, but is used at all timesteps", name, quoted(steps))
    further = sorted(
        key
        for key in header.tensors
        if not key.startswith(_PARTS) and key not in _MARKS and not _LEFT_BEHIND.match(key)
    )
    if further:
        logger.warning(
            "%s contains %d tensors that belong to no part of SDXL and are left out: %s%s",
            name,
            len(further),
            ", ".join(further[:3])[:200],
            ", ..." if len(further) > 3 else "",
        )


def _marked(header: WeightHeader) -> dict | None:
    # the scheduler config given by the marker keys, None without any
    if "edm_mean" in header.tensors:
        return dict(_PLAYGROUND)
    if "edm_vpred.sigma_max" in header.tensors:
        ends = {
            end: float(_tensor(header, f"edm_vpred.{end}").flatten()[0])
            for end in ("sigma_max", "sigma_min")
            if f"edm_vpred.{end}" in header.tensors
        }
        return _COSXL | ends
    if "v_pred" in header.tensors:
        return {**SDXL_SCHEDULER_CONFIG, "prediction_type": "v_prediction"}
    return None


def _tensor(header: WeightHeader, name: str) -> torch.Tensor:
    return StoredTensors(header.path)[name]


def _shown(config: Mapping) -> str:
    form = " in EDM's form" if config["_class_name"].startswith("EDM") else ""
    return f"{config.get('prediction_type', 'epsilon')}{form}"
