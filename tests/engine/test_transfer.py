"""DreamStyler's style transfer in one call: image to image with its stages and control, and styles in between."""

import json
import math

import numpy as np
import pytest
import torch

import stylefast as sf
from stylefast.errors import StyleError
from stylefast.record import from_record, to_record
from stylefast.styles.dream_styler import turned
from stylefast.styles.embeddings import StageEmbedding, save_embedding
from tests.support.fp64 import close, measured
from tests.support.pipelines import of_kind
from tests.support.scene import SIZE, StageTexts, apart, learned, small_picture
from tests.support.small_control import edges, small_control

STEPS, STRENGTH = 8, 0.7
PICTURE, LINES = small_picture(3).resize(SIZE), edges(1, SIZE)


@pytest.fixture(scope="module")
def net(pipe):
    return small_control(pipe, 1)


def theirs(pipe, net, embedding, scheduler):
    """Diffusers' ControlNet with image to image; before each step it is given the prompt of that step's stage."""
    made = of_kind(pipe, "ControlNetImg2Img", scheduler, controlnet=net, add_watermarker=False)
    texts = StageTexts(pipe, embedding)
    prompt = ["a cat, in the style of {}"]
    dtype = pipe.unet.dtype
    made.scheduler.set_timesteps(STEPS)
    begin = STEPS - min(int(STEPS * STRENGTH), STEPS)
    timesteps = made.scheduler.timesteps[begin:].tolist()
    null, null_pooled = (torch.zeros_like(part) for part in texts.plain([""]))  # as SDXL has it

    def next_stage(made, step, timestep, seen):
        if step + 1 < len(timesteps):
            states, pooled = texts(prompt, timesteps[step + 1])
            seen["prompt_embeds"] = torch.cat([null, states]).to(dtype)
            seen["add_text_embeds"] = torch.cat([null_pooled, pooled]).to(dtype)
        return seen

    first, pooled = texts(prompt, timesteps[0])
    pixels = torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None].to(dtype) / 127.5 - 1
    with torch.no_grad():
        clean = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    return made(
        prompt_embeds=first.to(dtype),
        pooled_prompt_embeds=pooled.to(dtype),
        negative_prompt_embeds=null.to(dtype),
        negative_pooled_prompt_embeds=null_pooled.to(dtype),
        image=clean,
        control_image=LINES,
        height=SIZE[1],
        width=SIZE[0],
        controlnet_conditioning_scale=0.7,
        strength=STRENGTH,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
        callback_on_step_end=next_stage,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "add_text_embeds"],
    ).images


@pytest.mark.parametrize("scheduler", ["euler", "ddim"])
def test_a_transfer_with_stages_and_control_equals_diffusers(pipe, net, scheduler):
    engine = sf.Engine.from_pipeline(pipe)
    engine.controls.add(net, "lines")
    style = sf.DreamStyler(learned(stages=6, vectors=2))
    options = {"image": PICTURE, "strength": STRENGTH, "steps": STEPS, "scheduler": scheduler, "seed": 3}
    request = sf.Request("a cat", style=style, control=sf.Control(LINES, "lines", weight=0.7), size=SIZE, **options)
    found = engine.generate(request, output="latents").latents
    close(found, measured(theirs, pipe, net, style.learned, scheduler))
    apart(found, engine.generate("a cat", style, output="latents", size=SIZE, **options).latents)


# styles in between


def literal(x, y, share):
    """Turn one vector: y's part that is orthogonal to x spans the plane of the arc."""
    one, other = x / x.norm(), y / y.norm()
    angle = math.acos(max(-1.0, min(1.0, float(one @ other))))
    across = other - (one @ other) * one
    direction = math.cos(share * angle) * one + math.sin(share * angle) * across / across.norm()
    return direction * ((1 - share) * x.norm() + share * y.norm())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_vectors_are_turned_along_the_arc(share):
    x, y = (torch.randn(3, 7, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2))
    found = turned(x, y, share)
    torch.testing.assert_close(found, torch.stack([literal(*both, share) for both in zip(x, y, strict=True)]))
    torch.testing.assert_close(turned(y, x, 1 - share), found)


