"""The coefficients of a sampler's steps, and what every sampler needs to write them down.

Every sampler here is linear in six things: the latents, an anchor (the latents that a step of several evaluations
starts from, or UniPC's corrected ones), this step's x0, those of the last step and of the one before, and fresh noise.
So a step is a 2x6 matrix, and rows of a batch under different samplers share one update.

Variance-preserving samplers (DDIM, DPM++, UniPC, LCM, TCD) hold `alpha z0 + s noise` with `alpha**2 + s**2 = 1`; Euler
samplers hold `z0 + sigma noise`, `sigma = s / alpha`, and show the model `alpha` times that. Models of EDM's kind are
always held as `z0 + sigma noise`, whatever the sampler.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from stylefast.errors import InvalidRequest
from stylefast.sampling.edm import init_noise_scale, is_edm, preconditioning

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# columns of an update, and its rows
LATENTS, ANCHOR, X0, PREVIOUS_X0, X0_BEFORE_THAT, NOISE = range(6)
NEXT_LATENTS, NEXT_ANCHOR = range(2)


class Tables(NamedTuple):
    """What a solver returns, float64; meanings as in `schedule.Schedule`."""

    timesteps: np.ndarray  # [steps]
    input_scale: np.ndarray  # [steps]
    denoised: np.ndarray  # [steps, 2]
    update: np.ndarray  # [steps, 2, 6]
    forward: np.ndarray  # [steps + 1, 2]
    init_noise_scale: float = 1.0


def exploding(config: Mapping, timesteps: np.ndarray, sigmas: np.ndarray, update: np.ndarray) -> Tables:
    """Tables of a variance-exploding sampler; timesteps [steps], sigmas [steps + 1], update [steps, 2, 6]."""
    forward = np.stack([np.ones_like(sigmas), sigmas], axis=1)
    if is_edm(config):
        return Tables(timesteps, *preconditioning(config, sigmas[:-1]), update, forward, init_noise_scale(config))
    alpha, s = alpha_s(sigmas[:-1])
    x0 = denoised(config, alpha, s)
    # the latents are 1 / alpha times the variance-preserving ones
    x0[:, 0] *= alpha
    peak = sigmas.max()
    init = peak if config["timestep_spacing"] in ("linspace", "trailing") else np.sqrt(peak**2 + 1)
    return Tables(timesteps, alpha, x0, update, forward, float(init))


def preserving(config: Mapping, timesteps: np.ndarray, sigmas: np.ndarray, update: np.ndarray) -> Tables:
    """Tables of a variance-preserving sampler; timesteps [steps], sigmas [steps + 1], update [steps, 2, 6].

    The anchor, where a step reads one, holds the latents of the step before.
    """
    alpha, s = alpha_s(sigmas)
    if is_edm(config):
        # the same steps between latents that are not scaled by alpha
        update = update.copy()
        update[:, NEXT_LATENTS] /= alpha[1:, None]
        update[:, NEXT_LATENTS, LATENTS] *= alpha[:-1]
        update[1:, NEXT_LATENTS, ANCHOR] *= alpha[:-2]
        return exploding(config, timesteps, sigmas, update)
    x0 = denoised(config, alpha[:-1], s[:-1])
    return Tables(timesteps, np.ones(len(timesteps)), x0, update, np.stack([alpha, s], axis=1))


def denoised(config: Mapping, alpha: np.ndarray, s: np.ndarray) -> np.ndarray:
    """[steps, 2]: x0 from variance-preserving latents and the model's output.

    Raises InvalidRequest where an epsilon prediction meets a timestep without signal.
    """
    kind = config["prediction_type"]
    if kind == "epsilon":
        if np.any(alpha == 0):
            raise InvalidRequest(
                "the first timestep holds no signal (rescale_betas_zero_snr), so epsilon prediction can't be turned "
                "into a picture there; use a v_prediction model, or spacing='leading'"
            )
        return np.stack([1 / alpha, -s / alpha], axis=1)
    if kind == "v_prediction":
        return np.stack([alpha, -s], axis=1)
    return np.stack([np.zeros_like(alpha), np.ones_like(alpha)], axis=1)


def forward_of(abar: np.ndarray) -> np.ndarray:
    """[steps + 1, 2]: coefficients of (z0, noise) at the levels `abar` [steps + 1]."""
    return np.stack([np.sqrt(abar), np.sqrt(1 - abar)], axis=1)


def alpha_s(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, s) of the noise levels `sigmas`; same shape."""
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    return alpha, sigmas * alpha


def log_ratio(sigma_from: float, sigma_to: float) -> float:
    """The step h in log(alpha / s) from one noise level to a lower one."""
    return float(np.log(sigma_from) - np.log(sigma_to))
