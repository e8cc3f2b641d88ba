"""Real pictures as references: the latents that a pinned reference holds at every step.

A pin is a function of the step, 0 to the schedule's last plus one, to latents [channels, h, w]. What the model predicts
for a pinned picture is thrown away.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from stylefast.errors import StyleError
from stylefast.runtime.conditions import ConditionStore
from stylefast.runtime.group import Group, Pin
from stylefast.runtime.request import Request
from stylefast.runtime.step_table import StepTable, TableShape
from stylefast.runtime.trajectory import FULL, NULL, Trajectory
from stylefast.sampling.edm import is_edm
from stylefast.sampling.inversion import ddim_invert, pinned_latents
from stylefast.sampling.noise_levels import alphas_cumprod
from stylefast.styles.bank import StyleBank

# the authors' sampler for inverted pictures: timesteps from 0, and the first one's noise level at the end
_INVERSION_CONFIG = {"steps_offset": 0, "set_alpha_to_one": False, "timestep_spacing": "leading"}
# the reference starts this share of the steps into its trajectory (5 of 50 in the authors' notebook)
_OFFSET_SHARE = 0.1


def scheduler_config(request: Request, config: Mapping) -> Mapping:
    """The model's scheduler config, as the request's style needs it.

    Raises StyleError for a sampler that can't pin, and for a model that has none that can.
    """
    style = request.aligned
    noise = None if style is None else style.noise if style.bank is None else style.bank.info.noise
    if noise != "ddim":
        return config
    if is_edm(config):
        raise StyleError(
            "StyleAligned noise='ddim' walks DDIM's training timesteps, and this model "
            f"({config['_class_name']}) was trained on noise levels instead; use noise='forward'"
        )
    if request.scheduler != "ddim":
        raise StyleError(
            f"StyleAligned noise='ddim' inverts the picture along DDIM's steps, and the scheduler is "
            f"{request.scheduler!r}; use scheduler='ddim', or noise='forward', which fits every scheduler"
        )
    return {**config, **_INVERSION_CONFIG}


def forward_pin(t: Trajectory, clean: torch.Tensor) -> Pin:
    """The picture [channels, h, w] with one fixed noise, of the trajectory's seed, at each step's noise level."""
    clean = clean.cpu()
    noise = torch.randn(clean.shape, generator=torch.Generator("cpu").manual_seed(t.request.seed), dtype=torch.float32)
    forward = t.schedule.forward.tolist()
    return lambda step: forward[step][0] * clean + forward[step][1] * noise


def latents_pin(bank: StyleBank, number: int) -> Pin:
    """The latents that a bank holds for one of its references."""
    held = bank.tensors["latents"]  # [steps + 1, references, channels, h, w]
    return lambda step: held[step, number]


@torch.inference_mode()
def inverted_pin(t: Trajectory, clean: torch.Tensor, store: ConditionStore, config: Mapping, guidance: float) -> Pin:
    """The picture's DDIM inversion under the reference's prompt at `guidance`; costs as much as making one picture."""
    unet = store.unet
    request = replace(t.request, style=(), guidance=guidance, guidance_interval=(0.0, 1.0))
    weights = {NULL: 1 - guidance, FULL: guidance} if guidance > 1 else {FULL: 1.0}
    walker = Trajectory(request, t.prompt, t.schedule, t.size, weights, branches=tuple(weights))
    conditions = store.encode([walker], clean.shape[1:])
    try:
        group = Group([walker], conditions, {}, unet.layout, tuple(clean.shape))
        group.slots = np.zeros(1, dtype=np.int64)
        rows, layout = group.rows, unet.layout
        shape = TableShape(rows, 1, 0, 0, False, len(layout.layers), len(layout.modules), group.latent_shape)
        columns = StepTable(shape, unet.device)
        columns.fill([group], [np.zeros(0, dtype=np.int64)])
        table = columns.columns.table
        pooled, time_ids = store.text.extra[table.text_page], columns.columns.time_ids.expand(rows, -1)

        def predict(latents: torch.Tensor, timestep: float) -> torch.Tensor:
            embedding = unet.embed(torch.full((rows,), timestep, device=unet.device), pooled, time_ids)
            stacked = latents.to(unet.dtype).expand(rows, *latents.shape)
            outputs = unet(stacked, embedding, store.text.layers, None, table).float()
            return torch.einsum("b,bchw->chw", torch.tensor(list(weights.values()), device=unet.device), outputs)

        trajectory = ddim_invert(
            predict, clean, alphas_cumprod(config), t.schedule.steps, config.get("prediction_type", "epsilon")
        )
    finally:
        store.release(conditions)
    offset = min(round(_OFFSET_SHARE * t.schedule.steps), t.schedule.steps - 1)
    return lambda step: pinned_latents(trajectory, step, offset)
