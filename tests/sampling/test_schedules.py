"""Every schedule walks the same path as diffusers' scheduler of that name, step by step, on a toy model."""

import numpy as np
import pytest
import torch

from stylefast.sampling import SCHEDULERS, TIMESTEP_SCHEDULERS, alphas_cumprod, make_schedule
from tests.support.sampler_paths import SDXL, SHAPE, assert_same_path, assert_schedule_walks, diffusers_scheduler

GOOGLE_DDIM = {**SDXL, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 0}
STEPS = [1, 2, 3, 4, 20, 50]
SPACED = ["leading", "linspace", "trailing"]
MULTISTEP = ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_3m_sde", "unipc"]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_equals_diffusers(steps, eta, prediction):
    assert_same_path(
        "ddim",
        {
            **SDXL,
            "clip_sample": False,
            "steps_offset": 1,
            "prediction_type": prediction,
            "set_alpha_to_one": False,
            "timestep_spacing": "leading",
        },
        steps,
        eta=eta,
    )


@pytest.mark.parametrize("spacing", SPACED)
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_equals_diffusers_in_every_spacing_also_where_steps_do_not_divide(spacing, to_one):
    for steps in (7, 30):
        assert_same_path(
            "ddim",
            {**SDXL, "clip_sample": False, "steps_offset": 0, "set_alpha_to_one": to_one, "timestep_spacing": spacing},
            steps,
            eta=0.5,
        )


@pytest.mark.parametrize("steps", [4, 50])
def test_the_style_aligned_release_ddim_equals_diffusers(steps):
    assert_same_path("ddim", {**GOOGLE_DDIM, "timestep_spacing": "leading"}, steps)


def test_the_style_aligned_release_ddim_goes_from_980_to_0_and_ends_in_an_identity():
    schedule = make_schedule("ddim", 50, GOOGLE_DDIM)
    assert schedule.timesteps.tolist() == list(range(980, -1, -20))
    # at the end the prediction cancels: next = c0 latents + c1 (d0 latents + d1 output) = latents
    c, d = schedule.update[-1, 0].double(), schedule.denoised[-1].double()
    assert float(c[0] + c[2] * d[0]) == pytest.approx(1.0, abs=1e-6)
    assert float(c[2] * d[1]) == pytest.approx(0.0, abs=1e-6)
    assert float(schedule.forward[-1, 0]) ** 2 == pytest.approx(0.99915, abs=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACED)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("karras", [False, True], ids=["trained levels", "karras levels"])
def test_euler_equals_diffusers(karras, steps, spacing, prediction):
    config = {**SDXL, "steps_offset": 1, "timestep_spacing": spacing, "prediction_type": prediction}
    assert_same_path("euler", {**config, "use_karras_sigmas": karras}, steps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACED)
