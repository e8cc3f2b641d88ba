"""First-order samplers: DDIM, Euler and Euler ancestral."""

from collections.abc import Mapping

import numpy as np

from stylefast.sampling.noise_levels import alphas_cumprod
from stylefast.sampling.spacing import spaced_timesteps
from stylefast.sampling.tables import LATENTS, NEXT_LATENTS, NOISE, X0, Tables, denoised, exploding, forward_of


def ddim(config: Mapping, steps: int, eta: float) -> Tables:
    """Build the tables of DDIM (Song et al. 2021), Eq. 12 and 16; eta 0 is deterministic, 1 is DDPM ancestral sampling.

    The step length is always `num_train_timesteps // steps`, even if the spacing rounds to other distances: published
    samplers do the same, and shared seeds depend on it.
    """
    trained = alphas_cumprod(config)
    timesteps = spaced_timesteps(config, steps, open_end=False)
    now = timesteps.astype(np.int64)
    then = now - config["num_train_timesteps"] // steps
    final = 1.0 if config["set_alpha_to_one"] else trained[0]
    abar = trained[now]
    abar_then = np.where(then >= 0, trained[np.maximum(then, 0)], final)

    alpha, s = np.sqrt(abar), np.sqrt(1 - abar)
    variance = (1 - abar_then) / (1 - abar) * (1 - abar / abar_then)
    deviation = eta * np.sqrt(np.maximum(variance, 0.0))
    # substituting noise = (latents - alpha x0) / s into Eq. 12 avoids a small divisor at the clean end
    direction = np.sqrt(np.maximum(1 - abar_then - deviation**2, 0.0)) / s
    update = np.zeros((steps, 2, 6))
    update[:, NEXT_LATENTS, LATENTS] = direction
    update[:, NEXT_LATENTS, X0] = np.sqrt(abar_then) - direction * alpha
    update[:, NEXT_LATENTS, NOISE] = deviation
    forward = forward_of(np.append(abar, abar_then[-1]))
    return Tables(timesteps, np.ones(steps), denoised(config, alpha, s), update, forward)


def euler(config: Mapping, timesteps: np.ndarray, sigmas: np.ndarray) -> Tables:
    """Build the tables of Euler's method on the probability-flow ODE (Karras et al. 2022, Alg. 1, first order only).

    timesteps [steps], sigmas [steps + 1], from `spacing.euler_levels`.
    """
    update = np.zeros((len(timesteps), 2, 6))
    # latents + (latents - x0) / sigma * (sigma' - sigma)
    ratio = sigmas[1:] / sigmas[:-1]
    update[:, NEXT_LATENTS, LATENTS] = ratio
    update[:, NEXT_LATENTS, X0] = 1 - ratio
    return exploding(config, timesteps, sigmas, update)


def euler_ancestral(config: Mapping, timesteps: np.ndarray, sigmas: np.ndarray) -> Tables:
    """Build the tables of ancestral Euler: a step to sigma_down, then fresh noise of sigma_up.

    sigma_down**2 + sigma_up**2 = sigma'**2, sigma' being the next level. timesteps [steps], sigmas [steps + 1], from
    `spacing.euler_levels`.
    """
    now, then = sigmas[:-1], sigmas[1:]
    up = then * np.sqrt(now**2 - then**2) / now
    ratio = np.sqrt(then**2 - up**2) / now
    update = np.zeros((len(timesteps), 2, 6))
    update[:, NEXT_LATENTS, LATENTS] = ratio
    update[:, NEXT_LATENTS, X0] = 1 - ratio
    update[:, NEXT_LATENTS, NOISE] = up
    return exploding(config, timesteps, sigmas, update)
