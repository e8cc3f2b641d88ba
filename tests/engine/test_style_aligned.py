"""StyleAligned through the engine against the literal oracle in the loop of diffusers, and its acceptance list."""

from contextlib import nullcontext
from math import inf, log

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import ImageOps

import stylefast as sf
from stylefast.errors import StyleError
from stylefast.runtime import admission
from stylefast.styles.style_aligned import plain_layers
from tests.support.fp64 import close, measured
from tests.support.oracle import generation
from tests.support.oracle.style_aligned import SETTINGS, Sharing, guidance_layout, shared
from tests.support.oracle.style_aligned import plain_layers as literal_plain_layers
from tests.support.scene import SIZE, apart, by_step, clean_latents, encode, guided, picture_noise, small_picture

PROMPTS, SEEDS = ["a cat in oil", "a dog", "a house"], [30, 31, 32]
SETTINGS = SETTINGS | {
    "swap_in_the_up_blocks": {"mode": "swap", "layers": ("up_blocks.1",)},
    "most_layers_plain": {"only_self_level": 0.8},
    "everything_at_once": {
        "adain": {"q": 0.3, "v": 0.8},
        "scale": 0.7,
        "shift": 0.4,
        "share_group_norm": True,
        "layers": ("up_blocks", "mid_block"),
        "only_self_level": 0.2,
    },
}


@pytest.fixture(scope="module")
def plain(drawn):
    return drawn(PROMPTS, seed=30)


# the first prompt as the reference


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_first_prompt_lends_its_style_as_in_the_oracle(pipe, draw, plain, setting):
    actual = draw(PROMPTS, sf.StyleAligned(**setting), seed=30)
    close(actual, measured(guided, pipe, PROMPTS, SEEDS, sharing=setting))
    close(actual[:1], plain[:1])
    apart(actual[1:], plain.value[1:])


@pytest.mark.parametrize("group_norm", [False, True], ids=["", "group_norm"])
def test_full_sharing_equals_the_oracle_and_changes_the_first_prompt_too(pipe, draw, plain, group_norm):
    style = sf.StyleAligned(full_attention_share=True, share_group_norm=group_norm, adain={"q": 1.0}, shift=0.7)
    sharing = {"full_attention_share": True, "groups": (0, 0, 0, 1, 1, 1), "share_group_norm": group_norm}
    actual = draw(PROMPTS, style, seed=30)
    close(actual, measured(guided, pipe, PROMPTS, SEEDS, sharing=sharing))
    apart(actual, plain.value)


@pytest.mark.parametrize("scheduler", ["euler_ancestral", "dpmpp_2m", "unipc", "lcm"])
def test_other_samplers_equal_the_oracle(pipe, draw, scheduler):
    actual = draw(PROMPTS, sf.StyleAligned(), seed=30, scheduler=scheduler, steps=3)
    close(actual, measured(guided, pipe, PROMPTS, SEEDS, sharing={}, scheduler=scheduler, steps=3))


def test_outside_of_its_window_a_style_does_nothing(pipe, draw):
    actual = draw(PROMPTS, sf.StyleAligned(window=(0.25, 0.5), share_group_norm=True), seed=30, steps=4)
    sharing = Sharing(guidance_layout(3), share_group_norm=True)

    def within(unet, step):
        return shared(unet, sharing if step == 1 else None)

    close(actual, measured(by_step, pipe, PROMPTS, SEEDS, within, steps=4))


# references of their own


def test_a_prompt_makes_a_hidden_reference_with_the_seed_of_the_style(pipe, draw):
    style = sf.StyleAligned(prompt="fish of neon", seed=99, shift=0.5, share_group_norm=True)
    actual = draw(PROMPTS, style, seed=30, scheduler="euler_ancestral", steps=3)
    expected = measured(
        guided,
        pipe,
        ["fish of neon", *PROMPTS],
        [99, *SEEDS],
        scheduler="euler_ancestral",
        steps=3,
        sharing={"shift": 0.5, "share_group_norm": True},
    )
    close(actual, expected[1:])
    assert len(actual) == 3


