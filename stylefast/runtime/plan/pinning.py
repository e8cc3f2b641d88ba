"""Real pictures as references: the latents that a pinned reference holds at every step.

A pin is a function of the step, 0 to the schedule's last plus one, to latents [channels, h, w]. The model's prediction
for a pinned picture is discarded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from stylefast.errors import StyleError
from stylefast.models.repaint import Kept
from stylefast.runtime.plan.request import Request
from stylefast.runtime.plan.sample import Pin, Sample, first_noise
from stylefast.sampling.edm import is_edm
from stylefast.sampling.guidance import FULL, NULL
from stylefast.sampling.inversion import inversion_schedule, pinned_latents
from stylefast.sampling.noise_levels import alphas_cumprod
from stylefast.styles.bank import StyleBank
from stylefast.values import quoted

# the authors' sampler for inverted pictures: timesteps from 0, and the first one's noise level at the end
_INVERSION_CONFIG = {"steps_offset": 0, "set_alpha_to_one": False, "timestep_spacing": "leading"}
# the reference starts this share of the steps into its trajectory (5 of 50 in the authors' notebook)
_OFFSET_SHARE = 0.1


def scheduler_config(request: Request, config: Mapping) -> Mapping:
    """Return the model's scheduler config, adapted to the request's style.

    Raises StyleError for a sampler that can't pin, and for a model without one that can.
    """
    style = request.reader
    wanted = None if style is None else style.reads
    noise = None if wanted is None else wanted.noise if wanted.bank is None else wanted.bank.info.noise
    if noise != "ddim":
        return config
    if is_edm(config):
        raise StyleError(
            f"{type(style).__name__} noise='ddim' uses DDIM's training timesteps, but this model "
            f"({config['_class_name']}) was trained on noise levels instead; use noise='forward'"
        )
    if request.scheduler != "ddim":
        raise StyleError(
            f"{type(style).__name__} noise='ddim' inverts the picture along DDIM's steps, but the scheduler is "
            f"{quoted(request.scheduler)}; use scheduler='ddim', or noise='forward', which fits every scheduler"
        )
    return {**config, **_INVERSION_CONFIG}


class Noised:
    """Pin to a picture [channels, h, w] plus one fixed noise (the sample's seed) at each step's noise level.

    kept: what the sample's mask keeps of the picture. keeps: whether its latents are put back after every step, which a
    model for inpainting does not need.
    """

    def __init__(self, sample: Sample, clean: torch.Tensor, kept: Kept | None = None, keeps: bool = True):
        self.clean, self.kept = clean.cpu(), kept
        self.noise = first_noise(sample.request, clean.shape)
        height, width = clean.shape[1:]
        self.begin = sample.begin
        self.keep = 1 - kept.latents((height, width)) if kept is not None and keeps else None
        self._forward = sample.schedule.forward.tolist()

    def __call__(self, step: int) -> torch.Tensor:
        """Return the latents before a step, or after the last."""
        return self._forward[step][0] * self.clean + self._forward[step][1] * self.noise

    def put_back(self, latents: torch.Tensor, step: int) -> None:
        """Write what the mask keeps into latents [channels, h, w] that `step` steps were made of."""
        if self.keep is None or step <= self.begin:
            return
        if self.clean.device != latents.device:
            self.clean, self.noise, self.keep = (x.to(latents.device) for x in (self.clean, self.noise, self.keep))
        known = self.clean if step == len(self._forward) - 1 else self(step)
        latents.copy_(torch.lerp(latents, known, self.keep))


def latents_pin(bank: StyleBank, number: int) -> Pin:
    """Pin to the latents that a bank stores for one of its references."""
    held = bank.tensors["latents"]  # [steps + 1, references, channels, h, w]
    return lambda step: held[step, number]


def inversion_of(sample: Sample, config: Mapping) -> Sample:
    """Return the sample that inverts a reference, from its picture up to noise, with its prompt and inversion guidance.

    It is an ordinary sample: it shares UNet calls, takes its turns, and costs as much as one picture. Its `start`, the
    picture's latents, is not set yet. Raises InvalidRequest for a model whose output can't be inverted.
    """
    assert sample.reference_of is not None
    guidance = sample.reference_of.reads.inversion_guidance
    request = replace(sample.request, style=(), guidance=guidance, guidance_interval=(0.0, 1.0), guidance_rescale=0.0)
    schedule = inversion_schedule(
        alphas_cumprod(config), sample.schedule.steps, config.get("prediction_type", "epsilon")
    )
    weights = {NULL: 1 - guidance, FULL: guidance} if guidance > 1 else {FULL: 1.0}
    branches = tuple(weights)
    return Sample(request, sample.prompt, schedule, sample.size, weights, branches=branches, loras=sample.loras)


def inverted_pin(trail: Sequence[torch.Tensor]) -> Pin:
    """Pin to the latents [channels, h, w] that an inversion passed through, the picture's own first."""
    trajectory = torch.stack(list(trail)[::-1]).float().cpu()
    steps = len(trajectory) - 1
    offset = min(round(_OFFSET_SHARE * steps), steps - 1)
    return lambda step: pinned_latents(trajectory, step, offset)
