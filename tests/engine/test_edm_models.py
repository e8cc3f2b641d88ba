"""Models of EDM's kind (Playground v2.5, CosXL) draw what diffusers draws, and refuse what needs training timesteps."""

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

import stylefast as sf
from stylefast.errors import InvalidRequest, StyleError
from tests.support.scene import SIZE, STEPS, learned, sharp_pipeline
from tests.support.small_adapter import small_picture

PLAYGROUND = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "prediction_type": "epsilon"}
COSXL = {
    "sigma_min": 0.002,
    "sigma_max": 120.0,
    "sigma_data": 1.0,
    "prediction_type": "v_prediction",
    "sigma_schedule": "exponential",
}
MODELS = {
    "playground": (EDMDPMSolverMultistepScheduler(**PLAYGROUND), "dpmpp_2m"),
    "cosxl": (EDMEulerScheduler(**COSXL), "euler"),
}


@pytest.fixture(scope="module")
def pipe():
    return sharp_pipeline()


@pytest.fixture(scope="module")
def engine(pipe):
    pipe.scheduler = EDMEulerScheduler(**PLAYGROUND)
    return sf.Engine.from_pipeline(pipe)


@pytest.mark.parametrize("model", MODELS)
def test_draws_what_diffusers_draws(pipe, model):
    pipe.scheduler, name = MODELS[model]
    engine = sf.Engine.from_pipeline(pipe)
    ours = engine.generate("a cat", steps=STEPS, size=SIZE, scheduler=name, seed=4, output="latents").latents[0]
    noise = torch.randn(1, *ours.shape, generator=torch.Generator().manual_seed(4))

    def stock(dtype):
        pipe.to(dtype)
        return (
            pipe(
                "a cat",
                num_inference_steps=STEPS,
                width=SIZE[0],
                height=SIZE[1],
                guidance_scale=5.0,
                latents=noise.to(dtype),
                output_type="latent",
            )
            .images[0]
            .double()
        )

    theirs = stock(torch.float32)
    exact = stock(torch.float64)
    pipe.to(torch.float32)
    rounding = max(2 * float((theirs - exact).abs().max()), 1e-6 * float(exact.abs().max()))
    assert float((ours - exact).abs().max()) <= rounding


def test_a_picture_and_a_style_of_one_stage_serve_as_elsewhere(engine):
    styles = [sf.StyleAligned(reference=small_picture()), sf.DreamStyler(learned(stages=1))]
    found = engine.generate("a cat", styles, steps=STEPS, size=SIZE, output="latents").latents[0]
    plain = engine.generate("a cat", steps=STEPS, size=SIZE, output="latents").latents[0]
    assert torch.isfinite(found).all() and (found - plain).abs().max() > 1e-3 * plain.abs().max()


def test_what_needs_training_timesteps_is_refused_when_it_is_submitted(engine):
    def submit(**options):
        engine.submit(sf.Request("a cat", steps=STEPS, size=SIZE, **options))

    with pytest.raises(
        InvalidRequest, match="scheduler 'unipc' uses a model's training timesteps.*choose one of euler, "
    ):
        submit(scheduler="unipc")
    with pytest.raises(InvalidRequest, match="spacing='trailing'"):
        submit(spacing="trailing")
    with pytest.raises(StyleError, match="<sks> has vectors for 6 ranges.*one stage"):
        submit(style=sf.DreamStyler(learned(stages=6)))
    with pytest.raises(StyleError, match="noise='ddim'.*noise='forward'"):
        submit(style=sf.StyleAligned(reference=small_picture(), noise="ddim"), scheduler="ddim")
