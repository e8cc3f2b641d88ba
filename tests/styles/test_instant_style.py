import math

import pytest
import torch

from stylefast.errors import AdapterError, StyleError
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.layout import LAYOUT_MODULE, STYLE_MODULE, AttentionLayout
from stylefast.styles.instant_style import PRESETS, InstantStyle, subtract_content
from tests.support.fp64 import close, measured
from tests.support.small_adapter import (
    CROSS_DIM,
    global_adapter,
    plus_adapter,
    small_layout,
    small_picture,
    small_vision_model,
)
from tests.support.small_sdxl import sdxl_unet_config, small_unet_config

LAYOUT = AttentionLayout.from_config(sdxl_unet_config())


def weights(blocks, **options):
    guided = options.pop("guided", True)
    return [x.tolist() for x in InstantStyle("a.png", blocks=blocks, **options).strengths(LAYOUT, guided)]


def table(**places):
    values = [places.pop("rest", 0.0)] * 11
    for place, value in places.items():
        values[int(place[1:])] = value
    return pytest.approx(values)


@pytest.fixture(scope="module")
def encoder():
    return ImageEncoder(small_vision_model())


@pytest.fixture(scope="module")
def adapter():
    return IPAdapter.load(global_adapter(small_layout()), small_layout(), CROSS_DIM)


# --- where it acts (T3's settings, T4)


@pytest.mark.parametrize(
    "blocks, expected",
    [
        ("style", table(_6=0.8)),
        ("style transfer", table(_6=0.8)),
        ("Style_Transfer", table(_6=0.8)),
        ("layout", table(_3=0.8)),
        ("composition", table(_3=0.8)),
        ("style+layout", table(_3=0.8, _6=0.8)),
        ("style + layout", table(_3=0.8, _6=0.8)),
        ("style-and-composition", table(_3=0.8, _6=0.8)),
        ("all", table(rest=0.8)),
        ("linear", table(rest=0.8)),
        ("strong style transfer", table(rest=0.8, _3=0.0)),
        ("strong", table(rest=0.8, _3=0.0)),
        ("strong style and composition", table(rest=0.8)),
        ("weak input", table(rest=0.8, _0=0.16, _1=0.16, _2=0.16, _3=0.16)),
        ("weak middle", table(rest=0.8, _4=0.16)),
        ("weak output", table(rest=0.16, _0=0.8, _1=0.8, _2=0.8, _3=0.8, _4=0.8)),
        ("strong middle", table(rest=0.16, _4=0.8)),
    ],
)
def test_presets_put_the_scale_where_users_know_it(blocks, expected):
    conditional, unconditional_image, unconditional_negative = weights(blocks, scale=0.8)
    assert conditional == expected
    assert unconditional_negative == expected
    assert unconditional_image == [0.0] * 11


@pytest.mark.parametrize(
    "blocks, formula",
    [
        ("ease in", lambda t: 1 - t / 11),
        ("ease out", lambda t: t / 11),
        ("ease in-out", lambda t: 1 - abs(t - 5.5) / 5.5),
        ("reverse in-out", lambda t: abs(t - 5.5) / 5.5),
    ],
)
def test_eases_follow_the_published_formulas(blocks, formula):
    expected = pytest.approx([0.7 * (0.05 + 0.95 * formula(t)) for t in range(11)])
    assert weights(blocks, scale=0.7)[0] == expected


def test_the_composition_scale_acts_in_the_layout_module_alone():
    assert weights("style and composition", scale=0.8, composition_scale=0.3)[0] == table(_3=0.3, _6=0.8)
    assert weights("strong style and composition", scale=0.8, composition_scale=0.3)[0] == table(rest=0.8, _3=0.3)


@pytest.mark.parametrize(
    "blocks, expected",
    [
        ({"up": {"block_0": [0, 1, 0]}}, table(_6=0.5)),
        ({"up": {"block_0": [0.0, 1.0, 0.0]}, "down": {"block_2": [0.0, 1.0]}}, table(_3=0.5, _6=0.5)),
        ({"down": {"block_1": 0.4}}, table(_0=0.2, _1=0.2)),
        ({"mid": 1.0}, table(_4=0.5)),
        ({"mid": [1.0]}, table(_4=0.5)),
        ({"up": 1.0}, table(rest=0.5, _0=0, _1=0, _2=0, _3=0, _4=0)),
        ({"down": [0.0, 1.0]}, table(_1=0.5, _3=0.5)),
        ({"up": {"block_1": [0.6]}}, table(_8=0.3, _9=0.3, _10=0.3)),
        (["block"], table(rest=0.5)),
        (["up_blocks.0.attentions.1"], table(_6=0.5)),
        (["up_blocks.0.attentions.1", "down_blocks.2.attentions.1"], table(_3=0.5, _6=0.5)),
        (["mid_block", "down_blocks.1"], table(_0=0.5, _1=0.5, _4=0.5)),
    ],
    ids=str,
)
def test_dictionaries_and_substrings_leave_what_they_do_not_name_at_zero(blocks, expected):
    assert weights(blocks, scale=0.5)[0] == expected


