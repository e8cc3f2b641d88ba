"""Image encoder, adapter projections and VAE decoder, as modules on flat tensors."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from stylefast.errors import ExportError
from stylefast.export.components import Component, in_type, weights_digest
from stylefast.export.text_graphs import ClipLayers, packed_key_values
from stylefast.export.unet_graph import Tensor
from stylefast.models import vae as vaes
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.vae_copies import working_decoder


class ImageGraph(nn.Module):
    """Image encoder: prepared pixels [pictures, 3, side, side] to projected embeddings and second-to-last features."""

    def __init__(self, vision_model: nn.Module):
        super().__init__()
        vision = vision_model.vision_model
        layers = list(vision.encoder.layers)
        self.embeddings, self.first = vision.embeddings, vision.pre_layrnorm
        self.body, self.end = ClipLayers(layers[:-1]), ClipLayers(layers[-1:])
        self.norm, self.projection = vision.post_layernorm, vision_model.visual_projection

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patches = self.body(self.first(self.embeddings(pixels)))
        return self.projection(self.norm(self.end(patches)[:, 0])), patches


class ImageProjector(nn.Module):
    """Adapter projections: image features to packed keys and values of every level's layers.

    Layers that the adapter was not loaded for get zeros.
    """

    def __init__(self, adapter: IPAdapter):
        super().__init__()
        self.projector, self.layout = adapter.projector, adapter.layout
        self.layers = nn.ModuleDict(adapter.layer_projections)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = self.projector(features)  # [image_pages, tokens, cross_dim]
        return tuple(
            torch.stack([self._pair(tokens, i) for i in self.layout.at_level(level)])
            for level in range(self.layout.levels)
        )

    def _pair(self, tokens: torch.Tensor, index: int) -> torch.Tensor:  # -> [2, image_pages, tokens, heads, d]
        layer = self.layout.layers[index]
        if str(index) in self.layers:
            both = self.layers[str(index)](tokens)
        else:
            both = tokens.new_zeros(*tokens.shape[:2], 2 * layer.channels)
        return torch.stack(both.unflatten(-1, (2, layer.heads, -1)).unbind(-3))


class DecoderGraph(nn.Module):
    """VAE decoder: latents in the VAE's own range, without scale and shift, to pictures around -1..1."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(latents)


class _Enlarge(nn.Module):
    """Upsampling by 2 and a convolution: diffusers' Upsample2D without its branches on the batch size."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor, *_) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def image_encoder(encoder: ImageEncoder, dtype: torch.dtype) -> Component:
    """Return a CLIP image encoder as a component; it takes pixels as `ImageEncoder.pixels` prepares them."""
    module = ImageGraph(in_type(encoder.vision_model, dtype))
    side = encoder.image_size
    patches = module.embeddings.position_embedding.num_embeddings
    return Component(
        "image_encoder",
        module,
        dtype,
        (Tensor("pixels", dtype, ("pictures", 3, side, side)),),
        (
            Tensor("embeds", dtype, ("pictures", encoder.embed_dim)),
            Tensor("patches", dtype, ("pictures", patches, encoder.hidden_size)),
        ),
        facts={"weights": image_encoder_digest(encoder)},
    )


def image_projector(adapter: IPAdapter, dtype: torch.dtype) -> Component:
    """Return an adapter as a component: image features (embeddings, or patches for "plus") to keys and values."""
    patches = () if adapter.kind == "global" else ("patches",)
    return Component(
        "image_projector",
        in_type(ImageProjector(adapter), dtype),
        dtype,
        (Tensor("features", dtype, ("image_pages", *patches, adapter.embed_dim)),),
        packed_key_values(adapter.layout, "image_kv", dtype, "image_pages", adapter.token_count),
        facts={"kind": adapter.kind, "weights": adapter_digest(adapter)},
    )


def vae_decoder(vae: nn.Module, dtype: torch.dtype) -> Component:
    """Return a VAE's decoder in `dtype` as a component; see `decoder_dtype` for the choice of type.

    Input latents are unscaled: `latents / scaling_factor`, or by mean and deviation if the VAE's config has those.
    """
    decoder = working_decoder(vae, dtype)
    factor = vaes.downscale(vae)
    # copies the modules, shares the weights
    shared = {id(t): t for t in (*decoder.parameters(), *decoder.buffers())}
    decoder = _without_branches(copy.deepcopy(decoder, shared))
    return Component(
        "vae_decoder",
        DecoderGraph(decoder),
        dtype,
        (Tensor("latents", dtype, ("pictures", vae.config["latent_channels"], "height", "width")),),
        (Tensor("pixels", dtype, ("pictures", 3, f"{factor}*height", f"{factor}*width")),),
        facts={"factor": factor, "weights": decoder_digest(vae)},
    )


def decoder_dtype(vae: nn.Module, asked: torch.dtype) -> torch.dtype:
    """Return the type to export a VAE's decoder in for a model in `asked`: float32 if it would overflow in float16."""
    overflows = type(vae).__name__ != "AutoencoderTiny" and vae.config.get("force_upcast", True)
    return torch.float32 if asked == torch.float16 and overflows else asked


def image_encoder_digest(encoder: ImageEncoder) -> str:
    """Return the digest of an image encoder's weights, which its exported graph's facts hold under "weights"."""
    return weights_digest(encoder.vision_model.state_dict())


def adapter_digest(adapter: IPAdapter) -> str:
    """Return the digest of an adapter's weights, in the type and for the layers that it was loaded with."""
    return weights_digest(adapter.state_dict())


def decoder_digest(vae: nn.Module) -> str:
    """Return the digest of the weights of a VAE's decoding half."""
    halves = ("decoder.", "post_quant_conv.")
    return weights_digest({name: tensor for name, tensor in vae.state_dict().items() if name.startswith(halves)})


def _without_branches(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if type(child).__name__ == "Upsample2D":
            if child.norm is not None or child.use_conv_transpose or not child.interpolate or not child.use_conv:
                raise ExportError(f"the VAE enlarges by another layer than SDXL's ({name}); it can't be exported")
            setattr(module, name, _Enlarge(child.conv if child.name == "conv" else child.Conv2d_0))
        else:
            _without_branches(child)
    return module


__all__ = [
    "DecoderGraph",
    "ImageGraph",
    "ImageProjector",
    "adapter_digest",
    "decoder_digest",
    "decoder_dtype",
    "image_encoder",
    "image_encoder_digest",
    "image_projector",
    "vae_decoder",
]
