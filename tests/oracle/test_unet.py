"""Our UNet, driven by row tables written by hand, against the literal oracle on diffusers' UNet, both held to fp64.

On PyTorch's own attention, which rounds as diffusers does; test_fused_unet.py holds the fused kernels.
"""

from dataclasses import replace
from math import inf, log

import pytest
import torch

from stylefast.kernels.adain import adain_affine, token_stats
from tests.support.fp64 import close, measured
from tests.support.oracle import instant_style as ip
from tests.support.oracle.style_aligned import SETTINGS, Sharing, adain, guidance_layout, shared
from tests.support.rows import image_columns, plain_rows, run, share
from tests.support.small_unet import forward, random_inputs

pytestmark = pytest.mark.usefixtures("pytorchs_attention")

SIZES = {"square": (8, 8), "wide": (8, 16), "tall_and_odd": (13, 6)}
STYLE, LAYOUT = "up_blocks.0.attentions.1", "down_blocks.2.attentions.1"


@pytest.fixture(scope="module")
def adapters(theirs):
    return [ip.random_adapter(theirs, 16, seed) for seed in (5, 6)]


def oracle(unet, inputs, sharing=None):
    with shared(unet, sharing):
        return forward(unet, inputs)


def adapted(unet, inputs, adapters, scales, embeds, masks=None, sharing=None):
    """diffusers' UNet with its own adapters."""
    with ip.diffusers_adapters(unet, adapters, scales), shared(unet, sharing):
        return forward(unet, inputs, embeds, masks)


def literal(unet, inputs, *segments):
    """diffusers' UNet with the literal attention."""
    with ip.row_adapters(unet, segments):
        return forward(unet, inputs)


def styled(unet, inputs, *sharings, **columns):
    table = plain_rows(unet.layout, len(inputs.latents), **columns)
    for sharing in sharings:
        table = share(table, unet.layout, sharing)
    return run(unet, inputs, table)


def embeddings(rows, seed=0, images=1):
    return torch.randn(rows, images, 16, generator=torch.Generator().manual_seed(40 + seed))


def everywhere(unet, strength):
    return {module: strength for module in unet.layout.modules}


# plain


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rows", [1, 3])
def test_plain_rows_equal_diffusers(theirs, ours, size, rows):
    inputs = random_inputs(rows, 1, *size, timestep=None)
    close(styled(ours, inputs), measured(forward, theirs, inputs))


def test_the_weights_are_shared_with_the_state_dict(theirs, ours):
    names = dict(ours.named_parameters())
    mine = {parameter.data_ptr() for parameter in names.values()}
    assert {tensor.data_ptr() for tensor in theirs.state_dict().values()} == mine


def test_layers_and_modules_are_counted_as_diffusers_does(theirs, ours):
    registry = [name for name in theirs.attn_processors if name.endswith("attn1.processor")]
    assert [f"{layer.name}.attn1.processor" for layer in ours.layout.layers] == registry
    assert len(ours.layout.modules) == 11
    assert ours.layout.modules.index(LAYOUT) == 3 and ours.layout.modules.index(STYLE) == 6


# style aligned


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_style_aligned_equals_the_literal_oracle(theirs, ours, setting):
    inputs, sharing = random_inputs(6), Sharing(guidance_layout(3), **setting)
    actual = styled(ours, inputs, sharing)
    close(actual, measured(oracle, theirs, inputs, sharing))
    close(actual[[0, 3]], measured(forward, theirs, inputs.rows([0, 3])))


@pytest.mark.parametrize("size", [SIZES["wide"], SIZES["tall_and_odd"]], ids=["wide", "tall_and_odd"])
def test_style_aligned_holds_at_other_sizes(theirs, ours, size):
    inputs = random_inputs(4, 2, *size)
    sharing = Sharing(guidance_layout(2), shift=log(2), scale=0.8, share_group_norm=True)
    close(styled(ours, inputs, sharing), measured(oracle, theirs, inputs, sharing))


