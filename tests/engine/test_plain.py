"""Plain generation against diffusers' own pipeline: samplers, guidance, sizes, seeds, pictures."""

import diffusers
import pytest
import torch

import stylefast as sf
from tests.support.fp64 import close, measured
from tests.support.oracle.sampler import SCHEDULERS, generators
from tests.support.scene import SIZE, sharp_pipeline

ALL = SCHEDULERS | {"unipc_karras": (diffusers.UniPCMultistepScheduler, {"use_karras_sigmas": True})}
PROMPTS = ["a cat", "a dog of neon"]


def theirs(pipe, prompts, scheduler="euler", seed=7, size=SIZE, guidance=5.0, steps=4, output="latent", **options):
    kind, changes = ALL[scheduler]
    sampler = kind.from_config(pipe.scheduler.config, **changes)
    parts = {**pipe.components, "scheduler": sampler}
    zeros = pipe.config.force_zeros_for_empty_prompt
    other = diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    other.set_progress_bar_config(disable=True)
    return other(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        width=size[0],
        height=size[1],
        generator=generators(range(seed, seed + len(prompts))),
        output_type=output,
        **options,
    ).images


@pytest.mark.parametrize("scheduler", ALL)
def test_guided_pictures_equal_the_pipeline_of_diffusers(pipe, draw, scheduler):
    close(draw(PROMPTS, scheduler=scheduler, seed=7, steps=4), measured(theirs, pipe, PROMPTS, scheduler))


@pytest.mark.parametrize("scheduler", ["ddim", "euler_ancestral", "lcm"])
def test_unguided_pictures_equal_the_pipeline_of_diffusers(pipe, draw, scheduler):
    actual = draw(PROMPTS, scheduler=scheduler, guidance=1.0, seed=7, steps=4)
    close(actual, measured(theirs, pipe, PROMPTS, scheduler, guidance=1.0))


def test_guidance_below_1_is_guidance_off(draw):
    for low, off in zip(draw(PROMPTS, guidance=0.3), draw(PROMPTS, guidance=1.0)):
        assert torch.equal(low, off)


def test_guidance_rescale_equals_diffusers(pipe, draw):
    actual = draw(PROMPTS, guidance=9.0, guidance_rescale=0.7, seed=7, steps=4)
    close(actual, measured(theirs, pipe, PROMPTS, guidance=9.0, guidance_rescale=0.7))
    assert (actual[0] - draw(PROMPTS, guidance=9.0, seed=7, steps=4)[0]).abs().max() > 1e-2


def test_a_negative_prompt_equals_diffusers(pipe, draw):
    actual = draw(PROMPTS, negative_prompt="oil painting", seed=7, steps=4)
    close(actual, measured(theirs, pipe, PROMPTS, negative_prompt=["oil painting"] * 2))
    assert (actual[0] - draw(PROMPTS, seed=7, steps=4)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("negative", ["", "oil painting"], ids=["", "negative"])
def test_clip_skip_equals_diffusers(pipe, draw, negative):
    options = {"negative_prompt": [negative] * 2} if negative else {}
    actual = draw(PROMPTS, clip_skip=1, negative_prompt=negative, seed=7, steps=2)
    close(actual, measured(theirs, pipe, PROMPTS, clip_skip=1, steps=2, **options))
    assert (actual[0] - draw(PROMPTS, negative_prompt=negative, seed=7, steps=2)[0]).abs().max() > 1e-2


def test_requests_that_skip_other_layers_share_a_batch_and_no_pages(engine, drawn):
    requests = [sf.Request("a cat", steps=2, clip_skip=skip, size=SIZE) for skip in (0, 1, None)]
    together = engine.generate(requests, output="latents")
    alone = [drawn("a cat", steps=2, clip_skip=skip) for skip in (0, 1, 0)]
    for found, expected in zip(together.latents, alone):
        close([found], expected)
    assert (alone[0].value[0] - alone[1].value[0]).abs().max() > 1e-2
    assert [entry["call"]["requests"][i]["clip_skip"] for i, entry in enumerate(together.metadata)] == [0, 1, 0]


@pytest.mark.parametrize(
    "skip, said",
    [
        (2, "can skip only 1 layers"),
        (-1, "clip_skip is -1"),
        (True, "clip_skip is True"),
        (1.0, "clip_skip is 1.0"),
        ("2", "clip_skip is '2'"),
    ],
    ids=str,
)
def test_layers_that_can_not_be_skipped_are_refused_before_anything_runs(engine, skip, said):
    with pytest.raises(sf.errors.InvalidRequest, match=said):
        engine.submit(sf.Request("a cat", steps=2, clip_skip=skip))


@pytest.mark.parametrize("size", [(40, 56), (72, 24), (16, 16)], ids=str)
def test_sizes_that_do_not_halve_evenly_equal_diffusers(pipe, draw, size):
    close(draw(PROMPTS, size=size, seed=7, steps=4), measured(theirs, pipe, PROMPTS, size=size))


def test_a_model_without_zeros_for_the_null_prompt_encodes_the_empty_text():
    pipe = sharp_pipeline()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    engine = sf.Engine.from_pipeline(pipe)
    actual = engine.generate(PROMPTS, size=SIZE, steps=3, seed=7, output="latents").latents
    close(actual, measured(theirs, pipe, PROMPTS, steps=3))


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_a_model_that_predicts_velocity_equals_diffusers(scheduler):
    pipe = sharp_pipeline(prediction_type="v_prediction")
    engine = sf.Engine.from_pipeline(pipe)
    actual = engine.generate(PROMPTS, size=SIZE, steps=3, seed=7, scheduler=scheduler, output="latents").latents
    close(actual, measured(theirs, pipe, PROMPTS, scheduler, steps=3))


@pytest.mark.parametrize("scheduler", ["euler", "euler_ancestral", "lcm"])
def test_a_seed_means_the_same_picture_at_every_batch_size(draw, drawn, scheduler):
    together = drawn(["a cat", "a dog", "a house"], seed=20, scheduler=scheduler, steps=3)
    close(draw("a house", seed=22, scheduler=scheduler, steps=3), together[2:])


def test_the_native_size_is_the_default_and_arrays_equal_the_decoded_pictures_of_diffusers(pipe, engine):
    assert engine.native_size == (64, 64)
    result = engine.generate(PROMPTS, steps=2, seed=7, output="np")
    assert all(picture.shape == (64, 64, 3) for picture in result.images)
    pictures = [torch.from_numpy(picture).permute(2, 0, 1) for picture in result.images]
    close(pictures, measured(theirs, pipe, PROMPTS, size=(64, 64), steps=2, output="pt"))


def test_pil_pictures_have_the_size_asked_for_and_the_pixels_of_the_arrays(engine):
    options = {"steps": 2, "size": SIZE, "seed": 7}
    picture = engine.generate("a cat", output="pil", **options).images[0]
    array = engine.generate("a cat", output="np", **options).images[0]
    assert picture.size == SIZE
    assert list(picture.tobytes()) == [round(float(value) * 255) for value in array.flatten()]


def test_the_callback_sees_every_step_and_the_running_pictures(engine):
    seen = []
    requests = [sf.Request("a cat", steps=2, size=SIZE), sf.Request("a dog", steps=3, size=SIZE)]
    result = engine.generate(requests, output="latents", callback=lambda *args: seen.append(args))
    assert [(step, steps, len(latents)) for step, steps, latents in seen] == [(1, 3, 2), (2, 3, 2), (3, 3, 1)]
    assert torch.equal(seen[-1][2][0], result.latents[1]) and torch.equal(seen[1][2][0], result.latents[0])
