"""What holds of every schedule by itself: its laws, its names, its memory, and what it refuses."""

import sys

import numpy as np
import pytest
import torch

from stylefast.errors import InvalidRequest
from stylefast.sampling import (
    KARRAS_SCHEDULERS,
    SCHEDULERS,
    SDXL_SCHEDULER,
    alphas_cumprod,
    make_schedule,
    schedule_digest,
)


def test_zero_terminal_snr_refuses_epsilon_where_no_signal_is_left():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(InvalidRequest, match="v_prediction"):
        make_schedule("ddim", 10, config)
    make_schedule("ddim", 10, {**config, "timestep_spacing": "leading"})


@pytest.mark.parametrize("levels", ["karras", "exponential"])
@pytest.mark.parametrize("name", KARRAS_SCHEDULERS)
def test_the_suffix_the_argument_and_the_config_mean_the_same(name, levels):
    by_suffix = make_schedule(f"{name}_{levels}", 9)
    by_argument = make_schedule(name, 9, **{levels: True})
    by_config = make_schedule(name, 9, {f"use_{levels}_sigmas": True})
    for other in (by_argument, by_config):
        assert other.name == by_suffix.name == f"{name}_{levels}"
        assert torch.equal(other.update, by_suffix.update) and torch.equal(other.timesteps, by_suffix.timesteps)
    plain = make_schedule(name, 9, {f"use_{levels}_sigmas": True}, **{levels: False})
    assert plain.name == name and not torch.equal(plain.timesteps, by_suffix.timesteps)


def test_a_name_with_suffix_outweighs_the_other_levels_in_the_config():
    assert make_schedule("euler_exponential", 9, {"use_karras_sigmas": True}).name == "euler_exponential"
    assert make_schedule("euler_karras", 9, {"use_exponential_sigmas": True}).name == "euler_karras"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_missing_config_keys_mean_sdxl(name):
    bare, full = make_schedule(name, 8, {}), make_schedule(name, 8, dict(SDXL_SCHEDULER))
    assert torch.equal(bare.update, full.update) and torch.equal(bare.denoised, full.denoised)