# the caption is text and the scheduler decides the noise: neither knows of the other
@pytest.mark.parametrize(
    ("scheduler", "caption"),
    [
        ("euler", None),
        ("euler", "a house in neon"),
        ("ddim", None),
        ("dpmpp_2m", "a house in neon"),
        ("lcm", None),
    ],
)
def test_a_real_picture_is_pinned_to_the_noise_level_of_every_step(pipe, draw, scheduler, caption):
    picture = small_picture(4, (90, 70))
    style = sf.StyleAligned(reference=picture, prompt=caption, seed=77, shift=log(2), share_group_norm=True)
    actual = draw(PROMPTS, style, seed=30, scheduler=scheduler, steps=3)
    pinned = clean_latents(pipe, ImageOps.fit(picture, SIZE)), picture_noise(77)
    null, full = encode(pipe, [caption or "", *PROMPTS])
    expected = measured(
        generation.generate,
        pipe,
        lambda timestep: (null, full),
        generation.classifier_free(5.0),
        scheduler=scheduler,
        steps=3,
        seeds=SEEDS,
        size=(32, 48),
        pinned=pinned,
        sharing={"shift": log(2), "share_group_norm": True},
    )
    close(actual, expected)


def test_a_picture_pinned_without_guidance_equals_the_oracle(pipe, draw):
    picture = small_picture(4, SIZE)
    actual = draw(PROMPTS, sf.StyleAligned(reference=picture, prompt="a fish"), seed=30, guidance=1.0, steps=3)
    _, full = encode(pipe, ["a fish", *PROMPTS])
    expected = measured(
        generation.generate,
        pipe,
        lambda timestep: (full,),
        lambda only: only,
        scheduler="euler",
        steps=3,
        seeds=SEEDS,
        size=(32, 48),
        pinned=(clean_latents(pipe, picture), picture_noise(0)),
        sharing={},
    )
    close(actual, expected)


def test_a_picture_listed_twice_is_a_shift_of_log_2(draw, drawn):
    picture = small_picture(4)
    twice = draw(PROMPTS, sf.StyleAligned(reference=[picture, picture]), seed=30)
    close(twice, drawn(PROMPTS, sf.StyleAligned(reference=picture, shift=log(2)), seed=30))


def test_of_several_pictures_the_first_gives_the_statistics_and_all_give_tokens(draw, drawn):
    one, two = small_picture(4), small_picture(5)
    both = draw(PROMPTS, sf.StyleAligned(reference=[one, two]), seed=30)
    apart(both, draw(PROMPTS, sf.StyleAligned(reference=[two, one]), seed=30))
    apart(both, draw(PROMPTS, sf.StyleAligned(reference=one), seed=30))
    tokens_only = draw(PROMPTS, sf.StyleAligned(reference=[one, two], adain=()), seed=30)
    close(tokens_only, drawn(PROMPTS, sf.StyleAligned(reference=[two, one], adain=()), seed=30))


# the acceptance list of the specification


def test_a_target_does_not_depend_on_the_other_targets_their_number_and_order(draw, drawn):
    style = sf.StyleAligned(share_group_norm=True)
    first, *targets = [
        sf.Request(prompt, seed=seed, style=style, size=SIZE, steps=2)
        for prompt, seed in zip([*PROMPTS, "fish in neon"], range(30, 34))
    ]
    together = drawn([first, *targets])
    for order in ([0], [2, 1, 0], [1, 2]):
        for i, latents in zip(order, draw([first, *(targets[i] for i in order)])[1:]):
            close(latents, together[1 + i])


@pytest.mark.parametrize(("shift", "group_norm"), [(0.0, False), (0.0, True), (log(2), True), (-3.0, False)])
def test_a_target_with_everything_of_the_reference_is_the_reference(drawn, shift, group_norm):
    def pair(**options):
        style = sf.StyleAligned(shift=shift, share_group_norm=group_norm, **options)
        return drawn([sf.Request("a cat", seed=3, style=style, size=SIZE, steps=2)] * 2)

    same, rescaled = pair(), pair(scale=0.5)
    close(same.value[1:], same[:1])
    apart(rescaled.value[1:], rescaled.value[:1])


def test_shift_minus_infinity_is_adain_alone(draw, drawn):
    muted = draw(PROMPTS, sf.StyleAligned(shift=-inf), seed=30)
    close(muted, drawn(PROMPTS, sf.StyleAligned(share_attention=False), seed=30))


def test_scale_0_gives_uniform_logits_and_does_not_turn_sharing_off(pipe, draw):
    actual = draw(PROMPTS, sf.StyleAligned(scale=0.0), seed=30)
    close(actual, measured(guided, pipe, PROMPTS, SEEDS, sharing={"scale": 0.0}))
    apart(actual[1:], draw(PROMPTS, sf.StyleAligned(share_attention=False), seed=30)[1:])


