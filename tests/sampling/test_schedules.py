"""Every schedule walks the same path as diffusers' scheduler of that name, step by step, on a toy model."""

import numpy as np
import pytest
import torch

from stylefast.errors import InvalidRequest
from stylefast.kernels.guided_step import guided_step
from stylefast.sampling import SCHEDULERS, SDXL_SCHEDULER, alphas_cumprod, ddim_invert, make_schedule, pinned_latents

SHAPE = (1, 4, 5, 7)
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GOOGLE_DDIM = {**SDXL, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 0}


def toy_model(latents, timestep):
    """Roughly the noise in `latents`, bent so that errors of the sampler come back amplified."""
    return 0.9 * latents + 0.2 * torch.sin(3 * latents + timestep / 200)


def diffusers_scheduler(name, config):
    import diffusers

    kinds = {
        "ddim": diffusers.DDIMScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
        "lcm": diffusers.LCMScheduler,
    }
    return kinds[name](**config)


def diffusers_path(name, config, steps, eta=0.0, seed=0):
    """(timesteps, inputs to the model, latents after each step) of diffusers' scheduler."""
    scheduler = diffusers_scheduler(name, config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    extra = {"ddim": {"eta": eta}}.get(name, {})
    if name in ("ddim", "euler_ancestral", "lcm"):
        extra["generator"] = generator
    inputs, path = [], []
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(toy_model(seen, timestep), timestep, latents, **extra).prev_sample
        inputs.append(seen)
        path.append(latents)
    return scheduler, inputs, path


def our_path(schedule, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(SHAPE, generator=generator) * schedule.init_noise_scale
    anchor, history = torch.zeros(SHAPE), torch.zeros(1, 2, *SHAPE[1:])
    one_branch = torch.tensor([[-1, -1, -1, 0]]), torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.zeros(1)
    inputs, path = [], []
    for i in range(schedule.steps):
        seen = latents * schedule.input_scale[i]
        output = toy_model(seen, schedule.timesteps[i])
        noise = torch.randn(SHAPE, generator=generator) if schedule.uses_noise else torch.zeros(SHAPE)
        latents, anchor, history = guided_step(
            latents, anchor, history, output, *one_branch, schedule.denoised[i : i + 1], schedule.update[i : i + 1],
            noise,
        )
        inputs.append(seen)
        path.append(latents)
    return inputs, path


def assert_same_path(name, config, steps, eta=0.0, tolerance=1e-5):
    scheduler, their_inputs, theirs = diffusers_path(name.removesuffix("_karras"), config, steps, eta)
    schedule = make_schedule(name, steps, config, eta=eta)
    torch.testing.assert_close(schedule.timesteps, scheduler.timesteps.float(), atol=1e-3, rtol=0)
    assert schedule.init_noise_scale == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    inputs, ours = our_path(schedule)
    for step in range(steps):
        # the latents of Euler samplers begin at some 14 (or 4096) times unit variance
        scale = max(1.0, float(theirs[step].abs().max()))
        torch.testing.assert_close(ours[step] / scale, theirs[step] / scale, atol=tolerance, rtol=0)
        torch.testing.assert_close(inputs[step], their_inputs[step], atol=tolerance, rtol=tolerance)


STEPS = [1, 2, 3, 4, 20, 50]
SPACED = ["leading", "linspace", "trailing"]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_equals_diffusers(steps, eta, prediction):
    assert_same_path("ddim", {**SDXL, "clip_sample": False, "steps_offset": 1, "prediction_type": prediction,
                              "set_alpha_to_one": False, "timestep_spacing": "leading"}, steps, eta)


@pytest.mark.parametrize("spacing", SPACED)
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_equals_diffusers_in_every_spacing_also_where_steps_do_not_divide(spacing, to_one):
    for steps in (7, 30):
        assert_same_path("ddim", {**SDXL, "clip_sample": False, "steps_offset": 0, "set_alpha_to_one": to_one,
                                  "timestep_spacing": spacing}, steps, 0.5)


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
    assert_same_path("euler_ancestral", {**SDXL, "steps_offset": 1, "timestep_spacing": spacing,
                                         "prediction_type": prediction}, steps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", SPACED)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("karras", [False, True], ids=["trained levels", "karras levels"])
@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_multistep_samplers_equal_diffusers(name, karras, steps, spacing, prediction):
    config = {**SDXL, "steps_offset": 1, "timestep_spacing": spacing, "prediction_type": prediction}
    assert_same_path(name, {**config, "use_karras_sigmas": karras}, steps)


@pytest.mark.parametrize("karras", [False, True], ids=["trained levels", "karras levels"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "unipc"])
def test_a_path_that_ends_at_the_smallest_noise_level_equals_diffusers(name, karras):
    for steps in (4, 20):
        assert_same_path(name, {**SDXL, "timestep_spacing": "linspace", "final_sigmas_type": "sigma_min",
                                "use_karras_sigmas": karras}, steps)


def test_orders_at_the_end_equal_diffusers():
    assert_same_path("dpmpp_2m", {**SDXL, "timestep_spacing": "linspace", "euler_at_final": True,
                                  "final_sigmas_type": "sigma_min"}, 20)
    assert_same_path("dpmpp_2m", {**SDXL, "timestep_spacing": "linspace", "lower_order_final": False,
                                  "final_sigmas_type": "sigma_min"}, 6)
    assert_same_path("unipc", {**SDXL, "timestep_spacing": "linspace", "lower_order_final": False,
                               "final_sigmas_type": "sigma_min"}, 6)
    assert_same_path("unipc", {**SDXL, "timestep_spacing": "linspace", "disable_corrector": [0, 1]}, 6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", STEPS)
def test_lcm_equals_diffusers(steps, prediction):
    assert_same_path("lcm", {**SDXL, "prediction_type": prediction}, steps)


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral", "dpmpp_2m", "unipc", "lcm"])
@pytest.mark.parametrize("betas", [{"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
                                   {"beta_schedule": "squaredcos_cap_v2"},
                                   {"trained_betas": np.linspace(1e-4, 0.015, 1000).tolist()}],
                         ids=["linear", "cosine", "given"])
def test_other_noise_schedules_equal_diffusers(name, betas):
    config = {**betas, "prediction_type": "v_prediction"}
    config |= {"ddim": {"clip_sample": False, "steps_offset": 1}, "lcm": {}}.get(
        name, {"timestep_spacing": "leading", "steps_offset": 1}
    )
    if name == "ddim":
        config["set_alpha_to_one"] = False
    assert_same_path(name, config, 10)


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral", "dpmpp_2m", "unipc", "lcm"])
def test_zero_terminal_snr_with_v_prediction_equals_diffusers(name):
    config = {**SDXL, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
              "timestep_spacing": "trailing"}
    config |= {"clip_sample": False, "set_alpha_to_one": False} if name == "ddim" else {}
    # diffusers' Euler takes the difference of two float32 numbers near 4096 in its first step, and is off itself
    assert_same_path(name, config, 10, tolerance=1e-4 if name.startswith("euler") else 1e-5)


def test_zero_terminal_snr_refuses_epsilon_where_no_signal_is_left():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(InvalidRequest, match="v_prediction"):
        make_schedule("ddim", 10, config)
    make_schedule("ddim", 10, {**config, "timestep_spacing": "leading"})


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "unipc"])
def test_the_karras_suffix_the_argument_and_the_config_mean_the_same(name):
    by_suffix = make_schedule(name + "_karras", 9)
    by_argument = make_schedule(name, 9, karras=True)
    by_config = make_schedule(name, 9, {"use_karras_sigmas": True})
    for other in (by_argument, by_config):
        assert other.name == by_suffix.name == name + "_karras"
        assert torch.equal(other.update, by_suffix.update) and torch.equal(other.timesteps, by_suffix.timesteps)
    plain = make_schedule(name, 9, {"use_karras_sigmas": True}, karras=False)
    assert plain.name == name and not torch.equal(plain.timesteps, by_suffix.timesteps)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_missing_config_keys_mean_sdxl(name):
    bare, full = make_schedule(name, 8, {}), make_schedule(name, 8, dict(SDXL_SCHEDULER))
    assert torch.equal(bare.update, full.update) and torch.equal(bare.denoised, full.denoised)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_forward_noising_equals_add_noise_of_diffusers(name):
    config = {**SDXL, "timestep_spacing": "trailing"} if name != "lcm" else SDXL
    scheduler = diffusers_scheduler(name, config)
    scheduler.set_timesteps(12)
    schedule = make_schedule(name, 12, config)
    generator = torch.Generator().manual_seed(3)
    picture, noise = torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)
    for i, timestep in enumerate(scheduler.timesteps):
        f0, f1 = schedule.forward[i]
        theirs = scheduler.add_noise(picture, noise, timestep[None])
        torch.testing.assert_close(f0 * picture + f1 * noise, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n != "euler_ancestral"])
def test_a_perfect_model_carries_the_forward_table_from_step_to_step(name):
    """If the model names the true noise, a deterministic step leads from forward[i] to forward[i + 1]."""
    schedule = make_schedule(name, 15, {"set_alpha_to_one": True, "timestep_spacing": "trailing"})
    if schedule.uses_noise:
        assert schedule.forward[-1].tolist() == [1.0, 0.0]
        return
    for i in range(schedule.steps):
        # as coefficients of (z0, noise): latents are forward[i], every x0 is (1, 0), the anchor forward[i - 1]
        clean, latents = torch.tensor([1.0, 0.0]), schedule.forward[i]
        terms = torch.stack([latents, schedule.forward[max(i - 1, 0)], clean, clean, clean, torch.zeros(2)])
        reached = schedule.update[i, 0] @ terms
        # ddim's own step length differs from the spacing's by rounding
        tolerance = 6e-3 if name == "ddim" else 1e-5
        torch.testing.assert_close(reached, schedule.forward[i + 1], atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("steps", range(1, 101))
def test_trailing_spacing_gives_as_many_steps_as_asked(steps):
    schedule = make_schedule("euler", steps, spacing="trailing")
    assert schedule.steps == steps and float(schedule.timesteps.min()) >= 0


def test_only_samplers_that_add_noise_say_so():
    noisy = {name for name in SCHEDULERS if make_schedule(name, 6).uses_noise}
    assert noisy == {"euler_ancestral", "lcm"}
    assert make_schedule("ddim", 6, eta=0.3).uses_noise
    assert not make_schedule("lcm", 1).uses_noise


@pytest.mark.parametrize("name", SCHEDULERS)
def test_first_steps_do_not_read_history_or_anchor_that_is_not_there_yet(name):
    schedule = make_schedule(name, 6)
    assert not schedule.update[0, :, [1, 3, 4]].any() and not schedule.update[1, :, 4].any()


BAD_REQUESTS = {
    "unknown name": (("heun", 10), {}, "dpmpp_2m"),
    "no steps": (("euler", 0), {}, "1 to 1000"),
    "too many steps": (("euler", 1001), {}, "1 to 1000"),
    "half a step": (("euler", 2.5), {}, "whole number"),
    "more steps than LCM knows": (("lcm", 51), {}, "50"),
    "eta without ddim": (("euler", 5), {"eta": 0.5}, "ddim"),
    "eta above one": (("ddim", 5), {"eta": 1.5}, r"\[0, 1\]"),
    "karras without its form": (("ddim_karras", 5), {}, "Karras"),
    "suffix against argument": (("euler_karras", 5), {"karras": False}, "contradicts"),
    "unknown spacing": (("euler", 5), {"spacing": "even"}, "trailing"),
    "clipped samples": (("ddim", 5, {"clip_sample": True}), {}, "clip_sample"),
    "unknown betas": (("ddim", 5, {"beta_schedule": "sigmoid"}), {}, "scaled_linear"),
    "unknown prediction": (("ddim", 5, {"prediction_type": "flow"}), {}, "epsilon"),
    "steps beyond the trained range": (("euler", 1000), {}, "trailing"),
    "repeated timesteps": (("dpmpp_2m", 1000, {"steps_offset": 0}), {}, "fewer steps"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_refuses_with_a_way_out(case):
    args, options, words = BAD_REQUESTS[case]
    with pytest.raises(InvalidRequest, match=words):
        make_schedule(*args, **options)


def test_inversion_starts_with_an_identity_and_ends_at_the_clean_latent():
    clean = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(1))
    visited = []

    def predict(latents, timestep):
        visited.append(timestep)
        return toy_model(latents, torch.tensor(timestep))

    trajectory = ddim_invert(predict, clean, alphas_cumprod(GOOGLE_DDIM), steps=50)
    assert trajectory.shape == (51, 4, 6, 6) and trajectory.dtype == clean.dtype
    assert visited == list(range(0, 1000, 20))
    assert torch.equal(trajectory[50], clean)
    torch.testing.assert_close(trajectory[49], clean, atol=1e-6, rtol=0)
    assert (trajectory[48] - clean).abs().max() > 1e-3


def test_inversion_with_the_true_noise_is_forward_noising():
    generator = torch.Generator().manual_seed(2)
    picture, noise = torch.randn(2, 4, 6, 6, generator=generator)
    for kind in ("epsilon", "v_prediction"):
        abar = torch.from_numpy(alphas_cumprod(GOOGLE_DDIM)).float()
        start = abar[0].sqrt() * picture + (1 - abar[0]).sqrt() * noise
        source = [abar[0], *abar[::100][:-1]]

        def predict(latents, timestep, kind=kind, abar=abar, source=source):
            a = source[int(timestep) // 100]
            return noise if kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * picture

        trajectory = ddim_invert(predict, start, abar, steps=10, prediction_type=kind)
        expected = abar[900].sqrt() * picture + (1 - abar[900]).sqrt() * noise
        torch.testing.assert_close(trajectory[0], expected, atol=1e-5, rtol=1e-5)


def test_ddim_walks_an_inverted_trajectory_back():
    """With a prediction that ignores the latents both directions use the same noise at each timestep."""
    clean = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(1))
    config = GOOGLE_DDIM
    predict = lambda latents, timestep: torch.full_like(clean, 0.3 + timestep / 1000)  # noqa: E731
    trajectory = ddim_invert(predict, clean, alphas_cumprod(config), steps=20)
    schedule = make_schedule("ddim", 20, config)
    latents = trajectory[0]
    for i, timestep in enumerate(schedule.timesteps.tolist()):
        x0 = schedule.denoised[i, 0] * latents + schedule.denoised[i, 1] * predict(latents, timestep)
        latents = schedule.update[i, 0, 0] * latents + schedule.update[i, 0, 2] * x0
        torch.testing.assert_close(latents, trajectory[i + 1], atol=2e-5, rtol=1e-5)


def test_pinned_latents_follow_the_release():
    trajectory = torch.arange(51.0)[:, None, None, None].expand(51, 1, 2, 2)
    seen = [int(pinned_latents(trajectory, step)[0, 0, 0]) for step in range(51)]
    assert seen == [5, 6, 6, 6, 6, 6, 6, *range(7, 51)]
    # the release's own wording: start at zts[offset]; after step i, zts[max(offset + 1, i + 1)]
    assert seen == [5] + [max(5 + 1, i + 1) for i in range(50)]


@pytest.mark.parametrize("step, offset", [(-1, 5), (51, 5), (0, 50), (0, -1)])
def test_pinned_latents_refuse_what_the_trajectory_does_not_hold(step, offset):
    with pytest.raises(InvalidRequest, match="trajectory"):
        pinned_latents(torch.zeros(51, 1, 2, 2), step, offset)
