"""Timesteps and noise levels visited by a sampler."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from stylefast import values
from stylefast.errors import InvalidRequest
from stylefast.sampling.edm import edm_levels, is_edm
from stylefast.sampling.noise_levels import training_sigmas

SPACINGS = ("leading", "linspace", "trailing")

# noise level spacings that replace the levels of evenly spaced timesteps
KARRAS, EXPONENTIAL = "karras", "exponential"
_RHO = 7.0  # as in Karras et al. 2022


def spaced_timesteps(config: Mapping, steps: int, *, open_end: bool, fractional: bool = False) -> np.ndarray:
    """Return a sampler's timesteps, descending, [steps] float64 (Lin et al. 2024, Table 2).

    open_end: space steps + 1 points and drop the last one (multistep solvers) instead of visiting it.
    fractional: keep the fractions that "linspace" yields instead of rounding.

    Raises InvalidRequest for an unknown spacing, or if timesteps would leave the training range.
    """
    total, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    points = steps + 1 if open_end else steps
    if spacing == "linspace":
        timesteps = np.linspace(0, total - 1, points)[::-1][:steps]
        timesteps = timesteps if fractional else timesteps.round()
    elif spacing == "leading":
        timesteps = np.arange(points)[::-1][:steps] * float(total // points) + config["steps_offset"]
    elif spacing == "trailing":
        # for some counts the quotient rounds down and arange yields an extra point, -1, which the slice drops
        timesteps = np.arange(total, 0, -total / steps)[:steps].round() - 1
    else:
        raise InvalidRequest(
            f"timestep spacing {values.quoted(spacing)} is unknown; choose one of {', '.join(SPACINGS)}"
        )
    if timesteps[0] > total - 1:
        raise InvalidRequest(
            f"{steps} steps with {values.quoted(spacing)} spacing and steps_offset {config['steps_offset']} start at "
            f"timestep {timesteps[0]:g}, beyond the last trained one, {total - 1}; use fewer steps or "
            "spacing='trailing'"
        )
    return timesteps


def karras_sigmas(config: Mapping, first: float, last: float, steps: int) -> np.ndarray:
    """Return noise levels spaced as in Karras et al. 2022, Eq. 5, from `first` down to `last`: [steps] float64.

    `sigma_max` and `sigma_min` of the config take precedence over `first` and `last`.
    """
    high = config["sigma_max"] if config["sigma_max"] is not None else first
    low = config["sigma_min"] if config["sigma_min"] is not None else last
    ramp = np.linspace(0.0, 1.0, steps)
    high, low = float(high), float(low)
    return (high ** (1 / _RHO) + ramp * (low ** (1 / _RHO) - high ** (1 / _RHO))) ** _RHO


def timesteps_of(sigmas: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Return the fractional timesteps of the noise levels `sigmas`, interpolated in log sigma; same shape.

    trained: ascending sigmas of the training timesteps; their logarithms are rounded to its dtype.
    """
    logs = np.log(trained.astype(np.float64)).astype(trained.dtype)
    return np.interp(np.log(sigmas), logs, np.arange(len(trained)))


def exponential_sigmas(config: Mapping, first: float, last: float, steps: int) -> np.ndarray:
    """Return noise levels evenly spaced in log sigma, from `first` down to `last`: [steps] float64.

    `sigma_max` and `sigma_min` of the config take precedence over `first` and `last`.
    """
    high = config["sigma_max"] if config["sigma_max"] is not None else first
    low = config["sigma_min"] if config["sigma_min"] is not None else last
    return np.exp(np.linspace(np.log(float(high)), np.log(float(low)), steps))


def euler_levels(
    config: Mapping, steps: int, levels: str | None, given: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return timesteps [steps] and sigmas [steps + 1] of the Euler samplers.

    levels: KARRAS, EXPONENTIAL or None. given: explicit timesteps [steps], only with levels None.
    """
    _check_final_sigma(config)
    if is_edm(config):
        return edm_levels(config, steps, levels)
    trained = training_sigmas(config)
    timesteps = given if given is not None else spaced_timesteps(config, steps, open_end=False, fractional=True)
    sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    if levels is not None:
        sigmas = _spread(config, levels, sigmas[0], sigmas[-1], steps)
        timesteps = timesteps_of(sigmas, trained)
    return timesteps.astype(np.float64), np.append(sigmas, _final_sigma(config, trained[0]))


def multistep_levels(
    config: Mapping, steps: int, levels: str | None, given: np.ndarray | None, *, round_karras: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return timesteps [steps] and sigmas [steps + 1] of DPM++ and UniPC; unlike Euler, `levels` span all trained ones.

    With `levels`, timesteps are made whole: rounded for Karras levels with `round_karras`, else truncated.

    Raises InvalidRequest if two steps would share a noise level.
    """
    _check_final_sigma(config)
    if is_edm(config):
        return edm_levels(config, steps, levels)
    trained = training_sigmas(config)
    if levels is None:
        timesteps = given if given is not None else spaced_timesteps(config, steps, open_end=True)
        sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
        last = trained[0]
    elif levels == KARRAS and round_karras:
        sigmas = _spread(config, levels, trained[-1], trained[0], steps)
        timesteps = timesteps_of(sigmas, trained).round()
        last = sigmas[-1]
    else:
        # rounding errors decide whether the noisiest level truncates to the last timestep; shared seeds depend on
        # the float32 result
        rounded = training_sigmas(config, np.float32)
        sigmas = _spread(config, levels, rounded[-1], rounded[0], steps)
        timesteps = np.floor(timesteps_of(sigmas, rounded))
        last = sigmas[-1]
    if np.any(np.diff(sigmas) >= 0):
        raise InvalidRequest(
            f"{steps} steps with {values.quoted(config['timestep_spacing'])} spacing repeat a timestep, which "
            "multistep samplers don't support; use fewer steps or spacing='trailing'"
        )
    return timesteps.astype(np.float64), np.append(sigmas, _final_sigma(config, last))


def check_timesteps(timesteps: Sequence[int], steps: int, total: int) -> np.ndarray:
    """Return explicit timesteps as [steps] int64.

    Raises InvalidRequest unless they are `steps` whole numbers, strictly descending, within 0..total - 1.
    """
    given = timesteps.tolist() if isinstance(timesteps, (np.ndarray, torch.Tensor)) else timesteps
    given = [values.whole_number("timesteps", t, 0, total - 1) for t in values.several("timesteps", given)]
    if len(given) != steps:
        raise InvalidRequest(f"{len(given)} timesteps were given for {steps} steps; the counts must be equal")
    if any(later >= earlier for earlier, later in zip(given, given[1:])):
        raise InvalidRequest(f"timesteps must be strictly decreasing, not {values.quoted(given)}")
    return np.array(given, dtype=np.int64)


def _spread(config: Mapping, levels: str, first: float, last: float, steps: int) -> np.ndarray:
    # [steps] float64
    return (karras_sigmas if levels == KARRAS else exponential_sigmas)(config, first, last, steps)


def _final_sigma(config: Mapping, smallest: float) -> float:
    return 0.0 if config["final_sigmas_type"] == "zero" else smallest


def _check_final_sigma(config: Mapping) -> None:
    kind = config["final_sigmas_type"]
    if kind not in ("zero", "sigma_min"):
        raise InvalidRequest(f"final_sigmas_type {values.quoted(kind)} is unknown; choose 'zero' or 'sigma_min'")