def test_vectors_without_an_arc_move_along_a_line():
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    y = torch.tensor([[2.0, 4.0], [1.0, 1.0], [-1.0, 0.0], [3.0, 4.0]])
    torch.testing.assert_close(turned(x, y, 0.25), torch.lerp(x, y, 0.25))


def between(one, other, share):
    vectors = zip((one.clip_l, one.clip_g), (other.clip_l, other.clip_g), strict=True)
    stages = [torch.stack([turned(x[k], y[min(k, len(y) - 1)], share) for k in range(len(x))]) for x, y in vectors]
    return StageEmbedding(one.name, *stages, one.pooled_policy)


@pytest.mark.parametrize("stages", [1, 6])
def test_a_style_between_two_has_the_vectors_between(draw, stages):
    one, other = learned(vectors=2), learned("other", stages=stages, vectors=2, seed=4)
    style, wanted = sf.DreamStyler(one, towards=other, share=0.3), between(one, other, 0.3)
    for stage in range(6):
        assert all(map(torch.equal, style.stage_vectors(stage), wanted.stage(stage)))
    found = draw("a cat", style, seed=3)
    apart(found, draw("a cat", sf.DreamStyler(one), seed=3))
    apart(found, draw("a cat", sf.DreamStyler(one, towards=other, share=0.9), seed=3))


def test_mixed_stages_are_turned_too_and_a_mixed_style_lends_what_it_mixes():
    one, other, third = learned(), learned("other", seed=4), learned("third", seed=5)
    mixed = sf.DreamStyler(one, stages={2: third}, towards=other, share=0.4)
    for stage, own in ((1, one), (2, third)):
        for found, x, y in zip(mixed.stage_vectors(stage), own.stage(stage), other.stage(stage), strict=True):
            torch.testing.assert_close(found, turned(x, y, 0.4))
    lent = sf.DreamStyler(other, towards=mixed, share=1.0)
    for stage in range(6):
        torch.testing.assert_close(lent.stage_vectors(stage), mixed.stage_vectors(stage))
    assert torch.equal(sf.DreamStyler(other, stages={2: mixed}).stage_vectors(2)[0], mixed.stage_vectors(2)[0])


@pytest.mark.parametrize("in_file", [False, True])
def test_a_record_gives_the_same_style_back(draw, tmp_path, in_file):
    other = learned("other", seed=4)
    if in_file:
        save_embedding(other, tmp_path / "other.safetensors")
    given = tmp_path / "other.safetensors" if in_file else other
    request = sf.Request("a cat", style=sf.DreamStyler(learned(), towards=given, share=0.3), seed=3, steps=2, size=SIZE)
    record = json.loads(json.dumps(to_record([request])))
    (again,) = from_record(record)
    for stage in range(6):
        torch.testing.assert_close(again.styles[0].stage_vectors(stage), request.styles[0].stage_vectors(stage))
    if in_file:
        save_embedding(learned("other", seed=6), tmp_path / "other.safetensors")
        with pytest.raises(StyleError, match="'other'.* has different vectors"):
            from_record(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 0.3}, "share is 0.3, which has no effect without towards"),
        ({"towards": learned("other"), "share": 1.5}, "share is 1.5"),
        ({"towards": learned("other"), "share": "much"}, "share is 'much'"),
        ({"towards": learned("other", stages=3)}, "'other' has 3 stages and 'sks' can't be turned towards it with 6"),
        ({"towards": learned("other", vectors=2)}, "'other' has 2 vectors for stage 0 and 'sks' 1"),
        ({"towards": learned("other", pooled_policy="first_added_token")}, "'other' pools at"),
        ({"towards": 3}, "a learned style is a path or a pair of paths, not int"),
        (
            {"towards": sf.DreamStyler(learned("other"), context="by a lake")},
            "context= of the style 'other' has no effect",
        ),
        (
            {"stages": {1: sf.DreamStyler(learned("other"), guidance=sf.StyleContextGuidance(1, 1, 1))}},
            "guidance= of the style 'other' has no effect",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(StyleError, match=message):
        sf.DreamStyler(learned(), **change)
