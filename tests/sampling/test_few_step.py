"""Presets of distilled models walk the paths of diffusers' schedulers under the settings their authors publish."""

import diffusers
import pytest
import torch

from stylefast.errors import InvalidRequest
from stylefast.sampling import FEW_STEP_PRESETS
from stylefast.sampling.few_step import guidance_warning
from tests.support.fp64 import close, measured
from tests.support.sampler_paths import SHAPE, assert_schedule_walks, our_path, toy_model

# the scheduler config that SDXL and the models made from it are published with
SDXL = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}

# what their model cards say: scheduler class, its options, arguments of set_timesteps, eta
PUBLISHED = {
    "sdxl_turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, {}, None),
    "sdxl_lightning": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, {}, None),
    "sdxl_lightning_1step": (
        "EulerDiscreteScheduler",
        {"timestep_spacing": "trailing", "prediction_type": "sample"},
        {},
        None,
    ),
    "lcm": ("LCMScheduler", {}, {}, None),
    "hyper_sd": ("DDIMScheduler", {"timestep_spacing": "trailing"}, {}, None),
    "hyper_sd_unified": ("TCDScheduler", {}, {}, 1.0),
    "hyper_sd_1step_unet": ("LCMScheduler", {}, {"timesteps": [800]}, None),
    "tcd": ("TCDScheduler", {}, {}, 0.3),
    "dmd2": ("LCMScheduler", {}, {"timesteps": [999, 749, 499, 249]}, None),
    "dmd2_1step": ("LCMScheduler", {}, {"timesteps": [399]}, None),
}


def test_every_preset_is_compared():
    assert set(PUBLISHED) == set(FEW_STEP_PRESETS)


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_preset_equals_diffusers_under_the_published_settings(model):
    kind, options, timesteps, eta = PUBLISHED[model]
    preset = FEW_STEP_PRESETS[model]
    for steps in preset.steps:
        scheduler = getattr(diffusers, kind).from_config(SDXL, **options)
        scheduler.set_timesteps(**(timesteps or {"num_inference_steps": steps}))
        assert_schedule_walks(preset.schedule(steps, SDXL), preset.scheduler, scheduler, eta=eta)


def dmd2_demo(latents, draws, timesteps):
    """The loop of DMD2's demo: x0 of an epsilon model, then noise of the timestep 250 lower, until the list ends."""
    betas = torch.linspace(SDXL["beta_start"] ** 0.5, SDXL["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0).to(latents.dtype)
    x0 = latents
    for timestep, noise in zip(timesteps, draws, strict=True):
        epsilon = toy_model(latents, timestep)
        x0 = (latents - (1 - abar[timestep]).sqrt() * epsilon) / abar[timestep].sqrt()
        below = timestep - 250
        if below > 0:
            latents = abar[below].sqrt() * x0 + (1 - abar[below]).sqrt() * noise
    return x0


@pytest.mark.parametrize("model, timesteps", [("dmd2", (999, 749, 499, 249)), ("dmd2_1step", (399,))])
def test_dmd2_samples_as_its_authors_demo_does(model, timesteps):
    schedule = FEW_STEP_PRESETS[model].schedule(len(timesteps), SDXL)
    generator = torch.Generator().manual_seed(0)
    start, *draws = [torch.randn(SHAPE, generator=generator) for _ in range(1 + len(timesteps))]
    _, ours = our_path(schedule, seed=0)
    close(ours[-1], measured(dmd2_demo, start, draws, timesteps))


@pytest.mark.parametrize("scheduler", [*FEW_STEP_PRESETS])
def test_guidance_that_a_preset_was_not_made_for_has_a_warning(scheduler):
    warning = guidance_warning(scheduler, 7.0)
    assert warning is not None and f"{scheduler!r}" in warning and "guidance 7" in warning
    # those of LCM and TCD are published with some guidance, the others with none
    slight = guidance_warning(scheduler, 2.0)
    assert slight is None if scheduler in ("lcm", "tcd") else slight is not None and slight.endswith("use 1")
    assert guidance_warning(scheduler, 1.0) is None and guidance_warning(scheduler, 0.0) is None
    assert guidance_warning("euler", 7.0) is None and guidance_warning("lcm_karras", 7.0) is None


def test_presets_run_without_guidance():
    assert {preset.guidance for preset in FEW_STEP_PRESETS.values()} == {1.0}


@pytest.mark.parametrize("model, steps", [("sdxl_lightning", 3), ("hyper_sd", 1), ("sdxl_turbo", 30), ("tcd", 2.0)])
def test_a_preset_refuses_counts_that_its_model_was_not_made_for(model, steps):
    with pytest.raises(InvalidRequest, match="name the sampler itself"):
        FEW_STEP_PRESETS[model].schedule(steps)
