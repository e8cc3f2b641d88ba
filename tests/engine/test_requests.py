"""Requests of every kind in one call: equal to solo runs and to the oracle, with one UNet call a step and size."""

from contextlib import ExitStack

import pytest
import torch
from PIL import ImageOps

import stylefast as sf
from stylefast.runtime.plan.sample import plan_samples
from stylefast.sampling.few_step import named_schedule
from stylefast.sampling.guidance import StyleContextGuidance
from tests.support.fp64 import close, measured
from tests.support.oracle import generation
from tests.support.oracle.dream_styler import style_and_context
from tests.support.oracle.generation import Pictures
from tests.support.scene import (
    RUN,
    SIZE,
    StageTexts,
    apart,
    clean_latents,
    embeds,
    encode,
    learned,
    picture_noise,
    small_picture,
)

PICTURE, OTHER = small_picture(1, (48, 40)), small_picture(2, (90, 70))
WEIGHTS = (0.5, 3.0, 5.0)


@pytest.fixture
def calls(engine, monkeypatch):
    """Rows and latent size of every call of the UNet."""
    seen, forward = [], engine.unet.forward

    def counted(latents, *rest, **named):
        seen.append((len(latents), tuple(latents.shape[2:])))
        return forward(latents, *rest, **named)

    monkeypatch.setattr(engine.unet, "forward", counted)
    return seen


def literal_composition(pipe, adapter, embedding, references, pinned):
    """All three styles under four-branch guidance, `references` in front of the two pictures that count."""
    prompts = [*references, "a cat", "a red house"]
    texts = StageTexts(pipe, embedding)
    null, _ = encode(pipe, prompts)
    # a caption of a real picture is a prompt like any other
    full, style = ([f"{p}, in the style of {{}}" for p in prompts], ["A painting in the style of {}"] * len(prompts))
    return generation.generate(
        pipe,
        lambda t: (null, texts.plain(prompts), texts(style, t), texts(full, t)),
        lambda *branches: style_and_context(*branches, *WEIGHTS, "code"),
        seeds=([] if pinned else [8] * len(references)) + [30, 31],
        pinned=pinned,
        pictures=Pictures([adapter], [{"up": {"block_0": [0.0, 0.6, 0.0]}}], [embeds(pipe, PICTURE)]),
        null_branches=(0, 1),
        sharing={"shift": 0.4, "scale": 0.9, "share_group_norm": True},
        **RUN,
    )


@pytest.mark.parametrize("reference", ["first_prompt", "hidden_prompt", "picture"])
def test_three_styles_compose_in_one_request(pipe, adapters, draw, reference):
    embedding = learned()
    options, references, pinned = {
        "first_prompt": ({}, [], None),
        "hidden_prompt": ({"prompt": "a dog", "seed": 8}, ["a dog"], None),
        "picture": (
            {"reference": OTHER, "prompt": "a dog", "seed": 8},
            ["a dog"],
            (clean_latents(pipe, ImageOps.fit(OTHER, SIZE)), picture_noise(8)),
        ),
    }[reference]
    styles = [
        sf.StyleAligned(shift=0.4, scale=0.9, share_group_norm=True, **options),
        sf.InstantStyle(PICTURE, scale=0.6),
        sf.DreamStyler(embedding, guidance=StyleContextGuidance(*WEIGHTS)),
    ]
    actual = draw(["a cat", "a red house"], styles, seed=30)
    expected = measured(literal_composition, pipe, adapters[0], embedding, references, pinned)
    close(actual, expected[-2:])
    # none of the three is idle
    for kept in ([1, 2], [0, 2], [0, 1]):
        apart(actual[1:], draw(["a cat", "a red house"], [styles[i] for i in kept], seed=30)[1:])


