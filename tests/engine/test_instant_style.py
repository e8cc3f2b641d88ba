"""InstantStyle through the engine: against diffusers' own IP-Adapter, and row by row against the literal attention."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

import stylefast as sf
from stylefast.errors import AdapterError, StyleError
from tests.support.fp64 import close, measured
from tests.support.oracle.generation import Pictures
from tests.support.oracle.instant_style import STYLE, STYLE_AND_LAYOUT, Segment, image_tokens, row_adapters
from tests.support.scene import SIZE, apart, by_step, embeds, guided, small_picture

PROMPTS, SEEDS = ["a cat in oil", "a dog"], [30, 31]
STYLE_MODULE, LAYOUT_MODULE = "up_blocks.0.attentions.1", "down_blocks.2.attentions.1"
PICTURE, OTHER, THIRD = (small_picture(seed, size) for seed, size in ((1, (48, 40)), (2, (40, 64)), (3, (64, 64))))

BLOCKS = {
    "style": ("style", STYLE),
    "layout": ("layout", {"down": {"block_2": [0.0, 1.0]}}),
    "style_and_layout": ("style+layout", STYLE_AND_LAYOUT),
    "all": ("all", 1.0),
    "dictionary": ({"mid": 0.5, "up": {"block_0": [0.0, 0.35, 0.0], "block_1": 0.8}},) * 2,
    "list_of_names": (["up_blocks.0.attentions.1", "mid_block"], {"mid": 1.0, "up": {"block_0": [0.0, 1.0, 0.0]}}),
    "strong": ("strong style transfer", {"down": {"block_1": 1.0, "block_2": [1.0, 0.0]}, "mid": 1.0, "up": 1.0}),
}


@pytest.fixture(scope="module")
def plain(drawn):
    return drawn(PROMPTS, seed=30)


@pytest.fixture(scope="module")
def modules(engine):
    return engine.unet.layout.modules


def pictures(adapters, pipe, scale, *images, masks=None):
    """diffusers' first adapter with `images` at `scale`."""
    masks = None if masks is None else [torch.stack([binary(mask) for mask in masks])[None]]
    return Pictures(adapters[:1], [scale], [embeds(pipe, *images)], masks)


def binary(mask):
    return torch.from_numpy(np.array(mask).astype(np.float32) / 255)