@pytest.mark.parametrize(
    "scale",
    [
        {"up": {"block_0": [0.0, 1.0, 0.0]}},
        {"down": {"block_2": [0.0, 0.7]}, "mid": 0.2, "up": {"block_0": 0.3, "block_1": [0.1, 0.2, 0.4]}},
        {"down": 0.4},
        {"up": [0.1, 0.2, 0.3], "mid": [0.6]},
    ],
    ids=str,
)
def test_dictionaries_mean_what_they_mean_in_diffusers(scale):
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales

    with torch.device("meta"):
        unet = UNet2DConditionModel(**small_unet_config())
    (theirs,) = _maybe_expand_lora_scales(unet, [scale], default_scale=0.0)
    ours = InstantStyle("a.png", blocks=scale).strengths(small_layout(), False).conditional.tolist()
    assert ours == pytest.approx([theirs[module] for module in small_layout().modules])


def test_every_preset_is_defined_for_the_small_layout():
    for preset in PRESETS:
        for vector in InstantStyle("a.png", blocks=preset).strengths(small_layout(), True):
            assert vector.shape == (11,) and torch.isfinite(vector).all()


# --- precise presets


def test_precise_style_shows_the_layout_module_the_image_only_in_the_unconditional_row():
    conditional, image, negative = weights("style transfer precise", scale=0.8, style_boost=0.6)
    assert conditional == table(_6=0.8)
    assert image == table(_3=0.6)
    assert negative == table(_6=0.8)
    assert weights("precise")[1] == table(_3=1.0)


def test_precise_composition_swaps_everywhere_but_in_the_layout_module():
    conditional, image, negative = weights("composition precise", scale=0.8, composition_boost=0.5)
    assert conditional == table(_3=0.8)
    assert image == table(rest=0.05, _3=0.0, _6=0.5)
    assert negative == table(_3=0.8)


def test_no_module_has_both_the_usual_and_the_swapped_roles():
    for preset in PRESETS:
        conditional, image, _ = InstantStyle("a.png", blocks=preset, composition_boost=0.4).strengths(LAYOUT, True)
        assert not ((conditional != 0) & (image != 0)).any()


def test_without_guidance_there_is_only_the_conditional_row():
    conditional, image, negative = weights("strong", scale=0.5, guided=False)
    assert conditional == table(rest=0.5, _3=0.0)
    assert image == negative == [0.0] * 11
    for preset in ("precise", "composition precise"):
        with pytest.raises(StyleError, match="guidance > 1"):
            weights(preset, guided=False)


# --- several pictures, masks, window


def test_pictures_without_masks_share_one_segment():
    style = InstantStyle(["a.png", "b.png"], scale=0.4)
    assert [(s.pictures, s.mask, s.scale) for s in style.segments] == [(("a.png", "b.png"), None, 0.4)]


def test_masks_give_each_picture_a_segment_and_may_give_it_a_scale():
    style = InstantStyle(["a.png", "b.png"], mask=["m.png", None], scale=[0.4, 0.9])
    assert [(s.pictures, s.mask, s.scale) for s in style.segments] == [
        (("a.png",), "m.png", 0.4),
        (("b.png",), None, 0.9),
    ]
    assert style.strengths(LAYOUT, True, segment=1).conditional.tolist() == table(_6=0.9)
    assert [s.scale for s in InstantStyle(["a.png", "b.png"], mask=["m", "n"], scale=0.7).segments] == [0.7, 0.7]


def test_the_window_counts_fractions_of_the_steps():
    style = InstantStyle("a.png", window=(0.2, 0.6))
    assert [style.active(step, 10) for step in range(10)] == [2 <= step < 6 for step in range(10)]
    assert all(InstantStyle("a.png").active(step, 7) for step in range(7))


# --- tokens and content subtraction (T5 at token level, T8)


def test_tokens_of_several_pictures_are_joined_and_with_masks_kept_apart(adapter, encoder):
    pictures = [small_picture(0), small_picture(1)]
    joined = InstantStyle(pictures).tokens(adapter, encoder)
    apart = InstantStyle(pictures, mask=[small_picture(2), None]).tokens(adapter, encoder)
    assert [t.shape for t in joined.image] == [(8, CROSS_DIM)]
    assert [t.shape for t in apart.image] == [(4, CROSS_DIM)] * 2
    assert torch.equal(joined.image[0], torch.cat(apart.image))
    assert torch.equal(joined.negative, adapter.negative_tokens())


