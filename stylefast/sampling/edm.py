"""Models trained with EDM preconditioning (Karras et al. 2022), such as Playground v2.5 and CosXL.

They have no training timesteps: a latent is `z0 + sigma noise` for any sigma, the model receives it scaled by c_in
along with c_noise, and c_skip and c_out turn its output into x0. All four are functions of sigma and of sigma_data,
the standard deviation of clean latents, so these models use the same tables as any other.
"""

import math
from collections.abc import Mapping

import numpy as np

from stylefast.errors import InvalidRequest
from stylefast.values import quoted

EDM_CLASSES = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
# defaults for keys missing from a config of these classes
EDM_DEFAULTS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0}
# samplers that need noise levels only, not timesteps
EDM_SCHEDULERS = (
    "euler",
    "euler_ancestral",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "dpmpp_sde",
)


def is_edm(config: Mapping) -> bool:
    """Return whether a scheduler config in diffusers format is an EDM config."""
    return config.get("_class_name") in EDM_CLASSES


def check_edm(name: str, config: Mapping) -> None:
    """Raise InvalidRequest if EDM models don't support the sampler or the settings yield no valid noise levels."""
    if name not in EDM_SCHEDULERS:
        raise InvalidRequest(
            f"scheduler {quoted(name)} uses a model's training timesteps, but this model ({config['_class_name']}) was "
            f"trained on noise levels instead; choose one of {', '.join(EDM_SCHEDULERS)}"
        )
    if config["prediction_type"] not in ("epsilon", "v_prediction"):
        raise InvalidRequest(
            f"an EDM model with prediction_type {quoted(config['prediction_type'])} is not supported; EDM's "
            "preconditioning supports 'epsilon' and 'v_prediction'"
        )
    settings = _settings(config)
    if settings["sigma_schedule"] not in ("karras", "exponential"):
        raise InvalidRequest(
            f"sigma_schedule {quoted(settings['sigma_schedule'])} is unknown; choose 'karras' or 'exponential'"
        )
    numbers = [settings[key] for key in ("sigma_min", "sigma_max", "sigma_data", "rho")]
    real = all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in numbers)
    if not real or min(numbers) <= 0 or settings["sigma_min"] >= settings["sigma_max"]:
        raise InvalidRequest(
            "an EDM model needs 0 < sigma_min < sigma_max, sigma_data > 0 and rho > 0 in its scheduler config, not "
            f"{', '.join(f'{key}={quoted(settings[key])}' for key in ('sigma_min', 'sigma_max', 'sigma_data', 'rho'))}"
        )


def edm_levels(config: Mapping, steps: int, levels: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return c_noise [steps], the model's time input, and sigmas [steps + 1]: sigma_max to sigma_min, then the end.

    levels: "karras" (with the config's rho) or "exponential", instead of the config's sigma_schedule.
    """
    settings = _settings(config)
    high, low, rho = settings["sigma_max"], settings["sigma_min"], settings["rho"]
    ramp = np.linspace(0.0, 1.0, steps)
    if (levels or settings["sigma_schedule"]) == "karras":
        sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    else:
        sigmas = np.exp(np.log(high) + ramp * (np.log(low) - np.log(high)))
    end = 0.0 if config["final_sigmas_type"] == "zero" else sigmas[-1]
    return 0.25 * np.log(sigmas), np.append(sigmas, end)


def preconditioning(config: Mapping, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return c_in [steps] and (c_skip, c_out) [steps, 2] at noise levels sigmas [steps]."""
    data = _settings(config)["sigma_data"]
    total = sigmas**2 + data**2
    c_out = sigmas * data / np.sqrt(total)
    if config["prediction_type"] == "v_prediction":
        c_out = -c_out
    return 1 / np.sqrt(total), np.stack([data**2 / total, c_out], axis=1)


def init_noise_scale(config: Mapping) -> float:
    """Return the factor for the initial unit noise: the deviation of unit-variance latents plus noise at sigma_max."""
    return math.hypot(_settings(config)["sigma_max"], 1.0)


def _settings(config: Mapping) -> dict:
    return {key: config[key] if config.get(key) is not None else value for key, value in EDM_DEFAULTS.items()}
