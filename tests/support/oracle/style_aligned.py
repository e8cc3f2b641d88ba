"""StyleAligned, literally: reference tokens are concatenated, AdaIN is computed from its definition, logits exist.

Rows of a batch are independent of any guidance layout: `Sharing.references` names, for every row, the row that it
takes its style from. A reference row names itself, and goes through the same concatenation as every other row.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import log

import torch

EPS = 1e-5
# settings of `Sharing` and of StyleAligned that are tested everywhere
SETTINGS = {
    "default": {},
    "shift_log_2": {"shift": log(2)},
    "shift_minus_3": {"shift": -3.0},
    "scale_half": {"scale": 0.5},
    "scale_1.7_and_shift": {"scale": 1.7, "shift": 0.3},
    "group_norm": {"share_group_norm": True},
    "group_and_layer_norm": {"share_group_norm": True, "share_layer_norm": True},
    "adain_on_values": {"adain": {"q": 1.0, "k": 1.0, "v": 1.0}},
    "half_strength_adain": {"adain": {"q": 0.5, "k": 0.25}},
    "no_adain": {"adain": {}},
    "adain_only": {"share_attention": False},
    "swap": {"mode": "swap"},
    "half_of_the_layers": {"only_self_level": 0.5},
    "style_block_only": {"layers": ("up_blocks.0.attentions.1",)},
}


@dataclass(frozen=True)
class Sharing:
    """What is shared between the rows of a batch, and how strongly."""

    references: tuple[int, ...]  # row -> row whose keys, values and statistics it takes
    adain: Mapping[str, float] = field(default_factory=lambda: {"q": 1.0, "k": 1.0})  # q, k, v -> strength in [0, 1]
    scale: float = 1.0  # multiplies the copy of the reference's keys that targets get
    shift: float = 0.0  # added to the logits of the reference's tokens
    mode: str = "concat"  # or "swap": the row's own tokens are left out
    share_attention: bool = True
    full_attention_share: bool = False  # every row attends to all rows of its group; no AdaIN, scale or shift
    groups: tuple[int, ...] = ()  # row -> group, for full sharing only
    share_group_norm: bool = False
    share_layer_norm: bool = False
    only_self_level: float = 0.0  # share of self-attention layers that stay plain
    layers: tuple[str, ...] = ("",)  # a layer shares if its name contains any of these


def guidance_layout(images: int, branches: int = 2) -> tuple[int, ...]:
    """References of the paper's batch: `branches` blocks of `images` rows, the first row of a block its reference."""
    return tuple(branch * images for branch in range(branches) for _ in range(images))


def plain_layers(count: int, level: float) -> list[bool]:
    """Which of `count` self-attention layers stay plain at `only_self_level` = `level` (spread out evenly)."""
    if level in (0, 1):
        return [bool(level)] * count
    inverted = level > 0.5
    marked = int((1 - level if inverted else level) * count)
    every = count // marked
    return [(index % every == 0) != inverted for index in range(count)]


def adain(values: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """Give `values` [rows, heads, tokens, d] the token statistics of `style`: unbiased variance, eps in the root."""
    mean, std = _statistics(values)
    style_mean, style_std = _statistics(style)
    return (values - mean) / std * style_std + style_mean


def _statistics(values):
    # torch.var, of dimensions before the last, takes five times as long
    mean = values.mean(dim=-2, keepdim=True)
    variance = (values - mean).square().sum(dim=-2, keepdim=True) / (values.shape[-2] - 1)
    return mean, torch.sqrt(variance + EPS)


class SharedSelfAttention:
    """Attention processor for `attn1`: project, AdaIN, concatenate, logits, softmax, project back."""

    def __init__(self, sharing: Sharing):
        self.sharing = sharing

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **ignored):
        if self.sharing.full_attention_share:
            return self._full(attn, hidden_states)
        sharing, references = self.sharing, list(self.sharing.references)
        query, key, value = (
            _split(projection(hidden_states), attn.heads) for projection in (attn.to_q, attn.to_k, attn.to_v)
        )  # [rows, heads, tokens, d]
        query, key, value = (
            tensor.lerp(adain(tensor, tensor[references]), sharing.adain[name]) if name in sharing.adain else tensor
            for name, tensor in (("q", query), ("k", key), ("v", value))
        )
        shift = torch.zeros(key.shape[-2])
        if sharing.share_attention:
            is_target = torch.tensor([row != reference for row, reference in enumerate(references)])
            factor = torch.where(is_target, sharing.scale, 1.0)[:, None, None, None]
            style_key, style_value = key[references] * factor, value[references]
            style_shift = torch.full_like(shift, sharing.shift)
            if sharing.mode == "swap":
                key, value, shift = style_key, style_value, style_shift
            else:
                key, value = torch.cat([key, style_key], -2), torch.cat([value, style_value], -2)
                shift = torch.cat([shift, style_shift])
        return _merge(attn, _attend(query, key, value, shift))

    def _full(self, attn, hidden_states):
        groups = torch.tensor(self.sharing.groups)
        out = torch.empty_like(hidden_states)
        for group in groups.unique():
            mine = hidden_states[groups == group]  # [images, tokens, channels]
            sequence = mine.reshape(1, -1, mine.shape[-1])
            query, key, value = (
                _split(projection(sequence), attn.heads) for projection in (attn.to_q, attn.to_k, attn.to_v)
            )
            out[groups == group] = _merge(attn, _attend(query, key, value, torch.zeros(1))).reshape(mine.shape)
        return out


@contextmanager
def shared(unet, sharing: Sharing | None):
    """Within the block, diffusers' `unet` shares attention and norms as `sharing` says; None leaves it plain."""
    if sharing is None:
        yield unet
        return
    attentions = [name for name in unet.attn_processors if name.endswith("attn1.processor")]
    stays_plain = plain_layers(len(attentions), sharing.only_self_level)
    replaced, patched = [], []
    for name, plain in zip(attentions, stays_plain):
        if plain or not any(part in name for part in sharing.layers):
            continue
        attention = unet.get_submodule(name.removesuffix(".processor"))
        replaced.append((attention, attention.processor))
        attention.processor = SharedSelfAttention(sharing)
    for name, module in unet.named_modules():
        group = sharing.share_group_norm and isinstance(module, torch.nn.GroupNorm)
        layer = sharing.share_layer_norm and isinstance(module, torch.nn.LayerNorm) and "transformer_blocks" in name
        if group or layer:
            patched.append(module)
            module.forward = _concatenated(module.forward, list(sharing.references))
    try:
        yield unet
    finally:
        for attention, processor in replaced:
            attention.processor = processor
        for module in patched:
            del module.forward


def _concatenated(forward, references):
    def shared_forward(hidden_states):
        size = hidden_states.shape[-2]
        return forward(torch.cat([hidden_states, hidden_states[references]], -2))[..., :size, :]

    return shared_forward


def _split(states, heads):
    # [rows, tokens, heads * d] -> [rows, heads, tokens, d]
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(query, key, value, shift):
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + shift
    return logits.softmax(-1) @ value


def _merge(attn, states):
    # [rows, heads, tokens, d] -> [rows, tokens, channels], through the output projection
    return attn.to_out[0](states.transpose(1, 2).flatten(2))
