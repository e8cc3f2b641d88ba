"""The oracle itself: identities that follow from the papers' equations, so that it can be believed."""

from dataclasses import replace

import pytest
import torch

from tests.support.fp64 import close, measured
from tests.support.oracle import dream_styler, generation, instant_style, sampler
from tests.support.oracle.style_aligned import SETTINGS, Sharing, adain, guidance_layout, plain_layers, shared
from tests.support.small_sdxl import small_pipeline
from tests.support.small_unet import CONFIG, forward, random_inputs, random_unet


@pytest.fixture(scope="module")
def unet():
    return random_unet()


@pytest.fixture(scope="module")
def inputs():
    return random_inputs(6)


def run(unet, inputs, sharing=None):
    with shared(unet, sharing):
        return forward(unet, inputs)


@pytest.fixture(scope="module")
def plain(unet, inputs):
    return measured(run, unet, inputs)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_reference_rows_are_plain_and_targets_are_not(unet, inputs, plain, setting):
    styled = run(unet, inputs, Sharing(guidance_layout(3), **setting))
    close(styled[[0, 3]], plain[[0, 3]])
    assert (plain.value - styled).abs().amax((1, 2, 3))[[1, 2, 4, 5]].min() > 1e-3


def test_layer_norm_sharing_changes_nothing(unet, inputs):
    without = measured(run, unet, inputs, Sharing(guidance_layout(3), share_group_norm=True))
    close(run(unet, inputs, Sharing(guidance_layout(3), share_group_norm=True, share_layer_norm=True)), without)


def test_the_model_is_whole_again_after_the_block(unet, inputs):
    before = run(unet, inputs)
    run(unet, inputs, Sharing(guidance_layout(3), share_group_norm=True, share_layer_norm=True))
    assert torch.equal(run(unet, inputs), before)


def test_full_sharing_of_single_rows_is_plain(unet, inputs, plain):
    alone = Sharing(guidance_layout(3), full_attention_share=True, groups=tuple(range(6)))
    close(run(unet, inputs, alone), plain)


def test_full_sharing_changes_the_reference_too(unet, inputs):
    together = Sharing(guidance_layout(3), full_attention_share=True, groups=(0, 0, 0, 1, 1, 1))
    assert (run(unet, inputs, together) - run(unet, inputs)).abs().amax((1, 2, 3)).min() > 1e-3