def test_masked_pictures_are_added_and_unmasked_ones_averaged(adapter, encoder):
    style = InstantStyle([small_picture(0), small_picture(1)])
    joined = style.tokens(adapter, encoder).image[0]

    def image_term(tokens):
        k, v = (x.transpose(1, 2) for x in adapter.key_values(tokens[None])[0])
        query = torch.randn(1, k.shape[1], 6, k.shape[3], generator=torch.Generator().manual_seed(3))
        return torch.nn.functional.scaled_dot_product_attention(query, k, v)

    once, twice = image_term(joined), image_term(joined[:4]) + image_term(joined[4:])
    assert (once - twice).abs().max() > 0.1


def test_subtracting_nothing_changes_nothing_and_subtraction_follows_the_formula():
    draw = torch.Generator().manual_seed(0)
    image, text = torch.randn(3, 48, generator=draw), torch.randn(48, generator=draw)
    assert torch.equal(subtract_content(image, text, 0.0), image)
    torch.testing.assert_close(subtract_content(image, text, 0.5), image - 0.5 * text)
    assert torch.equal(subtract_content(image, text[None], 0.5), subtract_content(image, text, 0.5))


@pytest.mark.parametrize("pictures", [1, 3])
def test_content_is_subtracted_before_the_projector_and_from_the_positive_side_alone(adapter, encoder, pictures):
    shown = [small_picture(seed) for seed in range(pictures)]
    text = torch.randn(48, generator=torch.Generator().manual_seed(1))
    tokens = InstantStyle(shown, content="a fox", content_scale=0.7).tokens(adapter, encoder, content=text)

    def literal(projector, embeds, text):
        embeds = embeds - 0.7 * text
        return torch.nn.functional.layer_norm(
            (embeds @ projector["proj.weight"].T + projector["proj.bias"]).reshape(-1, CROSS_DIM),
            (CROSS_DIM,),
            projector["norm.weight"],
            projector["norm.bias"],
        )

    projector = global_adapter(small_layout())["image_proj"]
    close(tokens.image[0], measured(literal, projector, encoder.embed(shown), text))
    assert torch.equal(tokens.negative, adapter.negative_tokens())
    given = InstantStyle(shown, content=text, content_scale=0.7).tokens(adapter, encoder)
    assert torch.equal(given.image[0], tokens.image[0])


def test_subtraction_equals_embeddings_prepared_for_diffusers(adapter, encoder):
    from diffusers.loaders.unet import UNet2DConditionLoadersMixin

    shown = [small_picture(0), small_picture(1)]
    text = torch.randn(48, generator=torch.Generator().manual_seed(1))
    projection = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers(
        global_adapter(small_layout())["image_proj"], low_cpu_mem_usage=False
    )

    @torch.no_grad()
    def prepared(projection, embeds, text):
        embeds = subtract_content(embeds, text, 0.5)
        return projection(torch.cat([torch.zeros_like(embeds[:1]), embeds]))

    expected = measured(prepared, projection, encoder.embed(shown), text)
    tokens = InstantStyle(shown, content="a fox").tokens(adapter, encoder, content=text)
    close(tokens.image[0].unflatten(0, (2, -1)), expected[1:])
    close(tokens.negative, expected[0])


def test_content_is_refused_where_it_has_no_meaning(adapter, encoder):
    plus = IPAdapter.load(plus_adapter(small_layout()), small_layout(), CROSS_DIM)
    style = InstantStyle(small_picture(), content="a fox")
    with pytest.raises(AdapterError, match="plus"):
        style.tokens(plus, encoder, content=torch.zeros(48))
    with pytest.raises(AdapterError, match="plus"):
        subtract_content(torch.zeros(1, 17, 40), torch.zeros(40), 0.5)
    with pytest.raises(AdapterError, match="1280.*1024 wide"):
        subtract_content(torch.zeros(1, 1024), torch.zeros(1280), 0.5)
    with pytest.raises(StyleError, match="text embedding"):
        style.tokens(adapter, encoder)


def test_a_negative_picture_takes_the_place_of_no_picture(adapter, encoder):
    tokens = InstantStyle(small_picture(0), negative_image=small_picture(1)).tokens(adapter, encoder)
    assert torch.equal(tokens.negative, adapter.tokens(encoder.embed([small_picture(1)]))[0])


