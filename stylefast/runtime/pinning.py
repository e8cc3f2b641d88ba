"""Real pictures as references: the latents that a pinned reference holds at every step.

A pin is a function of the step, 0 to the schedule's last plus one, to latents [channels, h, w]. What the model predicts
for a pinned picture is thrown away.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from stylefast.errors import StyleError
from stylefast.models.text import TextEncoder
from stylefast.models.unet import UNet
from stylefast.runtime.conditions import encode_conditions
from stylefast.runtime.request import Request
from stylefast.runtime.table import TableBuilder
from stylefast.runtime.trajectory import FULL, NULL, Trajectory
from stylefast.sampling.inversion import ddim_invert, pinned_latents
from stylefast.sampling.noise_levels import alphas_cumprod

Pin = Callable[[int], torch.Tensor]

# the authors' sampler for inverted pictures: timesteps from 0, and the first one's noise level at the end
_INVERSION_CONFIG = {"steps_offset": 0, "set_alpha_to_one": False, "timestep_spacing": "leading"}
# the reference starts this share of the steps into its trajectory (5 of 50 in the authors' notebook)
_OFFSET_SHARE = 0.1


def scheduler_config(request: Request, config: Mapping) -> Mapping:
    """The model's scheduler config, as the request's style needs it. Raises StyleError for a sampler that can't pin."""
    style = request.aligned
    if style is None or style.noise != "ddim":
        return config
    if request.scheduler != "ddim":
        raise StyleError(
            f"StyleAligned noise='ddim' inverts the picture along DDIM's steps, and the scheduler is "
            f"{request.scheduler!r}; use scheduler='ddim', or noise='forward', which fits every scheduler"
        )
    return {**config, **_INVERSION_CONFIG}


def forward_pin(t: Trajectory, clean: torch.Tensor) -> Pin:
    """The picture [channels, h, w] with one fixed noise, of the trajectory's seed, at each step's noise level."""
    noise = torch.randn(clean.shape, generator=torch.Generator("cpu").manual_seed(t.request.seed)).to(clean.device)
    forward = t.schedule.forward.tolist()
    return lambda step: forward[step][0] * clean + forward[step][1] * noise


@torch.inference_mode()
def inverted_pin(
    t: Trajectory, clean: torch.Tensor, unet: UNet, text_encoder: TextEncoder, config: Mapping, guidance: float
) -> Pin:
    """The picture's DDIM inversion under the reference's prompt at `guidance`; costs as much as making one picture."""
    request = replace(t.request, style=(), guidance=guidance)
    weights = {NULL: 1 - guidance, FULL: guidance} if guidance > 1 else {FULL: 1.0}
    walker = Trajectory(request, t.prompt, t.schedule, t.size, weights, branches=tuple(weights))
    train_timesteps = config.get("num_train_timesteps", 1000)
    conditions = encode_conditions([walker], unet, text_encoder, {}, clean.shape[1:], train_timesteps)
    table = TableBuilder(conditions, unet.layout, unet.device).build([walker], 0)
    rows = len(table.picture)
    pooled = conditions.pooled[table.text_page]
    time_ids = torch.tensor([[t.size[1], t.size[0], 0, 0, t.size[1], t.size[0]]], device=unet.device).float()

    def predict(latents: torch.Tensor, timestep: float) -> torch.Tensor:
        embedding = unet.embed(torch.full((rows,), timestep, device=unet.device), pooled, time_ids.expand(rows, -1))
        stacked = latents.to(unet.dtype).expand(rows, *latents.shape)
        outputs = unet(stacked, embedding, conditions.text_kv, None, table.rows).float()
        return torch.einsum("b,bchw->chw", torch.tensor(list(weights.values()), device=unet.device), outputs)

    trajectory = ddim_invert(
        predict, clean, alphas_cumprod(config), t.schedule.steps, config.get("prediction_type", "epsilon")
    )
    offset = min(round(_OFFSET_SHARE * t.schedule.steps), t.schedule.steps - 1)
    return lambda step: pinned_latents(trajectory, step, offset)
