"""IP-Adapter and InstantStyle: diffusers' own adapter, and a literal attention with a strength for every row.

The first half loads adapters in the published key layout into diffusers' UNet and sets their scales through
diffusers' own code. The second half is what diffusers can't express: strengths, tokens and masks that differ from row
to row, as the users' "precise" presets need.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.loaders import IPAdapterMixin
from diffusers.models.attention_processor import AttnProcessor2_0

TOKENS = 4
STYLE = {"up": {"block_0": [0.0, 1.0, 0.0]}}
STYLE_AND_LAYOUT = {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}}


def random_adapter(unet, embed_dim: int, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """A random global adapter in the published layout: odd numbers count the cross-attentions in registry order."""
    generator = torch.Generator().manual_seed(seed)
    cross_dim = unet.config.cross_attention_dim

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    image_proj = {
        "proj.weight": normal(TOKENS * cross_dim, embed_dim, scale=embed_dim**-0.5),
        "proj.bias": normal(TOKENS * cross_dim, scale=0.5),
        "norm.weight": 1 + normal(cross_dim, scale=0.2),
        "norm.bias": normal(cross_dim, scale=0.2),
    }
    layers = {}
    for number, name in enumerate(_processors(unet)):
        if name.endswith("attn2.processor"):
            channels = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            # keys are drawn large so that the softmax over four tokens is far from flat
            layers[f"{number}.to_k_ip.weight"] = normal(channels, cross_dim, scale=2 * cross_dim**-0.5)
            layers[f"{number}.to_v_ip.weight"] = normal(channels, cross_dim, scale=2 * cross_dim**-0.5)
    return {"image_proj": image_proj, "ip_adapter": layers}


def image_tokens(adapter, embeds: torch.Tensor) -> torch.Tensor:
    """Embeddings [..., embed_dim] -> image tokens [..., 4, cross_dim]: a linear map, reshaped, layer-normalised."""
    weights = adapter["image_proj"]
    flat = embeds @ weights["proj.weight"].T + weights["proj.bias"]
    tokens = flat.unflatten(-1, (TOKENS, -1))
    return F.layer_norm(tokens, tokens.shape[-1:], weights["norm.weight"], weights["norm.bias"], eps=1e-5)


@contextmanager
def diffusers_adapters(unet, adapters, scales):
    """Within the block, `unet` carries diffusers' own IP-Adapters with `scales` (one float, dict or list for each)."""

    class Holder(IPAdapterMixin):
        pass

    holder = Holder()
    holder.unet = unet
    unet._load_ip_adapter_weights(adapters)
    holder.set_ip_adapter_scale(scales)
    try:
        yield unet
    finally:
        unet.encoder_hid_proj = None
        unet.config.encoder_hid_dim_type = None
        unet.set_attn_processor(AttnProcessor2_0())


@dataclass(frozen=True)
class Segment:
    """One image's tokens in every row: the branch of attention that they make is added to the text's."""

    adapter: dict  # published layout
    tokens: torch.Tensor  # [rows, tokens, cross_dim]
    strengths: dict[str, torch.Tensor]  # attention module -> [rows]; a module left out has no image branch
    mask: torch.Tensor | None = None  # [height, width] in [0, 1]
    # changes the keys ("k") or values ("v") [rows, tokens, channels] of a layer
    change: Callable[[str, torch.Tensor], torch.Tensor] = lambda part, states: states


class RowCrossAttention:
    """Attention processor for `attn2`: text attention plus, for each segment, strength x mask x image attention."""

    def __init__(self, number: int, module: str, segments):
        self.number, self.module, self.segments = number, module, segments

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **ignored):
        query = _split(attn.to_q(hidden_states), attn.heads)
        out = _attend(query, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        for segment in self.segments:
            if self.module not in segment.strengths:
                continue
            key, value = (segment.adapter["ip_adapter"][f"{self.number}.to_{part}_ip.weight"] for part in "kv")
            # in fp64, if the UNet is: the same numbers, exactly
            tokens, key, value = (x.to(query.dtype) for x in (segment.tokens, key, value))
            image = _attend(query, segment.change("k", tokens @ key.T), segment.change("v", tokens @ value.T))
            if segment.mask is not None:
                image = image * IPAdapterMaskProcessor.downsample(segment.mask[None], *image.shape)
            out = out + segment.strengths[self.module][:, None, None] * image
        return attn.to_out[0](out)


@contextmanager
def row_adapters(unet, segments):
    """Within the block, every cross-attention of `unet` adds the image branches of `segments`."""
    undo = []
    for number, name in enumerate(_processors(unet)):
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            undo.append((attention, attention.processor))
            attention.processor = RowCrossAttention(number, name.split(".transformer_blocks")[0], segments)
    try:
        yield unet
    finally:
        for attention, processor in undo:
            attention.processor = processor


def _processors(unet):
    return [name for name in unet.attn_processors if "encoder_hid_proj" not in name]


def _split(states, heads):
    # [rows, tokens, heads * d] -> [rows, heads, tokens, d]
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(query, key, value):
    heads, d = query.shape[1], query.shape[-1]
    logits = query @ _split(key, heads).transpose(-1, -2) / d**0.5
    return (logits.softmax(-1) @ _split(value, heads)).transpose(1, 2).flatten(2)
