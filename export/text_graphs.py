"""Text encoders and the projection of their states, as modules on flat tensors.

The encoders are reimplemented here on the weights of transformers' CLIP: the causal mask is a constant, learned vectors
are an input, and unused layers are left out.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from stylefast.errors import ExportError
from stylefast.export.components import Component, in_type
from stylefast.export.unet_graph import TEXT_TOKENS, Tensor
from stylefast.models.unet import UNet


class ClipLayers(nn.Module):
    """Transformer layers of a CLIP encoder, [n, tokens, width] in and out."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = x + _attention(layer.self_attn, layer.layer_norm1(x), mask)
            x = x + layer.mlp(layer.layer_norm2(x))
        return x


def _attention(attention: nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    heads = attention.num_heads
    q, k, v = (
        project(x).unflatten(-1, (heads, -1)).transpose(1, 2)  # [n, heads, tokens, d]
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


class TextGraph(nn.Module):
    """Text encoder: token ids and learned vectors to second-to-last states, with a projection also to the pooled state.

    ids [prompts, tokens] int64; ids >= the vocabulary's size are rows of `extra` [vectors, width], which may be empty.
    position [prompts] is the token whose last state is projected.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        text = getattr(encoder, "text_model", encoder)
        layers = list(text.encoder.layers)
        self.table, self.places = text.embeddings.token_embedding, text.embeddings.position_embedding
        self.body = ClipLayers(layers[:-1])
        self.projection = getattr(encoder, "text_projection", None)
        if self.projection is not None:
            self.end, self.norm = ClipLayers(layers[-1:]), text.final_layer_norm
        self.vocabulary = self.table.num_embeddings
        tokens, dtype = self.places.num_embeddings, self.table.weight.dtype
        # finite, because some fused kernels return NaN for the difference of two infinities
        mask = torch.full((tokens, tokens), torch.finfo(dtype).min, dtype=dtype, device=self.table.weight.device)
        self.register_buffer("mask", mask.triu_(1), persistent=False)

    def forward(
        self, ids: torch.Tensor, extra: torch.Tensor, position: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        known = ids < self.vocabulary
        # one extra row, so that the lookup also works without learned vectors
        learned = torch.cat([extra, self.places.weight[:1]])
        words, vectors = torch.where(known, ids, 0), torch.where(known, 0, ids - self.vocabulary)
        x = torch.where(known[..., None], self.table(words), learned[vectors])  # [prompts, tokens, width]
        hidden = self.body(x + self.places.weight, self.mask)
        if self.projection is None:
            return hidden
        last = self.norm(self.end(hidden, self.mask))
        pooled = last[torch.arange(last.shape[0], device=last.device), position]
        return hidden, self.projection(pooled)


class TextProjector(nn.Module):
    """Text projections: states [text_pages, tokens, cross_dim] to packed keys and values of every level's layers."""

    def __init__(self, unet: UNet):
        super().__init__()
        levels = [unet.layout.at_level(level) for level in range(unet.layout.levels)]
        self.heads = [unet.layout.layers[members[0]].heads for members in levels]
        attentions = [[unet.get_submodule(unet.layout.layers[i].name).attn2 for i in members] for members in levels]
        self.keys = nn.ModuleList(nn.ModuleList(a.to_k for a in members) for members in attentions)
        self.values = nn.ModuleList(nn.ModuleList(a.to_v for a in members) for members in attentions)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.stack(
                [
                    torch.stack([projection(states).unflatten(-1, (heads, -1)) for projection in pair])
                    for pair in zip(keys, values, strict=True)
                ]
            )
            for keys, values, heads in zip(self.keys, self.values, self.heads, strict=True)
        )


def text_encoder(encoder: nn.Module, dtype: torch.dtype) -> Component:
    """Return a CLIPTextModel (SDXL's first) or CLIPTextModelWithProjection (its second) as a component.

    Raises ExportError for another kind of encoder.
    """
    text = getattr(encoder, "text_model", encoder)
    if not hasattr(text, "encoder") or not hasattr(text, "final_layer_norm"):
        raise ExportError(f"the text encoder is a {type(encoder).__name__}; a CLIP text model can be exported")
    module = TextGraph(in_type(encoder, dtype))
    tokens, width = module.places.weight.shape
    second = module.projection is not None
    inputs = [Tensor("ids", torch.int64, ("prompts", tokens)), Tensor("extra", dtype, ("vectors", width))]
    outputs = [Tensor("hidden", dtype, ("prompts", tokens, width))]
    if second:
        inputs.append(Tensor("position", torch.int64, ("prompts",)))
        outputs.append(Tensor("pooled", dtype, ("prompts", module.projection.out_features)))
    return Component(
        "text_encoder_2" if second else "text_encoder",
        module,
        dtype,
        tuple(inputs),
        tuple(outputs),
        # examples also read learned vectors, of which example sizes have at least 2
        limits={"ids": module.vocabulary + 2, "position": tokens},
        facts={"vocabulary": module.vocabulary},
    )


def text_projector(unet: UNet, dtype: torch.dtype, tokens: int = TEXT_TOKENS) -> Component:
    """Return the UNet's projections of text states, which stay constant over the steps, as a component."""
    dims = (unet.config["cross_attention_dim"],)
    return Component(
        "text_projector",
        in_type(TextProjector(unet), dtype),
        dtype,
        (Tensor("states", dtype, ("text_pages", tokens, *dims)),),
        packed_key_values(unet.layout, "text_kv", dtype, "text_pages", tokens),
    )


def packed_key_values(layout, name: str, dtype: torch.dtype, pages: str, tokens: int | str) -> tuple[Tensor, ...]:
    """Return one tensor [layers of the level, 2, pages, tokens, heads, d] per level, as the UNet's graphs read them."""
    found = []
    for level in range(layout.levels):
        members = [layer for layer in layout.layers if layer.level == level]
        heads, width = members[0].heads, members[0].channels // members[0].heads
        found.append(Tensor(f"{name}_{level}", dtype, (len(members), 2, pages, tokens, heads, width)))
    return tuple(found)


__all__ = ["ClipLayers", "TextGraph", "TextProjector", "packed_key_values", "text_encoder", "text_projector"]