@pytest.mark.parametrize("level", [0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("count", [70, 17])
def test_only_self_level_leaves_the_published_layers_plain(count, level):
    marked = int((1 - level if level > 0.5 else level) * count)
    if level in (0, 1) or marked:
        assert plain_layers(count, level).tolist() == literal_plain_layers(count, level)


@pytest.mark.parametrize(("level", "same_as"), [(0.001, 0.0), (0.999, 1.0)])
def test_levels_that_round_to_no_layer_are_the_nearest_end(draw, drawn, level, same_as):
    close(
        draw(PROMPTS, sf.StyleAligned(only_self_level=level), seed=30),
        drawn(PROMPTS, sf.StyleAligned(only_self_level=same_as), seed=30),
    )


@pytest.mark.parametrize("pictures", [1, 2, 3])
def test_without_guidance_the_first_prompt_is_the_only_reference(pipe, draw, pictures):
    actual = draw(PROMPTS[:pictures], sf.StyleAligned(share_group_norm=True), seed=30, guidance=1.0)
    expected = measured(
        guided, pipe, PROMPTS[:pictures], SEEDS[:pictures], guidance=1.0, sharing={"share_group_norm": True}
    )
    close(actual, expected)


def test_a_batch_of_one_is_plain(draw, plain):
    close(draw(PROMPTS[:1], sf.StyleAligned(), seed=30), plain[:1])


def test_readers_with_and_without_guidance_share_a_reference(pipe, draw):
    style = sf.StyleAligned()
    requests = [
        sf.Request(prompt, seed=seed, style=style, guidance=guidance, size=SIZE, steps=2)
        for prompt, seed, guidance in zip(PROMPTS, SEEDS, (1.0, 5.0, 1.0))
    ]
    unguided, between, third = draw(requests)
    literal = measured(guided, pipe, PROMPTS, SEEDS, guidance=1.0, sharing={})
    close([unguided, third], literal[[0, 2]])

    # the guided target reads, in each of its branches, the same branch of the unguided reference
    null, full = encode(pipe, PROMPTS[:2])

    def combine(null_prediction, full_prediction):
        both = generation.classifier_free(5.0)(null_prediction, full_prediction)
        return torch.stack([full_prediction[0], both[1]])

    expected = measured(
        generation.generate,
        pipe,
        lambda timestep: (null, full),
        combine,
        scheduler="euler",
        steps=2,
        seeds=SEEDS[:2],
        size=(32, 48),
        sharing={},
    )
    close([between], expected[1:])


def test_readers_that_differ_in_guidance_rescale_have_references_of_their_own(draw, drawn):
    style = sf.StyleAligned(prompt="fish of neon", seed=99)
    requests = [
        sf.Request(prompt, seed=3, style=style, guidance_rescale=rescale, guidance=8.0, size=SIZE, steps=2)
        for prompt, rescale in (("a cat", 0.0), ("a dog", 0.8))
    ]
    for request, together in zip(requests, draw(requests)):
        close([together], drawn(request))


def test_readers_of_a_picture_share_its_rows_whatever_their_guidance(engine, draw, drawn, monkeypatch):
    style = sf.StyleAligned(reference=small_picture(4))
    requests = [
        sf.Request("a cat", seed=3, style=style, guidance=guidance, size=SIZE, steps=2) for guidance in (1.0, 4.0, 8.0)
    ]
    alone = [drawn(request) for request in requests]
    rows, forward = [], engine.unet.forward
    monkeypatch.setattr(
        engine.unet,
        "forward",
        lambda latents, *rest, **named: rows.append(len(latents)) or forward(latents, *rest, **named),
    )
    together = draw(requests)
    assert rows == [1 + 2 + 2 + 2] * 2
    for one, latents in zip(alone, together):
        close([latents], one)


def test_two_styles_make_two_groups(draw, drawn):
    first, second = sf.StyleAligned(), sf.StyleAligned(scale=0.5, mode="swap")
    requests = [
        sf.Request(f"a {word}", seed=seed, style=style, size=SIZE, steps=2)
        for seed, (word, style) in enumerate(
            [("cat", first), ("dog", second), ("house", first), ("fish", second), ("oil", None)]
        )
    ]
    together = draw(requests)
    for members in ([0, 2], [1, 3], [4]):
        close([together[i] for i in members], drawn([requests[i] for i in members]))


def test_a_plain_call_after_a_styled_one_is_bit_equal_and_the_weights_are_untouched(engine, draw):
    weights = {name: value.clone() for name, value in engine.unet.state_dict().items()}
    before = draw(PROMPTS, seed=30)
    styles = [sf.StyleAligned(share_group_norm=True), sf.InstantStyle(small_picture(1))]
    draw(PROMPTS, styles, seed=30)
    draw(PROMPTS, [sf.StyleAligned(full_attention_share=True)], seed=30)
    for old, new in zip(before, draw(PROMPTS, seed=30)):
        assert torch.equal(old, new)
    for name, value in engine.unet.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_full_sharing_with_a_window_equals_the_oracle(pipe, draw):
    actual = draw(PROMPTS[:2], sf.StyleAligned(full_attention_share=True, window=(0.0, 0.5)), seed=30, steps=3)
    sharing = Sharing(guidance_layout(2), full_attention_share=True, groups=(0, 0, 1, 1))
    expected = measured(
        by_step,
        pipe,
        PROMPTS[:2],
        SEEDS[:2],
        lambda unet, step: shared(unet, sharing) if step < 2 else nullcontext(),
        steps=3,
    )
    close(actual, expected)


def literal_inversion(pipe, clean, caption: str, steps: int, guidance: float) -> list[torch.Tensor]:
    """DDIM inversion by the equations, on diffusers' UNet: latents from the noisiest to the picture."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - beta, 0)
    null, full = encode(pipe, [caption])
    time_ids = torch.tensor([[32.0, 48.0, 0, 0, 32.0, 48.0]])
    latents, found, level = clean, [clean], alphas[0]
    for timestep in range(0, steps * (1000 // steps), 1000 // steps):
        predictions = []
        for states, pooled in (null, full):
            conditions = {"text_embeds": pooled, "time_ids": time_ids}
            with torch.no_grad():
                predictions.append(pipe.unet(latents[None], timestep, states, added_cond_kwargs=conditions).sample[0])
        noise = predictions[0] + guidance * (predictions[1] - predictions[0])
        signal = (latents - (1 - level).sqrt() * noise) / level.sqrt()
        level = alphas[timestep]
        latents = level.sqrt() * signal + (1 - level).sqrt() * noise
        found.append(latents)
    return found[::-1]


def test_the_inversion_of_a_picture_follows_the_equations(pipe, draw, monkeypatch):
    picture, found = small_picture(4, SIZE), []
    pin = admission.inverted_pin
    monkeypatch.setattr(admission, "inverted_pin", lambda trail: found.append(torch.stack(trail[::-1])) or pin(trail))
    style = sf.StyleAligned(reference=picture, prompt="a fish", noise="ddim", inversion_guidance=1.5)
    draw(PROMPTS, style, seed=30, scheduler="ddim", steps=4)

    clean = clean_latents(pipe, picture)[0]
    starts = clean, clean * 1.000001
    literal, moved = (torch.stack(literal_inversion(pipe, start, "a fish", 4, 1.5)) for start in starts)
    # a random UNet magnifies rounding on the way up: ours is held to what a millionth more does to the literal walk
    allowed = 5 * (moved - literal).abs().amax((1, 2, 3)) + 1e-6
    assert ((found[0] - literal).abs().amax((1, 2, 3)) <= allowed).all()
    # the first step of an inversion is the identity
    apart(literal[:-2], [clean] * 3)


def test_an_inverted_picture_is_pinned_as_in_the_authors_notebook(pipe, draw, monkeypatch):
    picture, steps, prompts = small_picture(4, SIZE), 11, PROMPTS[:1]
    sample = literal_inversion(pipe, clean_latents(pipe, picture)[0], "a fish", steps, 2.0)
    pin = admission.inverted_pin
    monkeypatch.setattr(admission, "inverted_pin", lambda trail: pin(sample[::-1]))
    style = sf.StyleAligned(reference=picture, prompt="a fish", noise="ddim")
    actual = draw(prompts, style, seed=30, scheduler="ddim", steps=steps, guidance=2.0)

    # a tenth of the steps in, and one more after the first step
    pinned = [sample[1]] + [sample[max(2, step)] for step in range(1, steps)]
    config = {**pipe.scheduler.config, "steps_offset": 0, "set_alpha_to_one": False, "clip_sample": False}
    monkeypatch.setattr(generation, "make_scheduler", lambda *_: DDIMScheduler.from_config(config))
    null, full = encode(pipe, ["a fish", *prompts])
    expected = measured(
        generation.generate,
        pipe,
        lambda timestep: (null, full),
        generation.classifier_free(2.0),
        scheduler="ddim",
        steps=steps,
        seeds=SEEDS[:1],
        size=(32, 48),
        pinned=pinned,
        sharing={},
    )
    close(actual, expected)
    forward = sf.StyleAligned(reference=picture, prompt="a fish")
    apart(actual, draw(prompts, forward, seed=30, scheduler="ddim", steps=steps, guidance=2.0))


def test_ddim_inversion_asks_for_ddims_steps(draw):
    style = sf.StyleAligned(reference=small_picture(4), noise="ddim")
    with pytest.raises(StyleError, match="scheduler='ddim'"):
        draw(PROMPTS, style, scheduler="euler")
