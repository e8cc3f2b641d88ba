"""Samplers as tables of coefficients, guidance as weights of branches, and inversion of real pictures."""

from stylefast.sampling.guidance import BRANCHES, StyleContextGuidance, guidance_weights
from stylefast.sampling.inversion import ddim_invert, pinned_latents
from stylefast.sampling.noise_levels import SDXL_SCHEDULER, alphas_cumprod
from stylefast.sampling.schedule import SCHEDULERS, Schedule, make_schedule

__all__ = [
    "BRANCHES",
    "SCHEDULERS",
    "SDXL_SCHEDULER",
    "Schedule",
    "StyleContextGuidance",
    "alphas_cumprod",
    "ddim_invert",
    "guidance_weights",
    "make_schedule",
    "pinned_latents",
]
