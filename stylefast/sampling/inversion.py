"""DDIM inversion: the noisy trajectory that DDIM would have walked down to a given picture.

StyleAligned's way to take a real picture as reference: its latents are pinned to that trajectory while the targets
are sampled. The trajectory belongs to one list of timesteps, so it is made anew for each step count.
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
    """Lay out the steps from a clean latent up to noise, as `ddim_invert` walks them.

    The update is linear in the latents and the model's output, so it is a schedule like any sampler's, whose x0 is the
    predicted noise. Sampling starts at the clean latent. Raises InvalidRequest for bad arguments.
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
    """Walk a clean latent up to noise.

    predict: (latents [C, h, w], timestep) -> the model's guided output [C, h, w].
    clean: [C, h, w], the scaled mean of the VAE's posterior, in float32 or wider.
    alphas_cumprod: [train timesteps], as of `noise_levels.alphas_cumprod`.
    prediction_type: "epsilon" or "v_prediction", what `predict` returns.

    For t = 0, r, 2r, ... with r = train timesteps // steps, and s the timestep before (alphas_cumprod[0] before the
    first): x0 = (z - sqrt(1 - abar_s) eps) / sqrt(abar_s), z <- sqrt(abar_t) x0 + sqrt(1 - abar_t) eps. The model
    is asked at the destination t with the latents of the source s; the first step is therefore an identity.

    Returns [steps + 1, C, h, w], the noisiest first and `clean` last. Raises InvalidRequest for bad arguments.
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
    """Per step, float64: timestep [steps]; the noise from (latents, output) [steps, 2]; the next latents from
    (latents, noise) [steps, 2]; and the levels that are passed [steps + 1]."""
    alphas = np.asarray(alphas_cumprod, dtype=np.float64)
    steps = values.whole_number("steps", steps, 1, len(alphas))
    if prediction_type not in ("epsilon", "v_prediction"):
        raise InvalidRequest(f"inversion knows epsilon and v_prediction, not {prediction_type!r}")
    timesteps = np.arange(steps) * (len(alphas) // steps)
    levels = alphas[np.concatenate([[0], timesteps])]
    source, target = levels[:-1], levels[1:]
    output = np.stack([np.zeros(steps), np.ones(steps)], axis=1)
    if prediction_type == "v_prediction":
        output = np.stack([np.sqrt(1 - source), np.sqrt(source)], axis=1)
    # x0 is put into the step at once: at equal levels the factors are exactly 1 and 0
    ratio = np.sqrt(target / source)
    factors = np.stack([ratio, np.sqrt(1 - target) - ratio * np.sqrt(1 - source)], axis=1)
    return timesteps.astype(np.float64), output, factors, levels


def pinned_latents(trajectory: torch.Tensor, step: int, offset: int = 5) -> torch.Tensor:
    """The latents [C, h, w] that the reference holds when sampling enters `step`, as in StyleAligned's release.

    Sampling starts at `trajectory[offset]` and after step i takes `trajectory[max(offset + 1, i + 1)]`: for its first
    steps the reference is less noisy than the timestep the model is told. `step == steps` is the end, the picture.

    Raises InvalidRequest where the trajectory is shorter than that needs.
    """
    last = len(trajectory) - 1
    if not 0 <= step <= last:
        raise InvalidRequest(f"step must lie in 0..{last}, the steps of this trajectory, not {step}")
    if not 0 <= offset < last:
        raise InvalidRequest(f"offset must lie in 0..{last - 1}, short of this trajectory's end, not {offset}")
    return trajectory[offset if step == 0 else max(offset + 1, step)]