def test_adain_gives_the_statistics_of_the_reference():
    generator = torch.Generator().manual_seed(3)
    values, style = (torch.randn(2, 3, 50, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    out = adain(values, 3 * style - 1)
    torch.testing.assert_close(out.mean(-2), (3 * style - 1).mean(-2))
    torch.testing.assert_close(out.std(-2), (3 * style).std(-2), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("level", "count"),
    [
        (0.0, 0),
        (0.02, 1),
        (0.05, 4),
        (0.1, 7),
        (0.2, 14),
        (0.3, 24),
        (0.4, 35),
        (0.5, 35),
        (0.6, 35),
        (0.7, 46),
        (0.8, 56),
        (0.9, 63),
        (0.95, 66),
        (1.0, 70),
    ],
)
def test_counts_of_plain_layers_are_the_published_table(level, count):
    assert sum(plain_layers(70, level)) == count


def test_literal_rows_equal_the_adapter_of_diffusers(unet, inputs):
    adapter = instant_style.random_adapter(unet, 16, seed=5)
    embeds = torch.randn(6, 1, 16, generator=torch.Generator().manual_seed(6))
    mask = torch.zeros(64, 64)
    mask[:, 40:] = 1
    strengths = {"up_blocks.0.attentions.1": torch.full((6,), 0.8), "down_blocks.2.attentions.1": torch.full((6,), 0.3)}
    segment = instant_style.Segment(adapter, instant_style.image_tokens(adapter, embeds[:, 0]), strengths, mask)
    with instant_style.row_adapters(unet, [segment]):
        literal = forward(unet, inputs)
    scales = {"up": {"block_0": [0.0, 0.8, 0.0]}, "down": {"block_2": [0.0, 0.3]}}
    plain = forward(unet, inputs)

    def theirs(unet, inputs, adapter, embeds):
        with instant_style.diffusers_adapters(unet, [adapter], scales):
            return forward(unet, inputs, [embeds], [mask[None, None].to(embeds.dtype)])

    close(literal, measured(theirs, unet, inputs, adapter, embeds))
    assert (literal - plain).abs().max() > 1e-2
    assert torch.equal(forward(unet, inputs), plain)


@pytest.mark.parametrize("convention", ["code", "paper"])
@pytest.mark.parametrize(("style", "context"), [(0.5, 3.0), (3.0, 3.0), (4.0, 1.0), (0.0, 0.0)])
def test_four_term_guidance_collapses_to_two_weights(convention, style, context):
    null, ctx, sty, full = torch.randn(4, 2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    half = 0.5 if convention == "code" else 1.0
    w, d = 5.0 + half * (style + context), half * (context - style)
    literal = dream_styler.style_and_context(null, ctx, sty, full, style, context, 5.0, convention)
    torch.testing.assert_close(literal, null + w * (full - null) + d * (ctx - sty))


def test_equation_11_sums_equations_9_and_10():
    null, ctx, sty, full = torch.randn(4, 1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    both = dream_styler.style_and_context(null, ctx, sty, full, 0.7, 2.0, 0.0, "paper")
    first = dream_styler.context_first(null, ctx, full, 0.7, 2.0)
    second = dream_styler.style_first(null, sty, full, 0.7, 2.0)
    torch.testing.assert_close(both - null, (first - null) + (second - null))


@pytest.mark.parametrize(
    ("timestep", "stage"),
    [
        (0, 0),
        (166, 0),
        (167, 1),
        (333, 1),
        (334, 2),
        (499, 2),
        (500, 3),
        (666, 3),
        (667, 4),
        (833, 4),
        (834, 5),
        (999, 5),
    ],
)
def test_stages_change_at_the_published_timesteps(timestep, stage):
    assert dream_styler.stage_of(timestep, 6) == stage


@pytest.mark.parametrize("name", sampler.SCHEDULERS)
def test_a_picture_does_not_depend_on_its_neighbours(name):
    config = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

    def predict(latents, timestep, step):
        return latents.tanh() * 0.3

    def draw(seeds):
        return sampler.sample(predict, sampler.make_scheduler(name, config), 4, (4, 8, 8), seeds)

    both = draw([7, 8])
    torch.testing.assert_close(both[1:], draw([8]))
    assert torch.isfinite(both).all() and (both[0] - both[1]).abs().max() > 0.1


def test_rows_at_different_timesteps_are_independent(unet):
    inputs = random_inputs(3, timestep=None)
    together = measured(forward, unet, inputs)
    for row in range(3):
        close(forward(unet, inputs.rows([row])), together[[row]])


def test_small_config_counts_eleven_modules(unet):
    names = {name.split(".transformer_blocks")[0] for name in unet.attn_processors}
    assert len(names) == 11 and CONFIG["layers_per_block"] == 2


def test_references_may_stand_anywhere(unet, inputs):
    styled = measured(run, unet, inputs, Sharing(guidance_layout(3), share_group_norm=True))
    order = [5, 0, 2, 3, 4, 1]
    references = tuple(order.index(guidance_layout(3)[row]) for row in order)
    moved = run(unet, inputs.rows(order), replace(Sharing(references), share_group_norm=True))
    close(moved, styled[order])


def test_the_loop_equals_the_pipeline_of_diffusers():
    pipe = small_pipeline(seed=3)
    prompts, seeds = ["a cat", "neon fish in oil"], [11, 12]
    null, full = generation.encode(pipe, prompts, "a dog")
    actual = generation.generate(
        pipe,
        lambda timestep: (null, full),
        generation.classifier_free(4.0, 0.3),
        scheduler="euler_ancestral",
        steps=3,
        seeds=seeds,
        size=(32, 48),
    )
    pipe.scheduler = sampler.make_scheduler("euler_ancestral", pipe.scheduler.config)

    def theirs(pipe):
        return pipe(
            prompts,
            negative_prompt=["a dog"] * 2,
            height=32,
            width=48,
            num_inference_steps=3,
            guidance_scale=4.0,
            guidance_rescale=0.3,
            generator=sampler.generators(seeds),
            output_type="latent",
        ).images

    close(actual, measured(theirs, pipe))


def test_added_tokens_encode_as_diffusers_where_there_are_none():
    pipe = small_pipeline(seed=3)
    encoder = dream_styler.Encoder(pipe, {"<sks>": (torch.ones(32), torch.ones(32))})
    states, pooled = (
        measured(lambda pipe, part: generation.encode(pipe, ["a cat in neon"], None)[1][part], pipe, part)
        for part in range(2)
    )
    actual_states, actual_pooled = encoder("a cat in neon")
    close(actual_states, states)
    close(actual_pooled, pooled)
    styled_states, _ = encoder("a cat in <sks>")
    assert torch.equal(styled_states[:, :4], actual_states[:, :4])
    assert (styled_states - states.value)[:, 4:].abs().max() > 1e-2