def different_requests():
    """Six requests with little in common, one of another size, and their styles."""
    aligned = sf.StyleAligned(reference=OTHER, shift=0.5, share_group_norm=True)
    stages = sf.DreamStyler(learned(), guidance=StyleContextGuidance(*WEIGHTS))
    small = {"size": SIZE}
    return [
        sf.Request("a cat", style=[aligned, sf.InstantStyle(PICTURE, scale=0.7)], steps=2, seed=1, **small),
        sf.Request("a dog", style=stages, steps=4, seed=9, scheduler="ddim", **small),
        sf.Request(
            "a house",
            style=sf.InstantStyle([PICTURE, OTHER], "all", 0.4),
            guidance=1.0,
            steps=2,
            seed=5,
            scheduler="lcm",
            **small,
        ),
        sf.Request(
            "a fish",
            style=sf.StyleAligned(prompt="oil painting", mode="swap", layers="up_blocks"),
            steps=3,
            seed=2**40,
            guidance=8.0,
            guidance_rescale=0.5,
            scheduler="unipc",
            size=(64, 64),
        ),
        sf.Request("neon", negative_prompt="oil", steps=2, seed=3, guidance=3.0, scheduler="euler_ancestral", **small),
        sf.Request(
            "a dog",
            style=[sf.StyleAligned(prompt="a cat", adain={"q": 0.4}), stages, sf.InstantStyle(OTHER, "precise")],
            steps=3,
            seed=4,
            scheduler="dpmpp_2m",
            **small,
        ),
    ]


def test_a_list_of_different_requests_equals_solo_runs_with_one_unet_call_a_step_and_size(engine, draw, drawn, calls):
    requests = different_requests()
    together = draw(requests)
    sizes = [size for _, size in calls]
    assert sizes.count((8, 12)) == 4 and sizes.count((16, 16)) == 3 and len(sizes) == 7
    for request, latents in zip(requests, together):
        close([latents], drawn(request))


def test_the_order_of_requests_is_the_order_of_the_results(draw, drawn):
    requests = [
        sf.Request("a cat", seed=seed, size=size, steps=steps)
        for seed, (size, steps) in enumerate([(SIZE, 1), ((64, 64), 2), (SIZE, 3), ((64, 64), 1), (SIZE, 2)])
    ]
    order = [3, 0, 4, 2, 1]
    together = drawn(requests)
    for place, latents in zip(order, draw([requests[i] for i in order])):
        close(latents, together[place])


def test_readers_of_one_style_object_share_its_reference_rows(draw, calls):
    style = sf.StyleAligned(reference=OTHER)
    draw(["a cat", "a dog", "a house"], style)
    assert calls == [(8, (8, 12))] * 2


def test_finished_requests_take_no_rows(draw, calls):
    requests = [
        sf.Request("a cat", steps=steps, size=SIZE, guidance=guidance)
        for steps, guidance in ((1, 5.0), (3, 1.0), (2, 5.0))
    ]
    draw(requests)
    assert [rows for rows, _ in calls] == [5, 3, 1]


def test_prompts_and_requests_mix_and_prompts_take_the_settings_of_the_call(draw, drawn):
    request = sf.Request("a dog", steps=2, seed=9, guidance=2.0, size=SIZE)
    options = {"seed": 4, "guidance": 3.0, "negative_prompt": "oil"}
    first, second, third = draw(["a cat", request, "a house"], sf.InstantStyle(PICTURE), **options)
    close([first], drawn("a cat", sf.InstantStyle(PICTURE), **options))
    close([second], drawn(request))
    close([third], drawn("a house", sf.InstantStyle(PICTURE), **options | {"seed": 6}))


def test_a_request_does_not_depend_on_what_ran_before(engine, draw):
    requests = different_requests()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(123)
        before = draw(requests[4])
        draw(requests)
        torch.manual_seed(321)
        assert torch.equal(before[0], draw(requests[4])[0])


def test_the_metadata_names_every_picture_and_the_call(engine):
    result = engine.generate(["a cat", "a dog"], seed=5, size=SIZE, steps=1, output="latents")
    assert [(entry["index"], entry["seed"]) for entry in result.metadata] == [(0, 5), (1, 6)]
    assert len(result.metadata[0]["call"]["requests"]) == 2 and result.images == []


def test_readers_that_skip_other_layers_do_not_share_a_references_text():
    style = sf.StyleAligned(prompt="a neon cat")
    requests = [sf.Request("a dog", style=style, clip_skip=skip) for skip in (0, 1, 1)]
    schedule = named_schedule("euler", 4)
    found = plan_samples(requests, lambda request, begin: schedule, (16, 16))
    assert [sample.request.clip_skip for sample in found] == [0, 1, 1, 0, 1]
