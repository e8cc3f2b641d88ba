"""Presets of distilled models walk the paths of diffusers' schedulers under the settings their authors publish."""

import diffusers
import pytest

from stylefast.errors import InvalidRequest
from stylefast.sampling import FEW_STEP_PRESETS
from tests.support.sampler_paths import assert_schedule_walks

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


def test_presets_run_without_guidance():
    assert {preset.guidance for preset in FEW_STEP_PRESETS.values()} == {1.0}


@pytest.mark.parametrize("model, steps", [("sdxl_lightning", 3), ("hyper_sd", 1), ("sdxl_turbo", 30), ("tcd", 2.0)])
def test_a_preset_refuses_counts_that_its_model_was_not_made_for(model, steps):
    with pytest.raises(InvalidRequest, match="name the sampler itself"):
        FEW_STEP_PRESETS[model].schedule(steps)
