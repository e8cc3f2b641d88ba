"""The plain sampling loop: one picture after another in meaning, diffusers' scheduler and UNet in fact."""

from collections.abc import Callable, Sequence
from inspect import signature

import diffusers
import torch

SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_karras": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
}


def make_scheduler(name: str, config):
    """diffusers' scheduler of that name, made from a checkpoint's scheduler config as a user would make it."""
    kind, options = SCHEDULERS[name]
    return kind.from_config(config, **options)


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator for every picture."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(noise: list[torch.Generator], shape) -> torch.Tensor:
    """Noise [images, *shape], every picture from its own generator."""
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in noise])


def sample(
    predict: Callable, scheduler, steps: int, shape, seeds: Sequence[int], pinned=None, dtype=torch.float32
) -> torch.Tensor:
    """Run the loop and return the latents [images, *shape] in `dtype`; the noise is the same in any.

    `predict(latents, timestep, step)` gives the guided prediction for latents as the UNet wants them. `pinned`, if
    given, is (clean latents [1, *shape], noise [1, *shape]) of a reference picture that stands before the images: at
    every step it is put in at that step's noise level, its own prediction is thrown away, and it is left out of the
    result. A list in its place holds the reference's latents [*shape] of every step.
    """
    noise = generators(seeds)
    scheduler.set_timesteps(steps)
    latents = draw(noise, shape).to(dtype) * scheduler.init_noise_sigma
    options = {"generator": noise} if "generator" in signature(scheduler.step).parameters else {}
    for step, timestep in enumerate(scheduler.timesteps):
        batch = latents
        if pinned is not None:
            given = isinstance(pinned, list)
            reference = pinned[step][None] if given else scheduler.add_noise(*pinned, timestep[None])
            batch = torch.cat([reference.to(dtype), latents])
        prediction = predict(scheduler.scale_model_input(batch, timestep), timestep, step)
        latents = scheduler.step(prediction[len(batch) - len(latents) :], timestep, latents, **options).prev_sample
    return latents


def rescaled(guided: torch.Tensor, conditional: torch.Tensor, amount: float) -> torch.Tensor:
    """Guidance rescale: pull the deviation of every picture's prediction back towards the conditional one's."""
    deviations = [tensor.flatten(1).std(1).view(-1, 1, 1, 1) for tensor in (conditional, guided)]
    return amount * guided * deviations[0] / deviations[1] + (1 - amount) * guided