def test_plus_adapters_give_sixteen_tokens_per_picture(encoder):
    plus = IPAdapter.load(plus_adapter(small_layout()), small_layout(), CROSS_DIM)
    tokens = InstantStyle([small_picture(0), small_picture(1)]).tokens(plus, encoder)
    assert tokens.image[0].shape == (32, CROSS_DIM) and tokens.negative.shape == (16, CROSS_DIM)


def test_the_crop_reaches_the_encoder(adapter, encoder):
    wide = small_picture(0, (96, 32))
    crops = [InstantStyle(wide, crop=crop).tokens(adapter, encoder).image[0] for crop in ("center", "squash", "pad")]
    assert (crops[0] - crops[1]).abs().max() > 1e-3 and (crops[1] - crops[2]).abs().max() > 1e-3


# --- errors at the door


@pytest.mark.parametrize(
    "options, words",
    [
        ({"image": []}, "at least one picture"),
        ({"image": None}, "at least one picture"),
        ({"scale": math.nan}, "scale is nan"),
        ({"scale": "1"}, "scale is '1'"),
        ({"scale": [0.1, 0.2]}, "2 scales for 1 pictures"),
        ({"image": ["a", "b"], "scale": [0.1, 0.2]}, "share a softmax"),
        ({"mask": ["m", "n"]}, "2 masks for 1 pictures"),
        ({"image": ["a", "b"], "mask": "m"}, "1 masks for 2 pictures"),
        ({"content": " "}, "content is empty"),
        ({"content": 3}, "content is 3"),
        ({"content": torch.zeros(32, device="meta")}, "content is a tensor on the device meta, which has no values"),
        ({"content": torch.ones(32).to_sparse()}, "content is a tensor of layout sparse_coo; give it dense"),
        ({"content_scale": math.inf}, "content_scale is inf"),
        ({"composition_scale": "x"}, "composition_scale"),
        ({"window": (0.5, 0.5)}, "0 <= start < end <= 1"),
        ({"window": (-0.1, 0.5)}, "window"),
        ({"window": 0.5}, "window"),
        ({"crop": "stretch"}, "'stretch'"),
        ({"blocks": "styl"}, "'styl' is not a preset.*'style transfer'"),
        ({"blocks": STYLE_MODULE}, "go in a list"),
        ({"blocks": {}}, "'down', 'mid' and 'up'"),
        ({"blocks": {"middle": 1.0}}, "middle"),
        ({"blocks": {"up": {"block_0": "1"}}}, "up block_0 is '1'"),
        ({"blocks": {"up": {"block_0": {"a": 1.0}}}}, "up block_0"),
        ({"blocks": {"up": {"block_0": []}}}, "empty list"),
        ({"blocks": []}, "substrings"),
        ({"blocks": 3}, "int"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_when_the_style_is_made(options, words):
    with pytest.raises(StyleError, match=words):
        InstantStyle(**({"image": "a.png"} | options))


@pytest.mark.parametrize(
    "blocks, words",
    [
        ({"up": {"block_2": 1.0}}, "up.block_2.*up.block_1"),
        ({"mid": {"block_0": 1.0}}, "mid.block_0"),
        ({"mid": [1.0, 2.0]}, "2 weights for mid, which has 1"),
        ({"up": {"block_0": [0.0, 1.0]}}, "2 weights for up.block_0, which has 3"),
        (["encoder"], "matches no attention module"),
        (["up_blocks.0.attentions.1.transformer_blocks.3"], "1 of the 10 layers"),
    ],
    ids=str,
)
def test_blocks_that_the_model_lacks_are_named(blocks, words):
    with pytest.raises(StyleError, match=words):
        weights(blocks)


def test_presets_say_which_module_a_model_lacks():
    without = AttentionLayout(
        tuple(layer for layer in LAYOUT.layers if layer.module != LAYOUT_MODULE),
        tuple(module for module in LAYOUT.modules if module != LAYOUT_MODULE),
    )
    with pytest.raises(StyleError, match=LAYOUT_MODULE):
        InstantStyle("a.png", blocks="layout").strengths(without, True)
    assert InstantStyle("a.png", blocks="all").strengths(without, True).conditional.shape == (10,)


def test_the_style_preset_follows_the_models_own_style_modules():
    from dataclasses import replace

    own = replace(LAYOUT, style_modules=("up_blocks.1.attentions.0", "up_blocks.1.attentions.2"))
    found = InstantStyle("a.png", blocks="style", scale=0.5).strengths(own, True).conditional
    chosen = [module for module, weight in zip(own.modules, found.tolist(), strict=True) if weight == 0.5]
    assert chosen == list(own.style_modules) and found.sum() == 1.0