@pytest.mark.parametrize("name", [*SCHEDULERS, "dpmpp_2m_sde_karras", "dpmpp_sde_exponential", "dpmpp_3m_sde_karras"])
def test_a_perfect_model_carries_the_forward_table_from_step_to_step(name):
    """If the model names the true z0, a step leads from forward[i] to forward[i + 1], fresh noise counted in."""
    schedule = make_schedule(name, 15, {"set_alpha_to_one": True})
    for i in range(schedule.steps):
        # as coefficients of (z0, noise): latents are forward[i], every x0 is (1, 0), the anchor forward[i - 1]
        clean, latents = torch.tensor([1.0, 0.0]), schedule.forward[i]
        terms = torch.stack([latents, schedule.forward[max(i - 1, 0)], clean, clean, clean, torch.zeros(2)])
        reached = schedule.update[i, 0] @ terms
        reached[1] = torch.hypot(reached[1], schedule.update[i, 0, 5])
        # ddim's own step length differs from the spacing's by rounding
        tolerance = 6e-3 if name == "ddim" else 1e-5
        torch.testing.assert_close(reached, schedule.forward[i + 1], atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("name", ["dpmpp_3m", "dpmpp_3m_sde"])
def test_the_share_of_x0_two_steps_ago_vanishes_with_the_step(name):
    """It multiplies a second difference; a constant of the wrong sign would leave it at half of alpha."""
    coarse, fine = (make_schedule(name + "_exponential", steps).update[steps // 2, 0, 4] for steps in (20, 200))
    assert 0 < abs(float(fine)) < 0.15 * abs(float(coarse))


@pytest.mark.parametrize("steps", range(1, 101))
def test_trailing_spacing_gives_as_many_steps_as_asked(steps):
    schedule = make_schedule("euler", steps, spacing="trailing")
    assert schedule.steps == steps and float(schedule.timesteps.min()) >= 0


def test_only_samplers_that_add_noise_say_so():
    noisy = {name for name in SCHEDULERS if make_schedule(name, 6).uses_noise}
    assert noisy == {"euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde", "lcm", "tcd"}
    assert make_schedule("ddim", 6, eta=0.3).uses_noise
    assert not make_schedule("tcd", 6, eta=0).uses_noise
    for name in ("lcm", "tcd", "dpmpp_2m_sde"):
        assert not make_schedule(name, 1).uses_noise


@pytest.mark.parametrize("name", SCHEDULERS)
def test_first_steps_do_not_read_history_or_anchor_that_is_not_there_yet(name):
    schedule = make_schedule(name, 6)
    assert not schedule.update[0, :, [1, 3, 4]].any() and not schedule.update[1, :, 4].any()


def test_a_prediction_type_can_be_put_in_place_of_the_configs():
    overridden = make_schedule("euler", 1, {"prediction_type": "epsilon"}, prediction_type="sample")
    assert overridden.denoised.tolist() == [[0.0, 1.0]]
    assert make_schedule("euler", 1, {"prediction_type": "epsilon"}).denoised[0, 0] == 1


def test_a_schedule_asked_for_again_is_the_same_object():
    config = {"beta_schedule": "scaled_linear", "disable_corrector": [0], "trained_betas": None}
    first = make_schedule("unipc", 12, config)
    assert make_schedule("unipc", 12, {**config, "disable_corrector": (0,)}) is first
    assert make_schedule("unipc", 12, dict(reversed(config.items()))) is first
    assert make_schedule("unipc", 12, {**config, "disable_corrector": [1]}) is not first
    assert make_schedule("unipc", 13, config) is not first


def test_betas_in_any_container_give_the_same_schedule_and_unhashable_settings_are_no_obstacle():
    betas = np.linspace(1e-4, 0.015, 1000, dtype=np.float32)
    given = [make_schedule("euler", 7, {"trained_betas": b}) for b in (betas, torch.from_numpy(betas), betas.tolist())]
    assert given[0] is given[1] is given[2]
    odd = make_schedule("euler", 7, {"trained_betas": betas, "comment": bytearray(b"x")})
    assert odd is not given[0] and torch.equal(odd.update, given[0].update)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_thirty_steps_are_laid_out_without_a_loop_over_the_thousand_of_training_and_then_remembered(name):
    def calls(config) -> int:
        """Functions called, of Python and of C, which does not depend on what else the machine does."""
        count = [0]

        def called(frame, event, argument):
            count[0] += event in ("call", "c_call")

        sys.setprofile(called)
        try:
            make_schedule(name, 30, config)
        finally:
            sys.setprofile(None)
        return count[0]

    calls({"unread": (name, 0)})  # imports and tables that are made once
    made, remembered = calls({"unread": (name, 1)}), calls({"unread": (name, 1)})
    assert remembered < 300, "this should be a look into a dictionary"
    assert made < 1000, "this should be arithmetic with whole arrays"


def test_the_digest_tells_schedules_apart_and_is_the_same_for_the_same():
    asked = [
        ("euler", 5, {}),
        ("euler", 6, {}),
        ("euler_karras", 5, {}),
        ("euler_ancestral", 5, {}),
        ("ddim", 5, {}),
        ("euler", 5, {"prediction_type": "v_prediction"}),
        ("euler", 5, {"beta_end": 0.0121}),
        ("euler", 5, {"timestep_spacing": "trailing"}),
        ("tcd", 5, {}),
        ("lcm", 5, {}),
    ]
    digests = [schedule_digest(make_schedule(*one)) for one in asked]
    assert len(set(digests)) == len(asked) and all(len(d) == 16 and int(d, 16) >= 0 for d in digests)
    unshared = make_schedule("euler", 5, {"comment": bytearray()})
    assert schedule_digest(unshared) == digests[0]
    assert schedule_digest(make_schedule("tcd", 5, eta=0.5)) != digests[-2]


RECORDED = {
    "ddim": "5d56be20d10b6a19",
    "euler": "c6466666736e59be",
    "euler_ancestral": "8e6ea5d319899327",
    "dpmpp_2m": "b8bb488ec3c1fd8d",
    "dpmpp_2m_sde": "686e6c17b91ffac3",
    "dpmpp_3m": "e0142a01da6f6dc5",
    "dpmpp_3m_sde": "1dfe9be8aa0a474a",
    "dpmpp_sde": "6cc075c049a83eab",
    "unipc": "ef1c34c80defe722",
    "lcm": "7cf2f1e03af025df",
    "tcd": "0fb6668d0030478a",
    "euler_karras": "e8a74ec718e269c6",
    "euler_exponential": "d49484edc62f5c49",
    "dpmpp_2m_karras": "d9cca6ca5af97b25",
    "dpmpp_2m_exponential": "f78850ac00e32c86",
}


def test_the_digest_is_the_same_on_every_machine():
    """A file written on one machine is read on another; these were computed once and must not change."""
    assert {name: schedule_digest(make_schedule(name, 30)) for name in RECORDED} == RECORDED


@pytest.mark.parametrize(
    "betas",
    [
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {},
        {"beta_schedule": "linear", "num_train_timesteps": 77},
    ],
)
def test_noise_levels_are_those_of_torch_in_float32(betas):
    config = {**SDXL_SCHEDULER, **betas}
    root = 0.5 if config["beta_schedule"] == "scaled_linear" else 1
    ends = config["beta_start"] ** root, config["beta_end"] ** root
    line = torch.linspace(*ends, config["num_train_timesteps"], dtype=torch.float32) ** (1 / root)
    theirs = torch.cumprod(1 - line, dim=0).double().numpy()
    np.testing.assert_allclose(alphas_cumprod(betas), theirs, rtol=3e-7)


BAD_REQUESTS = {
    "unknown name": (("heun", 10), {}, "dpmpp_2m"),
    "no steps": (("euler", 0), {}, "1 to 1000"),
    "too many steps": (("euler", 1001), {}, "1 to 1000"),
    "half a step": (("euler", 2.5), {}, "whole number"),
    "more steps than LCM knows": (("lcm", 51), {}, "50"),
    "eta without ddim": (("euler", 5), {"eta": 0.5}, "ddim"),
    "eta above one": (("ddim", 5), {"eta": 1.5}, "from 0 to 1"),
    "timesteps of another count": (("euler", 3), {"timesteps": [900, 500]}, "2 timesteps"),
    "timesteps that rise": (("lcm", 2), {"timesteps": [500, 900]}, "strictly decreasing"),
    "timesteps that repeat": (("euler", 2), {"timesteps": [500, 500]}, "strictly decreasing"),
    "timesteps beyond the trained ones": (("tcd", 1), {"timesteps": [1000]}, "999"),
    "timesteps below zero": (("tcd", 1), {"timesteps": [-1]}, "999"),
    "fractions of timesteps": (("euler", 1), {"timesteps": [499.5]}, "whole"),
    "timesteps for ddim": (("ddim", 1), {"timesteps": [800]}, "tcd"),
    "timesteps and karras": (("euler_karras", 1), {"timesteps": [800]}, "drop one"),
    "timesteps and spacing": (("euler", 1), {"timesteps": [800], "spacing": "trailing"}, "drop one"),
    "two kinds of levels": (("euler_karras", 5), {"exponential": True}, "at once"),
    "two kinds of levels in the config": (
        ("euler", 5, {"use_karras_sigmas": True, "use_exponential_sigmas": True}),
        {},
        "at once",
    ),
    "exponential without its form": (("tcd_exponential", 5), {}, "exponential"),
    "two suffixes": (("euler_karras_exponential", 5), {}, "unknown"),
    "spacing of a sampler with its own": (("lcm", 4), {"spacing": "trailing"}, "chooses its own timesteps"),
    "spacing of dpmpp_sde": (("dpmpp_sde", 4), {"spacing": "leading"}, "chooses its own timesteps"),
    "more steps than TCD knows": (("tcd", 51), {}, "50"),
    "beta levels": (("dpmpp_2m_sde", 5, {"use_beta_sigmas": True}), {}, "use_beta_sigmas"),
    "no number for eta": (("tcd", 5), {"eta": float("nan")}, "from 0 to 1"),
    "a name that is none": ((None, 5), {}, "unknown"),
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
