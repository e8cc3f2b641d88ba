"""SDXL's smaller relatives: the same UNet class with other depths equals diffusers', styled as well as plain."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from stylefast.errors import ModelFormatError
from stylefast.models.layout import AttentionLayout
from stylefast.models.unet import GroupNorm, UNet
from stylefast.styles.bank_size import BankShapes
from tests.support.oracle.style_aligned import Sharing, guidance_layout, shared
from tests.support.rows import plain_rows, run, share
from tests.support.small_families import FAMILIES, family_config
from tests.support.small_sdxl import small_unet_config
from tests.support.small_unet import CROSS_DIM, POOLED_DIM, forward, random_inputs, sharpen

pytestmark = pytest.mark.usefixtures("pytorchs_attention")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """(diffusers' UNet, ours on the same weights) in fp64, so that another order of sums does not show."""
    config = family_config(
        request.param, cross_attention_dim=CROSS_DIM, projection_class_embeddings_input_dim=POOLED_DIM + 6 * 8
    )
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**config).eval().requires_grad_(False)
    sharpen(theirs, 0)
    theirs = theirs.double()
    return theirs, UNet.from_state(dict(theirs.config), theirs.state_dict())


def doubled(inputs):
    return type(inputs)(*(getattr(inputs, name).double() for name in inputs.__dataclass_fields__))


def near_fp64(actual, expected):
    """Two runs in fp64 are equal but for the roundings of the time embedding's sinusoids, which are fp32 in both."""
    assert torch.isfinite(actual).all()
    assert (actual - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("size", [(8, 8), (13, 6)], ids=["square", "odd"])
def test_plain_rows_equal_diffusers(pair, size):
    theirs, ours = pair
    inputs = doubled(random_inputs(2, 1, *size, timestep=None))
    near_fp64(run(ours, inputs, plain_rows(ours.layout, 2)), forward(theirs, inputs))


def test_style_aligned_equals_the_literal_oracle(pair):
    theirs, ours = pair
    # at least two tokens at the coarsest level, else the oracle's variance is NaN
    inputs = doubled(random_inputs(4, 0, 16, 8))
    sharing = Sharing(guidance_layout(2), share_group_norm=True)
    actual = run(ours, inputs, share(plain_rows(ours.layout, 4), ours.layout, sharing))
    with shared(theirs, sharing):
        near_fp64(actual, forward(theirs, inputs))


def test_layers_are_counted_as_diffusers_counts_its_processors(pair):
    theirs, ours = pair
    names = [name for name in theirs.attn_processors if name.endswith("attn1.processor")]
    assert [f"{layer.name}.attn1.processor" for layer in ours.layout.layers] == names
    assert {layer.module for layer in ours.layout.layers} == set(ours.layout.modules)


def test_levels_are_those_of_the_feature_maps_that_attend(pair):
    _, ours = pair
    sizes, seen = ours.attention_sizes(13, 6), {}
    for layer in ours.layout.layers:
        attention = ours.get_submodule(layer.name).attn1
        attention.register_forward_pre_hook(lambda _, args, level=layer.level: seen.update({level: args[0].shape[1]}))
    run(ours, doubled(random_inputs(1, 0, 13, 6)), plain_rows(ours.layout, 1))
    assert [seen[level] for level in range(ours.layout.levels)] == [h * w for h, w in sizes]


def test_a_banks_shapes_are_those_of_the_unet(pair):
    _, ours = pair
    shapes = BankShapes.from_config(ours.config, (8 * 6, 8 * 13))
    norms = [module for module in ours.modules() if isinstance(module, GroupNorm)]
    elements = {}
    for norm in norms:
        norm.register_forward_pre_hook(lambda m, args: elements.update({m.index: args[0][0].numel() // m.groups}))
    run(ours, doubled(random_inputs(1, 0, 13, 6)), plain_rows(ours.layout, 1))
    assert shapes.norm_elements == tuple(elements[i] for i in range(len(norms)))
    sizes = ours.attention_sizes(13, 6)
    assert [layer.tokens for layer in shapes.layers] == [
        sizes[layer.level][0] * sizes[layer.level][1] for layer in ours.layout.layers
    ]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"transformer_layers_per_block": [1, [1, 1], [2, 2]]}, "reverse_transformer_layers_per_block is needed"),
        (
            {"transformer_layers_per_block": [1, [1], [2, 2]], "reverse_transformer_layers_per_block": [1, 1, 1]},
            r"\[1\] for a block of 2 attentions",
        ),
        ({"transformer_layers_per_block": [1, 1]}, "3 entries are needed"),
        ({"transformer_layers_per_block": [1, 1, -1]}, "-1 for a block"),
        ({"transformer_layers_per_block": [1, 1, "2"]}, "'2' for a block"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type is 'UNetMidBlock2DSimpleCrossAttn'"),
        (
            {"down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D", "CrossAttnDownBlock2D")},
            "SimpleCrossAttn",
        ),
        ({"up_block_types": None}, "up_block_types is None"),
        ({"block_out_channels": (32, 64, 10**9)}, "block_out_channels"),
        ({"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
        ({"layers_per_block": [2, 2]}, "layers_per_block"),
        ({"attention_head_dim": 3}, "3 attention heads .* do not divide 64"),
        ({"attention_head_dim": "8"}, "attention_head_dim is '8'"),
        ({"transformer_layers_per_block": 0}, "no attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_of_other_blocks_is_refused_by_the_key(changes, said):
    with pytest.raises(ModelFormatError, match=said):
        AttentionLayout.from_config(small_unet_config(**changes))
