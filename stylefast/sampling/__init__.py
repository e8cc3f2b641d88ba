"""Samplers as coefficient tables, guidance as branch weights, and inversion of real pictures."""

from stylefast.sampling.few_step import FEW_STEP_PRESETS, FewStepPreset
from stylefast.sampling.guidance import (
    BRANCHES,
    GuidanceInterval,
    StyleContextGuidance,
    branch_weights_per_step,
    guidance_weights,
)
from stylefast.sampling.inversion import ddim_invert, inversion_schedule, pinned_latents
from stylefast.sampling.noise_levels import SDXL_SCHEDULER, alphas_cumprod
from stylefast.sampling.schedule import (
    KARRAS_SCHEDULERS,
    SCHEDULERS,
    TIMESTEP_SCHEDULERS,
    Schedule,
    first_step,
    make_schedule,
    schedule_digest,
)

__all__ = [
    "BRANCHES",
    "FEW_STEP_PRESETS",
    "FewStepPreset",
    "GuidanceInterval",
    "KARRAS_SCHEDULERS",
    "SCHEDULERS",
    "SDXL_SCHEDULER",
    "Schedule",
    "StyleContextGuidance",
    "TIMESTEP_SCHEDULERS",
    "alphas_cumprod",
    "branch_weights_per_step",
    "ddim_invert",
    "first_step",
    "guidance_weights",
    "inversion_schedule",
    "make_schedule",
    "pinned_latents",
    "schedule_digest",
]
