"""Small UNet configs in the shapes of SDXL's published relatives: fewer layers, other middle blocks."""

from tests.support.small_sdxl import small_unet_config

# name -> what differs from SDXL's own config, at a tenth of the published depths
FAMILIES = {
    # other depths for each layer, one resnet in the middle
    "ssd_1b": {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 3], [2, 1, 1], 1],
    },
    "vega": {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    },
    # one resnet a block; no middle block at all in the smaller one
    "koala_700m": {"layers_per_block": 1, "mid_block_type": None, "transformer_layers_per_block": [0, 2, 3]},
    "koala_1b": {"layers_per_block": 1, "transformer_layers_per_block": [0, 2, 3]},
    # published by nobody so far, but what diffusers' config can say
    "depths_down_to_0": {
        "transformer_layers_per_block": [1, [0, 2], [1, 0]],
        "reverse_transformer_layers_per_block": [[1, 0, 2], [0, 0, 1], 1],
    },
    "a_count_for_each_block": {"layers_per_block": [1, 2, 3]},
    "attention_at_the_finest_level_alone": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
    },
    "attention_at_the_first_and_last_level": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "four_blocks": {
        "block_out_channels": (32, 32, 64, 64),
        "attention_head_dim": (2, 2, 4, 4),
        "transformer_layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}
PUBLISHED = ("ssd_1b", "vega", "koala_700m", "koala_1b")


def family_config(name, **changes):
    """A UNet2DConditionModel config (a dict of constructor arguments) in the shape of `name`."""
    return small_unet_config(**{**FAMILIES[name], **changes})