@pytest.mark.parametrize("steps", STEPS)
def test_euler_ancestral_equals_diffusers(steps, spacing, prediction):
    assert_same_path(
        "euler_ancestral",
        {**SDXL, "steps_offset": 1, "timestep_spacing": spacing, "prediction_type": prediction},
        steps,
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACED)
@pytest.mark.parametrize("karras", [False, True], ids=["trained levels", "karras levels"])
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_samplers_equal_diffusers(name, karras, spacing, prediction):
    config = {**SDXL, "steps_offset": 1, "timestep_spacing": spacing, "prediction_type": prediction}
    for steps in STEPS:
        assert_same_path(name, {**config, "use_karras_sigmas": karras}, steps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("form", ["", "_karras", "_exponential"], ids=["trained levels", "karras", "exponential"])
def test_dpmpp_sde_equals_diffusers(form, prediction):
    for steps in STEPS:
        assert_same_path("dpmpp_sde" + form, {**SDXL, "prediction_type": prediction}, steps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["euler", *MULTISTEP])
def test_exponential_levels_equal_diffusers(name, prediction):
    for steps in STEPS:
        assert_same_path(
            name + "_exponential",
            {**SDXL, "steps_offset": 1, "timestep_spacing": "leading", "prediction_type": prediction},
            steps,
        )


@pytest.mark.parametrize("levels", ["", "_karras", "_exponential"], ids=["trained levels", "karras", "exponential"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc"])
def test_a_path_that_ends_at_the_smallest_noise_level_equals_diffusers(name, levels):
    for steps in (4, 20):
        assert_same_path(
            name + levels, {**SDXL, "timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}, steps
        )


@pytest.mark.parametrize("name", ["dpmpp_3m", "dpmpp_3m_sde"])
def test_third_order_paths_that_end_at_the_smallest_noise_level_equal_diffusers(name):
    config = {**SDXL, "timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}
    for steps in (4, 20):
        assert_same_path(name, config, steps)
    # with Karras levels the last step has no length, which makes diffusers divide zero by zero
    assert_same_path(name + "_karras", config, 4)
    assert make_schedule(name + "_karras", 20, config).update[-1, 0].tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m_sde", "unipc"])
def test_timesteps_of_cosine_levels_spread_by_karras_equal_diffusers(name):
    """Only these: several of the first noise levels share a timestep, on which diffusers' own bookkeeping trips."""
    config = {**SDXL, "beta_schedule": "squaredcos_cap_v2"}
    for steps in (1, 8, 30):
        scheduler = diffusers_scheduler(name + "_karras", config)
        scheduler.set_timesteps(steps)
        assert make_schedule(name + "_karras", steps, config).timesteps.tolist() == scheduler.timesteps.tolist()


def test_euler_ancestral_ends_clean_whatever_the_config_says_of_other_samplers():
    schedule = make_schedule("euler_ancestral", 8, {"final_sigmas_type": "sigma_min"})
    assert schedule is not make_schedule("euler_ancestral", 8)
    assert torch.equal(schedule.update, make_schedule("euler_ancestral", 8).update)


def test_orders_at_the_end_equal_diffusers():
    assert_same_path(
        "dpmpp_2m",
        {**SDXL, "timestep_spacing": "linspace", "euler_at_final": True, "final_sigmas_type": "sigma_min"},
        20,
    )
    assert_same_path(
        "dpmpp_2m",
        {**SDXL, "timestep_spacing": "linspace", "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        6,
    )
    assert_same_path(
        "unipc",
        {**SDXL, "timestep_spacing": "linspace", "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        6,
    )
    assert_same_path("unipc", {**SDXL, "timestep_spacing": "linspace", "disable_corrector": [0, 1]}, 6)
    for steps in (6, 7):
        assert_same_path("dpmpp_sde", {**SDXL, "lower_order_final": False, "final_sigmas_type": "sigma_min"}, steps)
    for name in ("dpmpp_3m", "dpmpp_3m_sde"):
        assert_same_path(
            name,
            {**SDXL, "timestep_spacing": "linspace", "lower_order_final": False, "final_sigmas_type": "sigma_min"},
            6,
        )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", STEPS)
def test_lcm_equals_diffusers(steps, prediction):
    assert_same_path("lcm", {**SDXL, "prediction_type": prediction}, steps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [None, 0.0, 0.3, 0.77, 1.0])
def test_tcd_equals_diffusers(eta, prediction):
    for steps in STEPS:
        assert_same_path("tcd", {**SDXL, "prediction_type": prediction}, steps, eta=eta)


@pytest.mark.parametrize("eta", [0.1, 0.3, 0.7, 0.9])
def test_tcd_jumps_to_the_timesteps_of_diffusers_for_every_next_timestep(eta):
    abar = alphas_cumprod(SDXL)
    schedule = make_schedule("tcd", 999, SDXL, eta=eta, timesteps=list(range(999, 0, -1)))
    for step, first in enumerate(range(998, 0, -1)):
        then = torch.tensor(first)
        theirs = int(torch.floor((1 - eta) * then))
        # the noise put back tells how far the jump went
        back = float(schedule.update[step, 0, 5])
        assert back == pytest.approx(float(np.sqrt(1 - abar[first] / abar[theirs])), abs=1e-6)


@pytest.mark.parametrize("name", TIMESTEP_SCHEDULERS)
def test_explicit_timesteps_equal_diffusers(name):
    for timesteps in ([800], [999, 759, 499, 259], [981, 780, 500, 330, 70, 2], list(range(960, 0, -60))):
        assert_same_path(name, {**SDXL, "timestep_spacing": "trailing"}, len(timesteps), timesteps=timesteps)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "betas",
    [
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(1e-4, 0.015, 1000).tolist()},
    ],
    ids=["linear", "cosine", "given"],
)
def test_other_noise_schedules_equal_diffusers(name, betas):
    config = {**betas, "prediction_type": "v_prediction"}
    config |= {"ddim": {"clip_sample": False, "steps_offset": 1}, "lcm": {}, "tcd": {}}.get(
        name, {"timestep_spacing": "leading", "steps_offset": 1}
    )
    if name == "ddim":
        config["set_alpha_to_one"] = False
    assert_same_path(name, config, 10)


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n != "dpmpp_sde"])
def test_zero_terminal_snr_with_v_prediction_equals_diffusers(name):
    config = {**SDXL, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config |= {"clip_sample": False, "set_alpha_to_one": False} if name == "ddim" else {}
    # diffusers' Euler takes the difference of two float32 numbers near 4096 in its first step, and is off itself
    assert_same_path(name, config, 10, tolerance=1e-4 if name.startswith("euler") else 1e-5)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
@pytest.mark.parametrize("levels", ["_karras", "_exponential"])
def test_zero_terminal_snr_with_spread_levels_equals_diffusers(name, levels):
    config = {**SDXL, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert_same_path(name + levels, config, 10, tolerance=1e-4 if name == "euler" else 1e-5)


def test_zero_terminal_snr_for_dpmpp_sde_is_what_diffusers_has_for_its_other_solvers():
    """diffusers' singlestep solver has no such setting; put into it, the levels of the others give our path."""
    config = {**SDXL, "prediction_type": "v_prediction"}
    scheduler, other = (
        diffusers_scheduler("dpmpp_sde", config),
        diffusers_scheduler("dpmpp_2m", {**config, "rescale_betas_zero_snr": True}),
    )
    scheduler.alphas_cumprod = other.alphas_cumprod
    scheduler.set_timesteps(10)
    schedule = make_schedule("dpmpp_sde", 10, {**config, "rescale_betas_zero_snr": True})
    assert_schedule_walks(schedule, "dpmpp_sde", scheduler)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_forward_noising_equals_add_noise_of_diffusers(name):
    config = {**SDXL, "timestep_spacing": "trailing"} if name not in ("lcm", "tcd") else SDXL
    scheduler = diffusers_scheduler(name, config)
    scheduler.set_timesteps(12)
    schedule = make_schedule(name, 12, config)
    generator = torch.Generator().manual_seed(3)
    picture, noise = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    for i, timestep in enumerate(scheduler.timesteps):
        f0, f1 = schedule.forward[i]
        theirs = scheduler.add_noise(picture, noise, timestep[None])
        torch.testing.assert_close(f0 * picture + f1 * noise, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("steps", "start"), [(20, 8), (20, 9), (5, 2), (4, 3), (16, 15)])
def test_sampling_that_starts_at_a_picture_equals_diffusers(name, steps, start):
    config = {**SDXL, "steps_offset": 1, "timestep_spacing": "leading"}
    if name == "ddim":
        config |= {"clip_sample": False, "set_alpha_to_one": False}
    assert_same_path(name, config, steps, start=start)


@pytest.mark.parametrize("name", ["dpmpp_2m_karras", "dpmpp_3m_sde_exponential", "unipc_karras", "euler_karras"])
def test_sampling_with_other_noise_levels_that_starts_at_a_picture_equals_diffusers(name):
    assert_same_path(name, {**SDXL, "timestep_spacing": "leading", "steps_offset": 1}, 20, start=7)