def half_mask(size=SIZE, left=True):
    """Black and white halves with an edge between two attention queries."""
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[:, : size[0] // 2 - 3] = 255
    return Image.fromarray(pixels if left else 255 - pixels)


def segment(adapter, null_tokens, full_tokens, null_strengths, full_strengths, count=2):
    """Tokens [t, cross_dim] and {module: strength} of the null rows and of the full rows, `count` rows each."""
    tokens = torch.stack([null_tokens] * count + [full_tokens] * count)
    strengths = {
        module: torch.tensor([null_strengths.get(module, 0.0)] * count + [full_strengths.get(module, 0.0)] * count)
        for module in {**null_strengths, **full_strengths}
    }
    return Segment(adapter, tokens, strengths)


def no_picture(pipe, adapter):
    """The tokens of an embedding of zeros."""
    return image_tokens(adapter, torch.zeros(pipe.image_encoder.config.projection_dim))


def scaled(scale, factor):
    """A scale in diffusers' format, times `factor`."""
    if isinstance(scale, dict):
        return {key: scaled(value, factor) for key, value in scale.items()}
    return [factor * value for value in scale] if isinstance(scale, list) else factor * scale


# against diffusers' own adapter


# a strength multiplies what the blocks are given, whatever they are
@pytest.mark.parametrize(
    ("blocks", "scale", "strength"),
    [
        *((*block, 0.4) for block in BLOCKS.values()),
        (*BLOCKS["style"], 1.0),
        (*BLOCKS["dictionary"], 1.0),
    ],
    ids=[*BLOCKS, "style in full", "dictionary in full"],
)
def test_blocks_equal_the_scales_of_diffusers(pipe, adapters, draw, plain, blocks, scale, strength):
    actual = draw(PROMPTS, sf.InstantStyle(PICTURE, blocks, strength), seed=30)
    styled = pictures(adapters, pipe, scaled(scale, strength), PICTURE)
    expected = measured(guided, pipe, PROMPTS, SEEDS, pictures=styled)
    close(actual, expected)
    apart(actual, plain.value)


def test_without_guidance_it_equals_diffusers(pipe, adapters, draw):
    actual = draw(PROMPTS, sf.InstantStyle(PICTURE), seed=30, guidance=1.0)
    styled = pictures(adapters, pipe, STYLE, PICTURE)
    close(actual, measured(guided, pipe, PROMPTS, SEEDS, guidance=1.0, pictures=styled))


def test_several_pictures_share_one_softmax_as_in_diffusers(pipe, adapters, draw, drawn):
    images = [PICTURE, OTHER, THIRD]
    actual = draw(PROMPTS, sf.InstantStyle(images, "all", 0.7), seed=30)
    close(actual, measured(guided, pipe, PROMPTS, SEEDS, pictures=pictures(adapters, pipe, 0.7, *images)))
    close(actual, drawn(PROMPTS, sf.InstantStyle(images[::-1], "all", 0.7), seed=30))


def test_a_picture_listed_twice_is_the_picture_once(draw, drawn):
    once = drawn(PROMPTS, sf.InstantStyle(PICTURE), seed=30)
    close(draw(PROMPTS, sf.InstantStyle([PICTURE, PICTURE]), seed=30), once)


def test_embeddings_from_diffusers_equal_their_pictures(engine, pipe, draw, drawn):
    style = sf.InstantStyle(image_embeds=[embeds(pipe, PICTURE, OTHER)])
    close(draw(PROMPTS, style, seed=30), drawn(PROMPTS, sf.InstantStyle([PICTURE, OTHER]), seed=30))
    with pytest.raises(AdapterError, match="reads features"):
        engine.submit(sf.Request("a cat", style=sf.InstantStyle(image_embeds=torch.zeros(1, 7))))


def test_a_mask_bounds_the_picture_as_in_diffusers(pipe, adapters, draw):
    mask = half_mask()
    actual = draw(PROMPTS, sf.InstantStyle(PICTURE, "all", mask=mask), seed=30)
    close(actual, measured(guided, pipe, PROMPTS, SEEDS, pictures=pictures(adapters, pipe, 1.0, PICTURE, masks=[mask])))
    apart(actual, draw(PROMPTS, sf.InstantStyle(PICTURE, "all"), seed=30))


def test_masked_pictures_have_a_softmax_and_a_scale_each_as_in_diffusers(pipe, adapters, draw):
    masks = [half_mask(), half_mask(left=False)]
    actual = draw(PROMPTS, sf.InstantStyle([PICTURE, OTHER], "all", [0.9, 0.5], mask=masks), seed=30)
    scale = [[0.9, 0.5]]
    expected = measured(
        guided,
        pipe,
        PROMPTS,
        SEEDS,
        pictures=Pictures(
            adapters[:1], scale, [embeds(pipe, PICTURE, OTHER)], [torch.stack([binary(mask) for mask in masks])[None]]
        ),
    )
    close(actual, expected)


def test_masks_of_ones_are_not_the_shared_softmax(draw):
    white = Image.new("L", SIZE, 255)
    masked = draw(PROMPTS, sf.InstantStyle([PICTURE, OTHER], "all", mask=[white, white]), seed=30)
    apart(masked, draw(PROMPTS, sf.InstantStyle([PICTURE, OTHER], "all"), seed=30))


def test_a_mask_tensor_is_the_mask_picture(draw, drawn):
    options = {"image": PICTURE, "blocks": "all"}
    as_tensor = draw(PROMPTS, sf.InstantStyle(mask=binary(half_mask()), **options), seed=30)
    close(as_tensor, drawn(PROMPTS, sf.InstantStyle(mask=half_mask(), **options), seed=30))


def test_several_adapters_add_up_as_in_diffusers(pipe, adapters, draw, two_adapter_engine):
    styles = [sf.InstantStyle(PICTURE, adapter="a"), sf.InstantStyle([OTHER, THIRD], "all", 0.4, adapter="b")]
    actual = draw(PROMPTS, styles, using=two_adapter_engine, seed=30)
    both = Pictures(adapters, [STYLE, 0.4], [embeds(pipe, PICTURE), embeds(pipe, OTHER, THIRD)])
    close(actual, measured(guided, pipe, PROMPTS, SEEDS, pictures=both))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_content_is_subtracted_from_the_embedding(pipe, adapters, draw, drawn, plain, scale):
    style = sf.InstantStyle(PICTURE, "all", content="a cat", content_scale=scale)
    *_, pooled, _ = pipe.encode_prompt("a cat", do_classifier_free_guidance=True)
    edited = embeds(pipe, PICTURE) - scale * pooled.detach()
    actual = draw(PROMPTS, style, seed=30)
    close(actual, measured(guided, pipe, PROMPTS, SEEDS, pictures=Pictures(adapters[:1], [1.0], [edited])))
    untouched = drawn(PROMPTS, sf.InstantStyle(PICTURE, "all"), seed=30)
    if scale:
        apart(actual, untouched.value)
    else:
        close(actual, untouched)


def test_content_as_an_embedding_is_the_content_in_words(pipe, draw, drawn):
    *_, pooled, _ = pipe.encode_prompt("a cat", do_classifier_free_guidance=True)
    as_embedding = draw(PROMPTS, sf.InstantStyle(PICTURE, content=pooled[0].detach()), seed=30)
    close(as_embedding, drawn(PROMPTS, sf.InstantStyle(PICTURE, content="a cat"), seed=30))


# row by row against the literal attention


def test_a_negative_picture_takes_the_place_of_no_picture(pipe, adapters, draw):
    tokens, negative = (image_tokens(adapters[0], embeds(pipe, image)[0, 0]) for image in (PICTURE, OTHER))
    strengths = {STYLE_MODULE: 0.8}
    literal = segment(adapters[0], negative, tokens, strengths, strengths)
    expected = measured(guided, pipe, PROMPTS, SEEDS, segments=[literal])
    close(draw(PROMPTS, sf.InstantStyle(PICTURE, scale=0.8, negative_image=OTHER), seed=30), expected)


def test_precise_style_pushes_the_layout_from_the_null_branch(pipe, adapters, draw, drawn):
    tokens, nothing = image_tokens(adapters[0], embeds(pipe, PICTURE)[0, 0]), no_picture(pipe, adapters[0])
    style = {STYLE_MODULE: 0.8}
    literal = [
        segment(adapters[0], tokens, tokens, {LAYOUT_MODULE: 0.6}, {}),
        segment(adapters[0], nothing, tokens, style, style),
    ]
    actual = draw(PROMPTS, sf.InstantStyle(PICTURE, "precise", 0.8, style_boost=0.6), seed=30)
    close(actual, measured(guided, pipe, PROMPTS, SEEDS, segments=literal))
    # without the boost nothing is left in the layout block, in neither branch
    boostless = draw(PROMPTS, sf.InstantStyle(PICTURE, "precise", 0.8, style_boost=0.0), seed=30)
    close(boostless, drawn(PROMPTS, sf.InstantStyle(PICTURE, "style", 0.8), seed=30))
    apart(actual, boostless)


def test_precise_composition_pushes_the_style_from_the_null_branch(pipe, adapters, draw, modules):
    tokens, nothing = image_tokens(adapters[0], embeds(pipe, PICTURE)[0, 0]), no_picture(pipe, adapters[0])
    boosted = {module: 0.05 for module in modules if module != LAYOUT_MODULE} | {STYLE_MODULE: 0.5}
    layout = {LAYOUT_MODULE: 0.9}
    literal = [segment(adapters[0], tokens, tokens, boosted, {}), segment(adapters[0], nothing, tokens, layout, layout)]
    actual = draw(PROMPTS, sf.InstantStyle(PICTURE, "composition precise", 0.9, composition_boost=0.5), seed=30)
    close(actual, measured(guided, pipe, PROMPTS, SEEDS, segments=literal))


@pytest.mark.parametrize(
    ("preset", "weight"),
    [
        ("ease in", lambda t: 0.05 + 0.95 * (1 - t / 11)),
        ("ease out", lambda t: 0.05 + 0.95 * t / 11),
        ("ease in out", lambda t: 0.05 + 0.95 * (1 - abs(t - 5.5) / 5.5)),
        ("reverse in out", lambda t: 0.05 + 0.95 * abs(t - 5.5) / 5.5),
    ],
    ids=["in", "out", "in_out", "reverse"],
)
def test_eased_presets_weigh_the_modules_in_execution_order(pipe, adapters, draw, modules, preset, weight):
    tokens = image_tokens(adapters[0], embeds(pipe, PICTURE)[0, 0])
    strengths = {module: 0.7 * weight(t) for t, module in enumerate(modules)}
    literal = segment(adapters[0], no_picture(pipe, adapters[0]), tokens, strengths, strengths)
    close(
        draw(PROMPTS, sf.InstantStyle(PICTURE, preset, 0.7), seed=30),
        measured(guided, pipe, PROMPTS, SEEDS, segments=[literal]),
    )


def test_two_styles_of_one_adapter_add_up(pipe, adapters, draw):
    nothing = no_picture(pipe, adapters[0])
    parts = []
    for image, strengths in ((PICTURE, {STYLE_MODULE: 1.0}), (OTHER, {LAYOUT_MODULE: 0.5, STYLE_MODULE: 0.5})):
        tokens = image_tokens(adapters[0], embeds(pipe, image)[0, 0])
        parts.append(segment(adapters[0], nothing, tokens, strengths, strengths))
    styles = [sf.InstantStyle(PICTURE), sf.InstantStyle(OTHER, "style+layout", 0.5)]
    close(draw(PROMPTS, styles, seed=30), measured(guided, pipe, PROMPTS, SEEDS, segments=parts))


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.5, 1.0), (0.25, 0.75)], ids=str)
def test_outside_of_its_window_a_style_does_nothing(pipe, adapters, draw, window):
    tokens, strengths = image_tokens(adapters[0], embeds(pipe, PICTURE)[0, 0]), {STYLE_MODULE: 1.0}
    literal = segment(adapters[0], no_picture(pipe, adapters[0]), tokens, strengths, strengths)

    def within(unet, step):
        return row_adapters(unet, [literal]) if window[0] <= step / 4 < window[1] else nullcontext()

    actual = draw(PROMPTS, sf.InstantStyle(PICTURE, window=window), seed=30, steps=4)
    close(actual, measured(by_step, pipe, PROMPTS, SEEDS, within, steps=4))


