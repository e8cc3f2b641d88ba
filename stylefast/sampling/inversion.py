"""DDIM inversion: the noisy trajectory along which DDIM would have reached a given picture.

StyleAligned uses it to take a real picture as reference: the reference's latents are pinned to the trajectory while the
targets are sampled. A trajectory belongs to one list of timesteps, so each step count needs its own.
"""

from collections.abc import Callable

import numpy as np
import torch

from stylefast import values
from stylefast.errors import InvalidRequest
from stylefast.sampling.schedule import Schedule
from stylefast.sampling.tables import LATENTS, NEXT_LATENTS, X0, forward_of


def inversion_schedule(
    alphas_cumprod: np.ndarray | torch.Tensor, steps: int = 50, prediction_type: str = "epsilon"
) -> Schedule:
    """Build the schedule from a clean latent up to noise, with the same steps as `ddim_invert`.

    The update is linear in the latents and the model's output, so it fits an ordinary schedule with the predicted
    noise in place of x0. Sampling starts at the clean latent. Raises InvalidRequest for bad arguments.
    """
    timesteps, output, factors, levels = _coefficients(alphas_cumprod, steps, prediction_type)
    steps = len(timesteps)
    update = torch.zeros(steps, 2, 6)
    update[:, NEXT_LATENTS, LATENTS], update[:, NEXT_LATENTS, X0] = torch.from_numpy(factors.T).float()
    forward = torch.from_numpy(forward_of(levels)).float()
    return Schedule(
        "ddim_inversion",
        torch.from_numpy(timesteps).float(),
        torch.ones(steps),
        torch.from_numpy(output).float(),
        update,
        forward,
        init_noise_scale=1.0,
    )


def ddim_invert(
    predict: Callable[[torch.Tensor, float], torch.Tensor],
    clean: torch.Tensor,
    alphas_cumprod: np.ndarray | torch.Tensor,
    steps: int = 50,
    prediction_type: str = "epsilon",
) -> torch.Tensor:
    """Invert a clean latent step by step up to noise.

    Args:
        predict: (latents [C, h, w], timestep) -> the model's guided output [C, h, w].
        clean: [C, h, w], the scaled mean of the VAE's posterior, in float32 or wider.
        alphas_cumprod: [train timesteps], from `noise_levels.alphas_cumprod`.
        prediction_type: "epsilon" or "v_prediction", the type of `predict`'s output.

    For t = 0, r, 2r, ... with r = train timesteps // steps, and s the previous timestep (alphas_cumprod[0] before the
    first): x0 = (z - sqrt(1 - abar_s) eps) / sqrt(abar_s), z <- sqrt(abar_t) x0 + sqrt(1 - abar_t) eps. The model
    is evaluated at the destination t on the latents of the source s, so the first step is an identity.

    Returns [steps + 1, C, h, w], noisiest first, `clean` last. Raises InvalidRequest for bad arguments.
    """
    if clean.ndim != 3:
        raise InvalidRequest(f"inversion takes one latent [C, h, w], not {tuple(clean.shape)}")
    timesteps, output, factors, _ = _coefficients(alphas_cumprod, steps, prediction_type)
    latents, trajectory = clean, [clean]
    for timestep, of_noise, of_step in zip(timesteps.tolist(), output.tolist(), factors.tolist(), strict=True):
        predicted = predict(latents, timestep)
        noise = predicted if of_noise == [0, 1] else of_noise[0] * latents + of_noise[1] * predicted
        latents = of_step[0] * latents + of_step[1] * noise
        trajectory.append(latents)
    return torch.stack(trajectory[::-1])


def _coefficients(alphas_cumprod, steps: int, prediction_type: str) -> tuple[np.ndarray, ...]:
    """Return, in float64, the timesteps [steps]; the coefficients of (latents, output) for the noise [steps, 2] and
    of (latents, noise) for the next latents [steps, 2]; and the visited levels [steps + 1]."""
    alphas = np.asarray(alphas_cumprod, dtype=np.float64)
    steps = values.whole_number("steps", steps, 1, len(alphas))
    if prediction_type not in ("epsilon", "v_prediction"):
        raise InvalidRequest(f"inversion supports epsilon and v_prediction, not {values.quoted(prediction_type)}")
    timesteps = np.arange(steps) * (len(alphas) // steps)
    levels = alphas[np.concatenate([[0], timesteps])]
    source, target = levels[:-1], levels[1:]
    output = np.stack([np.zeros(steps), np.ones(steps)], axis=1)
    if prediction_type == "v_prediction":
        output = np.stack([np.sqrt(1 - source), np.sqrt(source)], axis=1)
    # x0 is substituted into the step, so that at equal levels the factors are exactly 1 and 0
    ratio = np.sqrt(target / source)
    factors = np.stack([ratio, np.sqrt(1 - target) - ratio * np.sqrt(1 - source)], axis=1)
    return timesteps.astype(np.float64), output, factors, levels


def pinned_latents(trajectory: torch.Tensor, step: int, offset: int = 5) -> torch.Tensor:
    """Return the reference's latents [C, h, w] at the start of `step`, as in StyleAligned's released code.

    Sampling starts at `trajectory[offset]` and after step i uses `trajectory[max(offset + 1, i + 1)]`, so in the first
    steps the reference is less noisy than the timestep given to the model. `step == steps` is the finished picture.

    Raises InvalidRequest if the trajectory is too short for `step` or `offset`.
    """
    last = len(trajectory) - 1
    if not 0 <= step <= last:
        raise InvalidRequest(f"step must be in 0..{last}, the steps of this trajectory, not {step}")
    if not 0 <= offset < last:
        raise InvalidRequest(f"offset must be in 0..{last - 1}, before this trajectory's end, not {offset}")
    return trajectory[offset if step == 0 else max(offset + 1, step)]
