"""Samplers of distilled models that jump along the ODE trajectory: LCM and TCD."""

from collections.abc import Mapping

import numpy as np

from stylefast.errors import InvalidRequest
from stylefast.sampling.noise_levels import alphas_cumprod
from stylefast.sampling.tables import LATENTS, NEXT_LATENTS, NOISE, X0, Tables, denoised, forward_of


def distilled_timesteps(name: str, config: Mapping, steps: int) -> np.ndarray:
    """Return `steps` of the `original_inference_steps` the model was distilled on: [steps] int64, descending.

    Raises InvalidRequest if `steps` exceeds `original_inference_steps`.
    """
    original, total = config["original_inference_steps"], config["num_train_timesteps"]
    if steps > original:
        raise InvalidRequest(
            f"{name} can't take {steps} steps: the model was distilled on {original} (original_inference_steps); "
            "use fewer"
        )
    distilled = (np.arange(1, original + 1) * (total // original) - 1)[::-1]
    return distilled[np.floor(np.linspace(0, original, num=steps, endpoint=False)).astype(np.int64)]


def lcm(config: Mapping, timesteps: np.ndarray) -> Tables:
    """Build the tables of latent consistency sampling (Luo et al. 2023, Alg. 3).

    Each step jumps to x0, then adds noise of the next level. timesteps: [steps] int64. x0 includes the boundary
    condition c_skip, c_out.
    """
    abar = alphas_cumprod(config)[timesteps]
    alpha, s = np.sqrt(abar), np.sqrt(1 - abar)

    scaled, data = timesteps * config["timestep_scaling"], 0.5
    c_skip = data**2 / (scaled**2 + data**2)
    c_out = scaled / np.sqrt(scaled**2 + data**2)
    x0 = c_out[:, None] * denoised(config, alpha, s)
    x0[:, 0] += c_skip

    steps = len(timesteps)
    update = np.zeros((steps, 2, 6))
    update[:, NEXT_LATENTS, X0] = np.append(alpha[1:], 1.0)
    update[:, NEXT_LATENTS, NOISE] = np.append(s[1:], 0.0)
    return Tables(timesteps.astype(np.float64), np.ones(steps), x0, update, forward_of(np.append(abar, 1.0)))


def tcd(config: Mapping, timesteps: np.ndarray, eta: float) -> Tables:
    """Build the tables of trajectory consistency sampling (Zheng et al. 2024, arXiv 2402.19159).

    Each step jumps past the next timestep, then adds noise up to it. timesteps: [steps] int64. eta: the paper's gamma;
    the jump goes to `floor((1 - eta) next)`, so 0 adds no noise and 1 jumps all the way. Sampling ends at timestep 0,
    whose small noise stays in the latents.
    """
    trained = alphas_cumprod(config)
    then = np.append(timesteps[1:], 0)
    # float32, as in published samplers: in float64 some products fall just short of a whole number
    reached = np.floor(np.float32(1 - eta) * then.astype(np.float32)).astype(np.int64)
    abar, abar_then, abar_reached = trained[timesteps], trained[then], trained[reached]
    alpha, s = np.sqrt(abar), np.sqrt(1 - abar)

    kept = np.sqrt(abar_then / abar_reached)
    # noise = (latents - alpha x0) / s, as in DDIM
    direction = np.sqrt(1 - abar_reached) / s
    steps = len(timesteps)
    update = np.zeros((steps, 2, 6))
    update[:, NEXT_LATENTS, LATENTS] = kept * direction
    update[:, NEXT_LATENTS, X0] = kept * (np.sqrt(abar_reached) - direction * alpha)
    update[:, NEXT_LATENTS, NOISE] = np.sqrt(1 - abar_then / abar_reached)
    forward = forward_of(np.append(abar, abar_then[-1]))
    return Tables(timesteps.astype(np.float64), np.ones(steps), denoised(config, alpha, s), update, forward)