@pytest.mark.parametrize("level", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_only_self_level_leaves_the_same_layers_plain(theirs, ours, level):
    inputs, sharing = random_inputs(2), Sharing((0, 0), only_self_level=level)
    close(styled(ours, inputs, sharing), measured(oracle, theirs, inputs, sharing))


def test_full_sharing_equals_one_flat_sequence(theirs, ours):
    inputs = random_inputs(6)
    sharing = Sharing(guidance_layout(3), full_attention_share=True, groups=(0, 0, 0, 1, 1, 1))
    close(styled(ours, inputs, sharing, references=2), measured(oracle, theirs, inputs, sharing))


def test_a_target_does_not_see_the_other_targets(ours):
    inputs = random_inputs(4)
    together = measured(styled, ours, inputs, Sharing((0, 0, 0, 0), share_group_norm=True))
    for order in ([0, 2], [0, 3, 1, 2], [0, 1]):
        some = styled(ours, inputs.rows(order), Sharing((0,) * len(order), share_group_norm=True))
        close(some, together[order])


@pytest.mark.parametrize("group_norm", [False, True], ids=["", "group_norm"])
@pytest.mark.parametrize("shift", [0.0, log(2), -3.0])
def test_a_target_with_everything_of_the_reference_is_the_reference(theirs, ours, shift, group_norm):
    inputs = random_inputs(2).rows([1, 1])
    sharing = Sharing((0, 0), shift=shift, share_group_norm=group_norm)
    close(styled(ours, inputs, sharing), measured(forward, theirs, inputs))
    rescaled = styled(ours, inputs, replace(sharing, scale=0.5))
    assert (rescaled[1] - rescaled[0]).abs().max() > 1e-3


def test_shift_log_2_is_the_reference_listed_twice(ours):
    inputs, once = random_inputs(3), Sharing((0, 0, 0))
    table = share(plain_rows(ours.layout, 3, references=2), ours.layout, once)
    table.self_page[1:, 1] = table.self_page[1:, 0]
    close(run(ours, inputs, table), measured(styled, ours, inputs, replace(once, shift=log(2))))


def test_shift_minus_infinity_is_adain_alone(theirs, ours):
    inputs = random_inputs(3)
    muted, unshared = Sharing((0, 0, 0), shift=-inf), Sharing((0, 0, 0), share_attention=False)
    close(styled(ours, inputs, muted), measured(oracle, theirs, inputs, unshared))


def test_scale_0_gives_uniform_logits_and_does_not_turn_sharing_off(theirs, ours):
    inputs, sharing = random_inputs(3), Sharing((0, 0, 0), scale=0.0)
    actual = styled(ours, inputs, sharing)
    close(actual, measured(oracle, theirs, inputs, sharing))
    assert (actual - styled(ours, inputs, replace(sharing, share_attention=False)))[1:].abs().max() > 1e-3


def test_adain_gives_the_reference_statistics_over_tokens():
    x, style = torch.randn(2, 3, 37, 4, 8, generator=torch.Generator().manual_seed(1))  # [rows, tokens, heads, d]
    style = 2 * style - 1
    stats, style_stats = ([s[None] for s in token_stats(y)] for y in (x, style))
    gain, offset = adain_affine(*stats, torch.arange(3) + 3, torch.ones(3, 1), *style_stats)
    out = x * gain[0, :, None] + offset[0, :, None]
    torch.testing.assert_close(out.mean(1), style.mean(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.var(1), style.var(1), rtol=1e-4, atol=0)
    exact = adain(x.double().transpose(1, 2), style.double().transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(out.double(), exact, rtol=1.3e-6, atol=1e-5)


# rows of every kind in one batch


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_without_guidance_the_rows_equal_those_of_the_guided_batch(ours, rows):
    inputs = random_inputs(2 * rows)
    guided = measured(styled, ours, inputs, Sharing(guidance_layout(rows), share_group_norm=True))
    for half in (range(rows), range(rows, 2 * rows)):
        alone = styled(ours, inputs.rows(list(half)), Sharing((0,) * rows, share_group_norm=True))
        close(alone, guided[list(half)])


@pytest.mark.parametrize("branches", [1, 2, 3, 4])
def test_every_branch_attends_to_its_own_reference(theirs, ours, branches):
    inputs, sharing = random_inputs(2 * branches), Sharing(guidance_layout(2, branches), shift=0.2)
    actual = styled(ours, inputs, sharing)
    for branch in range(branches):
        pair = inputs.rows([2 * branch, 2 * branch + 1])
        close(actual[2 * branch : 2 * branch + 2], measured(oracle, theirs, pair, Sharing((0, 0), shift=0.2)))


def test_different_settings_share_a_batch(theirs, ours):
    inputs = random_inputs(8, timestep=None)
    same_time = inputs.timesteps.clone()
    same_time[[1, 3, 5]] = same_time[[0, 2, 4]]
    inputs = replace(inputs, timesteps=same_time)
    settings = {
        (0, 1): {"shift": log(2), "share_group_norm": True},
        (2, 3): {"mode": "swap", "adain": {"q": 0.5, "v": 1.0}},
        (4, 5): {"scale": 0.4, "layers": ("up_blocks",), "only_self_level": 0.5},
    }
    table = plain_rows(ours.layout, 8)
    for (reference, target), setting in settings.items():
        references = tuple(reference if row == target else row for row in range(8))
        table = share(table, ours.layout, Sharing(references, **setting), rows=[target])
    actual = run(ours, inputs, table)
    for pair, setting in settings.items():
        close(actual[list(pair)], measured(oracle, theirs, inputs.rows(list(pair)), Sharing((0, 0), **setting)))
    close(actual[6:], measured(forward, theirs, inputs.rows([6, 7])))


def test_rows_in_different_noise_stages_equal_solo_runs(theirs, ours):
    inputs = random_inputs(4, timestep=None)
    table = plain_rows(ours.layout, 4)._replace(text_page=torch.tensor([2, 0, 3, 0]))
    actual = run(ours, inputs, table)
    for row, page in enumerate(table.text_page):
        solo = replace(inputs.rows([row]), text=inputs.text[[int(page)]])
        close(actual[[row]], measured(forward, theirs, solo))


# instant style


def image_rows(ours, inputs, segments, groups=None, sharing=None):
    rows, size = len(inputs.latents), inputs.latents.shape[2:]
    table = plain_rows(ours.layout, rows, segments=len(segments))
    if sharing is not None:
        table = share(table, ours.layout, sharing)
    table, image_kv, masks = image_columns(table, ours.layout, ours, segments, ours.attention_sizes(*size), groups)
    return run(ours, inputs, table, image_kv, masks)


def segment(adapter, embeds, strengths, mask=None):
    return ip.Segment(adapter, ip.image_tokens(adapter, embeds), strengths, mask)


SCALES = {
    "style": (ip.STYLE, {STYLE: 1.0}),
    "style_and_layout": (ip.STYLE_AND_LAYOUT, {STYLE: 1.0, LAYOUT: 1.0}),
    "weak_style": ({"up": {"block_0": [0.0, 0.35, 0.0]}}, {STYLE: 0.35}),
    "all": (0.7, None),
    "negative": (-0.5, None),
    "mid_and_a_whole_block": (
        {"mid": 0.5, "up": {"block_1": 0.8}},
        {"mid_block.attentions.0": 0.5} | {f"up_blocks.1.attentions.{i}": 0.8 for i in range(3)},
    ),
}


@pytest.mark.parametrize(("scale", "strengths"), SCALES.values(), ids=SCALES)
def test_instant_style_equals_the_adapter_of_diffusers(theirs, ours, adapters, scale, strengths):
    inputs, embeds = random_inputs(4, timestep=None), embeddings(4)
    strengths = everywhere(ours, scale) if strengths is None else strengths
    strengths = {module: torch.full((4,), value) for module, value in strengths.items()}
    expected = measured(adapted, theirs, inputs, adapters[:1], scale, [embeds])
    actual = image_rows(ours, inputs, [segment(adapters[0], embeds[:, 0], strengths)])
    close(actual, expected)
    assert (actual - forward(theirs, inputs)).abs().max() > 1e-2


def test_strength_0_is_the_base_model_bit_for_bit(ours, adapters):
    inputs = random_inputs(3)
    off = segment(adapters[0], embeddings(3)[:, 0], everywhere(ours, torch.zeros(3)))
    assert torch.equal(image_rows(ours, inputs, [off]), styled(ours, inputs))


def test_several_pictures_share_one_softmax(theirs, ours, adapters):
    inputs, embeds = random_inputs(2), embeddings(2, images=3)
    expected = measured(adapted, theirs, inputs, adapters[:1], 0.8, [embeds])
    strengths = everywhere(ours, torch.full((2,), 0.8))
    separate_pages = [segment(adapters[0], embeds[:, image], strengths) for image in range(3)]
    close(image_rows(ours, inputs, separate_pages, groups=[0, 0, 0]), expected)
    joined = replace(separate_pages[0], tokens=torch.cat([part.tokens for part in separate_pages], 1))
    close(image_rows(ours, inputs, [joined]), expected)


def test_the_same_picture_twice_is_the_picture_once(ours, adapters):
    inputs, once = random_inputs(2), segment(adapters[0], embeddings(2)[:, 0], everywhere(ours, torch.ones(2)))
    close(image_rows(ours, inputs, [once, once], groups=[0, 0]), measured(image_rows, ours, inputs, [once]))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_masked_pictures_have_a_softmax_each(theirs, ours, adapters, size):
    inputs, embeds = random_inputs(2, 3, *size), embeddings(2, images=2)
    masks = torch.zeros(2, 8 * size[0], 8 * size[1])
    masks[0, :, : 4 * size[1] - 5], masks[1, 7:] = 1, 1
    expected = measured(adapted, theirs, inputs, adapters[:1], 0.9, [embeds], [masks[None]])
    strengths = everywhere(ours, torch.full((2,), 0.9))
    parts = [segment(adapters[0], embeds[:, image], strengths, masks[image]) for image in range(2)]
    close(image_rows(ours, inputs, parts), expected)


def test_all_ones_masks_are_not_the_shared_softmax(ours, adapters):
    inputs, embeds = random_inputs(2), embeddings(2, images=2)
    parts = [
        segment(adapters[0], embeds[:, image], everywhere(ours, torch.ones(2)), torch.ones(64, 64))
        for image in range(2)
    ]
    together = image_rows(ours, inputs, parts, groups=[0, 0])
    assert (image_rows(ours, inputs, parts) - together).abs().max() > 1e-2


def test_several_adapters_add_up(theirs, ours, adapters):
    inputs, embeds = random_inputs(3), [embeddings(3, 1), embeddings(3, 2, images=2)]
    expected = measured(adapted, theirs, inputs, adapters, [ip.STYLE, 0.4], embeds)
    parts = [segment(adapters[0], embeds[0][:, 0], {STYLE: torch.ones(3)})]
    second = ip.image_tokens(adapters[1], embeds[1]).flatten(1, 2)
    parts.append(ip.Segment(adapters[1], second, everywhere(ours, torch.full((3,), 0.4))))
    close(image_rows(ours, inputs, parts), expected)


def test_different_styles_and_strengths_share_a_batch(theirs, ours, adapters):
    inputs, embeds = random_inputs(4, timestep=None), embeddings(4)
    strengths = {
        module: torch.rand(4, generator=torch.Generator().manual_seed(number)) * 2 - 0.5
        for number, module in enumerate(ours.layout.modules)
    }
    part = segment(adapters[0], embeds[:, 0], strengths)
    actual = image_rows(ours, inputs, [part])
    close(actual, measured(literal, theirs, inputs, part))
    for row in range(4):
        alone = ip.Segment(adapters[0], part.tokens[[row]], {name: value[[row]] for name, value in strengths.items()})
        close(actual[[row]], measured(image_rows, ours, inputs.rows([row]), [alone]))


def test_precise_style_pushes_the_layout_from_the_unconditional_row(theirs, ours, adapters):
    inputs, tokens = random_inputs(2), ip.image_tokens(adapters[0], embeddings(1)[:, 0]).repeat(2, 1, 1)
    # row 0 is unconditional: it alone gets the picture at the layout block, the other row alone at the style block
    precise = ip.Segment(adapters[0], tokens, {LAYOUT: torch.tensor([1.0, 0.0]), STYLE: torch.tensor([0.0, 0.7])})
    actual = image_rows(ours, inputs, [precise])
    close(actual, measured(literal, theirs, inputs, precise))
    style_only = ip.Segment(adapters[0], tokens, {STYLE: torch.tensor([0.0, 0.7])})
    without = image_rows(ours, inputs, [style_only])
    assert torch.equal(without[1], actual[1]) and (without[0] - actual[0]).abs().max() > 1e-3


# composition


def test_style_aligned_leaves_the_adapter_in_place(theirs, ours, adapters):
    inputs, embeds = random_inputs(6), embeddings(6)
    sharing = Sharing(guidance_layout(3), shift=log(2), share_group_norm=True)
    expected = measured(adapted, theirs, inputs, adapters[:1], ip.STYLE_AND_LAYOUT, [embeds], sharing=sharing)
    part = segment(adapters[0], embeds[:, 0], {STYLE: torch.ones(6), LAYOUT: torch.ones(6)})
    actual = image_rows(ours, inputs, [part], sharing=sharing)
    close(actual, expected)
    assert (actual - styled(ours, inputs, sharing)).abs().amax((1, 2, 3)).min() > 1e-3


def test_a_styled_call_leaves_nothing_behind(ours, adapters):
    inputs = random_inputs(2)
    before = styled(ours, inputs)
    part = segment(adapters[0], embeddings(2)[:, 0], everywhere(ours, torch.ones(2)))
    image_rows(ours, inputs, [part], sharing=Sharing((0, 0), share_group_norm=True))
    assert torch.equal(styled(ours, inputs), before)


def test_groups_of_one_batch_are_isolated(ours, adapters):
    inputs, embeds = random_inputs(6), embeddings(6)
    sharing, strengths = Sharing((0, 0, 0, 3, 3, 3)), everywhere(ours, torch.ones(6))
    before = image_rows(ours, inputs, [segment(adapters[0], embeds[:, 0], strengths)], sharing=sharing)
    embeds[0] = embeddings(1, seed=9)[0]
    after = image_rows(ours, inputs, [segment(adapters[0], embeds[:, 0], strengths)], sharing=sharing)
    assert torch.equal(after[3:], before[3:])
    # a new style picture of the reference alone reaches all of its group, through keys and values
    assert (after[:3] - before[:3]).abs().amax((1, 2, 3)).min() > 1e-3