# identities


@pytest.mark.parametrize("blocks", ["style", "all", "ease in"])
def test_scale_0_is_the_base_model_bit_for_bit(draw, plain, blocks):
    for off, base in zip(draw(PROMPTS, sf.InstantStyle(PICTURE, blocks, 0.0), seed=30), plain.value):
        assert torch.equal(off, base)


def test_a_batch_of_different_styles_equals_single_runs(draw, drawn):
    styles = [
        sf.InstantStyle(PICTURE),
        sf.InstantStyle([OTHER, THIRD], "all", 0.4),
        None,
        sf.InstantStyle(THIRD, "precise", 0.9),
        sf.InstantStyle(OTHER, "layout", 1.3, mask=half_mask()),
        [sf.InstantStyle(PICTURE, scale=-0.5), sf.InstantStyle(OTHER, "layout", window=(0.3, 1.0))],
    ]
    requests = [sf.Request("a cat", seed=seed, style=style, size=SIZE, steps=3) for seed, style in enumerate(styles)]
    for request, together in zip(requests, draw(requests)):
        close([together], drawn(request))


def test_groups_of_one_batch_are_isolated(draw):
    shared, other = sf.StyleAligned(), sf.StyleAligned()

    def batch(picture):
        first, second = sf.InstantStyle(picture), sf.InstantStyle(THIRD, "all")
        styles = [[shared, first], [shared, first], [other, second], [other, second]]
        return draw(
            [sf.Request("a cat", seed=seed, style=style, size=SIZE, steps=2) for seed, style in enumerate(styles)]
        )

    before, after = batch(PICTURE), batch(OTHER)
    for old, new in zip(before[2:], after[2:]):
        assert torch.equal(old, new)
    apart(after[:2], before[:2])


def test_a_new_style_of_the_reference_alone_reaches_its_targets(draw):
    shared = sf.StyleAligned()

    def batch(style):
        styles = [[shared, style] if style else shared, shared]
        return draw([sf.Request("a cat", seed=seed, style=s, size=SIZE, steps=2) for seed, s in enumerate(styles)])

    apart(batch(sf.InstantStyle(PICTURE)), batch(None))


def test_an_adapter_must_be_named_where_there_are_several(draw, two_adapter_engine):
    with pytest.raises(StyleError, match="several adapters.*a, b"):
        draw("a cat", sf.InstantStyle(PICTURE), using=two_adapter_engine)
    with pytest.raises(StyleError, match="'c' is not loaded; loaded adapters: a, b"):
        draw("a cat", sf.InstantStyle(PICTURE, adapter="c"), using=two_adapter_engine)


def test_content_of_another_width_is_refused(draw):
    with pytest.raises(AdapterError, match="16"):
        draw("a cat", sf.InstantStyle(PICTURE, content=torch.ones(16)))
