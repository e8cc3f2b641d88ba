"""DDIM inversion: its end points, forward noising as a special case, and the way back."""

import pytest
import torch

from stylefast.errors import InvalidRequest
from stylefast.sampling import alphas_cumprod, ddim_invert, make_schedule, pinned_latents
from tests.support.sampler_paths import SDXL, toy_model

GOOGLE_DDIM = {**SDXL, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 0}


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
