"""DDIM inversion: the noisy trajectory that DDIM would have walked down to a given picture.

StyleAligned's way to take a real picture as reference: its latents are pinned to that trajectory while the targets
are sampled. The trajectory belongs to one list of timesteps, so it is made anew for each step count.
"""

from collections.abc import Callable

import numpy as np
import torch

from stylefast import values
from stylefast.errors import InvalidRequest


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
    alphas = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
    steps = values.whole_number("steps", steps, 1, len(alphas))
    if prediction_type not in ("epsilon", "v_prediction"):
        raise InvalidRequest(f"inversion knows epsilon and v_prediction, not {prediction_type!r}")
    if clean.ndim != 3:
        raise InvalidRequest(f"inversion takes one latent [C, h, w], not {tuple(clean.shape)}")

    latents = clean
    trajectory = [clean]
    abar_from = float(alphas[0])
    for timestep in range(0, steps * (len(alphas) // steps), len(alphas) // steps):
        abar_to = float(alphas[timestep])
        output = predict(latents, float(timestep))
        if prediction_type == "v_prediction":
            output = abar_from**0.5 * output + (1 - abar_from) ** 0.5 * latents
        # x0 is put into the step at once: at equal levels the factors are exactly 1 and 0
        ratio = (abar_to / abar_from) ** 0.5
        latents = ratio * latents + ((1 - abar_to) ** 0.5 - ratio * (1 - abar_from) ** 0.5) * output
        trajectory.append(latents)
        abar_from = abar_to
    return torch.stack(trajectory[::-1])


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
