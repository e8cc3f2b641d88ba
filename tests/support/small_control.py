"""Random ControlNets of diffusers for the small model, with weights that matter."""

import torch
from PIL import Image, ImageDraw

from tests.support.scene import SIZE

STEPS = 4


def small_control(pipe, seed: int = 1, **config):
    """A `ControlNetModel` for a pipeline's UNet; its zero convolutions are not zero."""
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    widths = (8, 16, 16)[: {4: 3, 8: 4}[pipe.vae_scale_factor]]
    if "block_out_channels" not in config:
        network = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=widths)
        if config:
            network = ControlNetModel(**{k: v for k, v in network.config.items() if k[0] != "_"} | config)
    else:
        network = ControlNetModel(conditioning_embedding_out_channels=widths, **config)
    return _with_weights(network, seed)


def small_union(pipe, seed: int = 5, types: int = 6, **config):
    """A `ControlNetUnionModel` for a pipeline's UNet, of two blocks, that reads pictures of some types."""
    from diffusers import ControlNetUnionModel

    own = {key: x for key, x in small_control(pipe).config.items() if key[0] != "_" and key != "mid_block_type"}
    channels = own["block_out_channels"][0]
    own |= {"num_control_type": types, "num_trans_channel": channels, "num_proj_channel": channels}
    own |= {"num_trans_layer": 2, "num_trans_head": 4}
    torch.manual_seed(seed)
    return _with_weights(ControlNetUnionModel(**own | config), seed)


def _with_weights(network, seed: int):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "controlnet_" in name or "spatial_ch_projs" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return network.requires_grad_(False).eval()


def small_control_for(engine):
    """A random `ControlNetModel` of diffusers for an engine, such as the embedded model's."""
    from diffusers import ControlNetModel

    names = ("block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim", "norm_num_groups")
    names += ("transformer_layers_per_block", "attention_head_dim", "use_linear_projection", "addition_embed_type")
    names += ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    config = engine.unet.config
    torch.manual_seed(0)
    net = ControlNetModel(**{n: config[n] for n in names}, conditioning_embedding_out_channels=[8, 8, 8])
    for name, weight in net.named_parameters():
        if "controlnet_" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return net.requires_grad_(False).eval()


def small_union_for(engine, types: int = 6):
    """A random `ControlNetUnionModel` of diffusers for an engine."""
    from diffusers import ControlNetUnionModel

    own = {key: x for key, x in small_control_for(engine).config.items() if key[0] != "_" and key != "mid_block_type"}
    channels = own["block_out_channels"][0]
    own |= {"num_control_type": types, "num_trans_channel": channels, "num_proj_channel": channels}
    return _with_weights(ControlNetUnionModel(**own, num_trans_layer=1, num_trans_head=4), 5)


def edges(seed: int = 0, size=SIZE) -> Image.Image:
    """A picture of white lines on black."""
    picture = Image.new("RGB", size)
    generator = torch.Generator().manual_seed(seed)
    points = (torch.rand(6, 2, generator=generator) * torch.tensor(size)).tolist()
    ImageDraw.Draw(picture).line([tuple(p) for p in points], fill=(255, 255, 255), width=2)
    return picture


def under(engine, *controls, **options):
    """The latents of a cat under control pictures."""
    options = {"size": SIZE, "steps": STEPS, "seed": 3, "output": "latents"} | options
    return engine.generate("a cat", control=list(controls), **options).latents
