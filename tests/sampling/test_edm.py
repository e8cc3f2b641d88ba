"""Models of EDM's kind (Playground v2.5, CosXL): the schedules walk diffusers' paths, and what can't be is refused."""

import diffusers
import pytest
import torch

from stylefast.errors import InvalidRequest
from stylefast.sampling import FEW_STEP_PRESETS, SCHEDULERS, make_schedule
from stylefast.sampling.edm import EDM_SCHEDULERS
from stylefast.sampling.few_step import named_schedule
from tests.support.sampler_paths import SDE, SHAPE, assert_schedule_walks, diffusers_path, our_path, toy_model

PLAYGROUND = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "prediction_type": "epsilon"}
COSXL = {"sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0, "prediction_type": "v_prediction"}
MODELS = {"playground": PLAYGROUND, "cosxl": {**COSXL, "sigma_schedule": "exponential"}, "rho": {**COSXL, "rho": 5.0}}
EULER = {"_class_name": "EDMEulerScheduler"}


def walks(name, kind, settings, steps):
    scheduler = kind(**settings)
    scheduler.set_timesteps(steps)
    config = {**scheduler.config, "_class_name": kind.__name__}
    assert_schedule_walks(make_schedule(name, steps, config), name, scheduler)


def euler_in_float64(scheduler):
    """Latents after each step of Euler's method on the denoiser of Karras et al. 2022, Eq. 7, with the toy model."""
    data, sign = scheduler.config.sigma_data, 1 if scheduler.config.prediction_type == "epsilon" else -1
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).double() * scheduler.init_noise_sigma
    path = []
    for now, then in zip(scheduler.sigmas.double(), scheduler.sigmas.double()[1:]):
        total = now**2 + data**2
        output = toy_model(latents / total.sqrt(), now.log() / 4)
        x0 = data**2 / total * latents + sign * now * data / total.sqrt() * output
        latents = latents + (latents - x0) / now * (then - now)
        path.append(latents)
    return path


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("model", MODELS)
def test_euler_equals_diffusers(model, final):
    for steps in (2, 21):
        scheduler = diffusers.EDMEulerScheduler(**MODELS[model], final_sigmas_type=final)
        scheduler.set_timesteps(steps)
        schedule = make_schedule("euler", steps, {**scheduler.config, **EULER})
        torch.testing.assert_close(schedule.timesteps, scheduler.timesteps)
        _, theirs = diffusers_path("euler", scheduler, None)
        _, ours = our_path(schedule)
        for wanted, their, our in zip(euler_in_float64(scheduler), theirs, ours, strict=True):
            # a step from sigma_max down to almost nothing rounds at the size of the latents it starts from
            least = 1e-6 * scheduler.config.sigma_max
            assert (our - wanted).abs().max() <= max(2 * (their - wanted).abs().max(), least)


@pytest.mark.parametrize("name, options", [("dpmpp_2m", {}), ("dpmpp_2m_sde", SDE), ("dpmpp_3m", {"solver_order": 3})])
@pytest.mark.parametrize("model", MODELS)
def test_multistep_solvers_equal_diffusers(model, name, options):
    for steps in (1, 2, 21) if model != "cosxl" else (2, 21):  # theirs starts one exponential step at sigma_min
        walks(name, diffusers.EDMDPMSolverMultistepScheduler, {**MODELS[model], **options}, steps)


@pytest.mark.parametrize("name", EDM_SCHEDULERS)
def test_a_perfect_model_carries_the_forward_table_from_step_to_step(name):
    schedule = make_schedule(name, 15, {**EULER, **PLAYGROUND})
    for i in range(schedule.steps):
        # as coefficients of (z0, noise); the anchor is forward[i - 1], every x0 is (1, 0)
        clean = torch.tensor([1.0, 0.0])
        terms = torch.stack([schedule.forward[i], schedule.forward[max(i - 1, 0)], clean, clean, clean, 0 * clean])
        reached = schedule.update[i, 0] @ terms
        reached[1] = torch.hypot(reached[1], schedule.update[i, 0, 5])
        torch.testing.assert_close(reached, schedule.forward[i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction, data", [("epsilon", 0.5), ("v_prediction", 1.0)])
def test_the_preconditioning_turns_a_perfect_models_output_into_x0(prediction, data):
    settings = {**EULER, "sigma_data": data, "prediction_type": prediction}
    schedule = make_schedule("euler", 6, settings)
    noise = torch.randn(6, dtype=torch.float64)
    sigmas = schedule.forward[:6, 1].double()
    latents = 0.7 + sigmas * noise
    c_skip, c_out = data**2 / (sigmas**2 + data**2), sigmas * data / (sigmas**2 + data**2).sqrt()
    output = (0.7 - c_skip * latents) / (c_out if prediction == "epsilon" else -c_out)
    found = schedule.denoised[:, 0].double() * latents + schedule.denoised[:, 1].double() * output
    # float32 coefficients of latents as large as sigma_max
    assert ((found - 0.7).abs() <= 1e-6 * (1 + latents.abs())).all()


def test_the_config_or_the_name_says_how_noise_levels_are_spread():
    karras = make_schedule("euler", 9, {**EULER, **COSXL})
    exponential = make_schedule("euler", 9, {**EULER, **COSXL, "sigma_schedule": "exponential"})
    assert not torch.equal(karras.forward, exponential.forward)
    assert torch.equal(make_schedule("euler_exponential", 9, {**EULER, **COSXL}).forward, exponential.forward)
    # left over from another scheduler's config; those of EDM don't read it
    assert torch.equal(
        make_schedule("euler", 9, {**EULER, **COSXL, "use_exponential_sigmas": True}).forward, karras.forward
    )


def test_a_key_that_the_config_does_not_carry_means_what_diffusers_means():
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(5)
    assert_schedule_walks(make_schedule("euler", 5, {**EULER, "sigma_min": None}), "euler", scheduler)


@pytest.mark.parametrize("name", sorted({*SCHEDULERS, *FEW_STEP_PRESETS} - {*EDM_SCHEDULERS}))
def test_samplers_that_walk_training_timesteps_are_refused_with_those_that_do_not(name):
    with pytest.raises(InvalidRequest, match=f"'{name}' uses a model's training timesteps.*EDMEulerScheduler.*euler, "):
        named_schedule(name, 4, {**EULER, **PLAYGROUND})


BAD = {
    "a spacing": ({}, {"spacing": "trailing"}, "spacing='trailing'.*leave it out"),
    "timesteps": ({}, {"timesteps": [999, 499]}, "timesteps=.*leave it out"),
    "a share of noise": ({}, {"eta": 0.5}, "eta"),
    "what the model predicts": ({"prediction_type": "sample"}, {}, "'sample'.*'v_prediction'"),
    "a schedule": ({"sigma_schedule": "cosine"}, {}, "'cosine'.*'exponential'"),
    "levels upside down": ({"sigma_min": 80.0, "sigma_max": 0.002}, {}, "sigma_min=80.0"),
    "a level of zero": ({"sigma_min": 0.0}, {}, "sigma_min=0.0"),
    "no number": ({"sigma_data": "half"}, {}, "sigma_data='half'"),
    "infinity": ({"sigma_max": float("inf")}, {}, "sigma_max=inf"),
    "the end": ({"final_sigmas_type": "one"}, {}, "'one'"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_with_a_way_out(case):
    config, options, words = BAD[case]
    with pytest.raises(InvalidRequest, match=words):
        make_schedule("euler", 2, {**EULER, **config}, **options)
