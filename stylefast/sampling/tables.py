"""Coefficients of sampler steps, and helpers to compute them.

Every sampler here is linear in six inputs: the latents, an anchor (the latents from which a step of several evaluations
starts, or UniPC's corrected ones), the x0 of this step and of the two before, and fresh noise. So a step is a 2x6
matrix, and batch rows with different samplers share one update.

Latents of variance-preserving samplers (DDIM, DPM++, UniPC, LCM, TCD) are `alpha z0 + s noise` with
`alpha**2 + s**2 = 1`; those of Euler samplers are `z0 + sigma noise`, `sigma = s / alpha`, and the model receives
`alpha` times that. With EDM models, latents are `z0 + sigma noise` for every sampler.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from stylefast.errors import InvalidRequest
from stylefast.sampling.edm import init_noise_scale, is_edm, preconditioning

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# columns and rows of an update
LATENTS, ANCHOR, X0, PREVIOUS_X0, X0_BEFORE_THAT, NOISE = range(6)
NEXT_LATENTS, NEXT_ANCHOR = range(2)


class Tables(NamedTuple):
    """Tables of a solver, float64; fields as in `schedule.Schedule`."""

    timesteps: np.ndarray  # [steps]
    input_scale: np.ndarray  # [steps]
    denoised: np.ndarray  # [steps, 2]
    update: np.ndarray  # [steps, 2, 6]
    forward: np.ndarray  # [steps + 1, 2]
    init_noise_scale: float = 1.0


def exploding(config: Mapping, timesteps: np.ndarray, sigmas: np.ndarray, update: np.ndarray) -> Tables:
    """Return a variance-exploding sampler's tables; timesteps [steps], sigmas [steps + 1], update [steps, 2, 6]."""
    forward = np.stack([np.ones_like(sigmas), sigmas], axis=1)
    if is_edm(config):
        return Tables(timesteps, *preconditioning(config, sigmas[:-1]), update, forward, init_noise_scale(config))
    alpha, s = alpha_s(sigmas[:-1])
    x0 = denoised(config, alpha, s)
    # these latents are 1 / alpha times the variance-preserving ones
    x0[:, 0] *= alpha
    peak = sigmas.max()
    init = peak if config["timestep_spacing"] in ("linspace", "trailing") else np.sqrt(peak**2 + 1)
    return Tables(timesteps, alpha, x0, update, forward, float(init))


def preserving(config: Mapping, timesteps: np.ndarray, sigmas: np.ndarray, update: np.ndarray) -> Tables:
    """Return a variance-preserving sampler's tables; timesteps [steps], sigmas [steps + 1], update [steps, 2, 6].

    If a step reads the anchor, it must hold latents of the step before.
    """
    alpha, s = alpha_s(sigmas)
    if is_edm(config):
        # rewrite the steps for latents that are not scaled by alpha
        update = update.copy()
        update[:, NEXT_LATENTS] /= alpha[1:, None]
        update[:, NEXT_LATENTS, LATENTS] *= alpha[:-1]
        update[1:, NEXT_LATENTS, ANCHOR] *= alpha[:-2]
        return exploding(config, timesteps, sigmas, update)
    x0 = denoised(config, alpha[:-1], s[:-1])
    return Tables(timesteps, np.ones(len(timesteps)), x0, update, np.stack([alpha, s], axis=1))


def denoised(config: Mapping, alpha: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Return the coefficients [steps, 2] that give x0 from (variance-preserving latents, model output).

    Raises InvalidRequest for epsilon prediction at a timestep without signal.
    """
    kind = config["prediction_type"]
    if kind == "epsilon":
        if np.any(alpha == 0):
            raise InvalidRequest(
                "the first timestep has no signal (rescale_betas_zero_snr), so epsilon prediction can't be turned "
                "into a picture there; use a v_prediction model, or spacing='leading'"
            )
        return np.stack([1 / alpha, -s / alpha], axis=1)
    if kind == "v_prediction":
        return np.stack([alpha, -s], axis=1)
    return np.stack([np.zeros_like(alpha), np.ones_like(alpha)], axis=1)


def forward_of(abar: np.ndarray) -> np.ndarray:
    """Return the coefficients [steps + 1, 2] of (z0, noise) at the levels `abar` [steps + 1]."""
    return np.stack([np.sqrt(abar), np.sqrt(1 - abar)], axis=1)


def alpha_s(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (alpha, s) of the noise levels `sigmas`; same shape."""
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    return alpha, sigmas * alpha


def log_ratio(sigma_from: float, sigma_to: float) -> float:
    """Return the step h in log(alpha / s) from one noise level to a lower one."""
    return float(np.log(sigma_from) - np.log(sigma_to))
