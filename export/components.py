"""Model parts around the UNet as graphs of flat tensors: text encoders, VAE decoder, image encoder and projections.

A `Component` is a module whose forward takes tensors in the order of `inputs` and returns those of `outputs`; it is
traced and written as ONNX. The written weights include LoRAs, but not learned vectors and strengths.

    text_encoder       ids, extra                  -> hidden
    text_encoder_2     ids, extra, position        -> hidden, pooled
    text_projector     states                      -> text_kv_<level>
    image_encoder      pixels                      -> embeds, patches
    image_projector    features                    -> image_kv_<level>
    vae_decoder        latents (unscaled)          -> pictures around -1..1

The encoders are reimplemented on the weights of transformers' CLIP: the causal mask is a constant, learned vectors are
an input, and unused layers are left out.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from stylefast import values
from stylefast.errors import ExportError, InvalidRequest, MissingDependency
from stylefast.export.manifest import GraphEntry
from stylefast.export.onnx_file import described, require_onnx, save_model, write_weights
from stylefast.export.onnx_writer import check_opset
from stylefast.export.unet_graph import TEXT_TOKENS, Tensor
from stylefast.models import vae as vaes
from stylefast.models.config_files import config_of
from stylefast.models.digests import weights_digest
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.layout import AttentionLayout
from stylefast.models.module_lists import list_of
from stylefast.models.unet import UNet
from stylefast.models.vae_copies import working_decoder

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import (
        CLIPAttention,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPVisionModelWithProjection,
    )

# protobuf files are limited to 2 GB, so larger weights go into a separate file, which leaves room for the graph
LARGEST_FILE = 10**9

Part = TypeVar("Part", bound=nn.Module)

# name of a dimension that may vary -> (least, most) that a graph without profiles is exported for
DIMENSIONS = {
    "prompts": (1, 256),
    "vectors": (0, 4096),
    "text_pages": (1, 4096),
    "pictures": (1, 256),
    "image_pages": (1, 4096),
    "patches": (1, 4096),
    "height": (2, 1024),
    "width": (2, 1024),
}
# for tracing: all different and above 1, so that no dimension is mistaken for another or for 1
_EXAMPLES = {
    "prompts": 3,
    "vectors": 5,
    "text_pages": 3,
    "pictures": 2,
    "image_pages": 3,
    "patches": 11,
    "height": 6,
    "width": 10,
}


@dataclass(frozen=True, eq=False)
class Component:
    """One module to export, with its inputs and outputs.

    dtype: of its weights and floating inputs. limits: input name -> exclusive upper bound of its integers. facts: what
    a loader needs besides shapes, for the manifest; plain values.
    """

    name: str
    module: nn.Module
    dtype: torch.dtype
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    limits: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, int | str] = field(default_factory=dict)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Return the names of its inputs' dimensions that may vary."""
        return tuple(dict.fromkeys(d for tensor in self.inputs for d in tensor.dims if isinstance(d, str)))

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def sizes(self, fixed: Mapping[str, int] | None = None) -> dict[str, int]:
        """Return sizes to trace with: those in `fixed`, else examples. Raises InvalidRequest for unfit ones."""
        fixed = dict(fixed or {})
        for name, value in fixed.items():
            if name not in self.dimensions:
                known = ", ".join(self.dimensions)
                raise InvalidRequest(
                    f"the {self.name} has no dimension {values.quoted(name)} that may be fixed; it has {known}"
                )
            values.whole_number(name, value, *DIMENSIONS[name])
        return {name: _EXAMPLES[name] for name in self.dimensions} | fixed

    def example_inputs(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
        """Return random inputs by name; numbers are drawn on the CPU from `seed`."""
        draw, made = torch.Generator().manual_seed(seed), {}
        for tensor in self.inputs:
            dims = tensor.shape(sizes)
            if tensor.dtype.is_floating_point:
                value = torch.randn(dims, generator=draw)
            else:
                value = torch.randint(0, self.limits[tensor.name], dims, generator=draw)
            made[tensor.name] = value.to(tensor.dtype).to(self.device)
        return made

    def dynamic_shapes(self, fixed: Mapping[str, int] | None = None) -> tuple[dict, ...]:
        """Return, for `torch.export`, the dimensions of every input that may vary; those in `fixed` don't."""
        named = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in DIMENSIONS.items()}
        return tuple(
            {i: named[d] for i, d in enumerate(tensor.dims) if isinstance(d, str) and d not in (fixed or {})}
            for tensor in self.inputs
        )

    def trace(self, fixed: Mapping[str, int] | None = None) -> torch.export.ExportedProgram:
        """Return the graph in PyTorch's own operations; `fixed` are sizes that don't vary."""
        inputs = tuple(self.example_inputs(self.sizes(fixed)).values())
        with torch.no_grad():
            return torch.export.export(
                self.module.eval(), inputs, dynamic_shapes=self.dynamic_shapes(fixed), strict=False
            )


def export_component(
    component: Component,
    folder: Path,
    *,
    opset: int | None = None,
    fixed: Mapping[str, int] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> GraphEntry:
    """Write `<component>.onnx` to a folder, with `<component>.onnx.data` for weights beyond LARGEST_FILE.

    opset: version of ONNX's operators; None: the oldest that supports the component's type. fixed: dimensions that get
    one size. metadata: strings that go into the file. Returns its entry for the manifest, with the component's facts in
    `extra`.

    Raises MissingDependency without onnx and onnxscript, ExportError, InvalidRequest for sizes that can't be fixed, and
    OSError from the file system.
    """
    require_onnx()
    if find_spec("onnxscript") is None:
        raise MissingDependency(
            "onnxscript is not installed, without which no ONNX model can be written; "
            "`pip install 'stylefast[export]'` brings it"
        )
    fixed, opset = dict(fixed or {}), check_opset(opset, component.dtype)
    program = component.trace(fixed)
    inputs, outputs = ([t.fixed(fixed) for t in tensors] for tensors in (component.inputs, component.outputs))
    written = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        verbose=False,
        optimize=True,
        input_names=[t.name for t in inputs],
        output_names=[t.name for t in outputs],
    )
    assert written is not None  # as with dynamo=True
    model = written.model
    _name_dimensions(model, inputs, outputs)
    path, weights = Path(folder) / f"{component.name}.onnx", None
    if sum(x.const_value.nbytes for x in model.graph.initializers.values() if x.const_value is not None) > LARGEST_FILE:
        weights = write_weights(model, path.with_name(f"{path.name}.data"))
    files = save_model(model, path, {"component": component.name, **(metadata or {})}, weights)
    return GraphEntry(
        component.name, path.name, files, {}, described(inputs), described(outputs), fixed, opset, dict(component.facts)
    )


def in_type(module: Part, dtype: torch.dtype) -> Part:
    """Return the module itself if its weights are of this type, else a copy in it."""
    if all(p.dtype == dtype for p in module.parameters()):
        return module
    return copy.deepcopy(module).to(dtype)


def _name_dimensions(model, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Give the graph's inputs and outputs their dimensions' names in place of the tracer's."""
    import onnx_ir as ir

    for found, tensors in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, tensor in zip(found, tensors, strict=True):
            value.shape = ir.Shape(tensor.dims)


class ClipLayers(nn.Module):
    """Transformer layers of a CLIP encoder, [n, tokens, width] in and out."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        from transformers.models.clip.modeling_clip import CLIPEncoderLayer

        for layer in self.layers:
            assert isinstance(layer, CLIPEncoderLayer)
            x = x + _attention(layer.self_attn, layer.layer_norm1(x), mask)
            x = x + layer.mlp(layer.layer_norm2(x))
        return x


def _attention(attention: "CLIPAttention", x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    heads = attention.num_heads
    q, k, v = (
        project(x).unflatten(-1, (heads, -1)).transpose(1, 2)  # [n, heads, tokens, d]
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


def _text_model(encoder: "CLIPTextModel | CLIPTextModelWithProjection") -> "CLIPTextModel":
    """Return the part of a text encoder without its projection; some versions also wrap that of a CLIPTextModel."""
    from transformers import CLIPTextModelWithProjection

    if isinstance(encoder, CLIPTextModelWithProjection):
        return encoder.text_model
    return getattr(encoder, "text_model", encoder)


class TextGraph(nn.Module):
    """Text encoder: token ids and learned vectors to second-to-last states, with a projection also to the pooled state.

    ids [prompts, tokens] int64; ids >= the vocabulary's size are rows of `extra` [vectors, width], which may be empty.
    position [prompts] is the token whose last state is projected.
    """

    def __init__(self, encoder: "CLIPTextModel | CLIPTextModelWithProjection"):
        super().__init__()
        text = _text_model(encoder)
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
        attentions = [[unet.block(unet.layout.layers[i].name).attn2 for i in members] for members in levels]
        self.keys = list_of(nn.ModuleList(a.to_k for a in members) for members in attentions)
        self.values = list_of(nn.ModuleList(a.to_v for a in members) for members in attentions)

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


def text_encoder(encoder: "CLIPTextModel | CLIPTextModelWithProjection", dtype: torch.dtype) -> Component:
    """Return a CLIPTextModel (SDXL's first) or CLIPTextModelWithProjection (its second) as a component.

    Raises ExportError for another kind of encoder.
    """
    text = _text_model(encoder)
    if not hasattr(text, "encoder") or not hasattr(text, "final_layer_norm"):
        raise ExportError(f"the text encoder is a {type(encoder).__name__}; a CLIP text model can be exported")
    module = TextGraph(in_type(encoder, dtype))
    tokens, width = module.places.weight.shape
    second = module.projection is not None
    inputs = [Tensor("ids", torch.int64, ("prompts", tokens)), Tensor("extra", dtype, ("vectors", width))]
    outputs = [Tensor("hidden", dtype, ("prompts", tokens, width))]
    if module.projection is not None:
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


def packed_key_values(
    layout: AttentionLayout, name: str, dtype: torch.dtype, pages: str, tokens: int | str
) -> tuple[Tensor, ...]:
    """Return one tensor [layers of the level, 2, pages, tokens, heads, d] per level, as the UNet's graphs read them."""
    found = []
    for level in range(layout.levels):
        members = [layer for layer in layout.layers if layer.level == level]
        heads, width = members[0].heads, members[0].channels // members[0].heads
        found.append(Tensor(f"{name}_{level}", dtype, (len(members), 2, pages, tokens, heads, width)))
    return tuple(found)


class ImageGraph(nn.Module):
    """Image encoder: prepared pixels [pictures, 3, side, side] to projected embeddings and second-to-last features."""

    def __init__(self, vision_model: "CLIPVisionModelWithProjection"):
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
        self.layers = nn.ModuleDict(dict(adapter.layer_projections.items()))

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
        (Tensor("latents", dtype, ("pictures", config_of(vae)["latent_channels"], "height", "width")),),
        (Tensor("pixels", dtype, ("pictures", 3, f"{factor}*height", f"{factor}*width")),),
        facts={"factor": factor, "weights": decoder_digest(vae)},
    )


def decoder_dtype(vae: nn.Module, asked: torch.dtype) -> torch.dtype:
    """Return the type to export a VAE's decoder in for a model in `asked`: float32 if it would overflow in float16."""
    overflows = type(vae).__name__ != "AutoencoderTiny" and config_of(vae).get("force_upcast", True)
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
            setattr(module, name, _Enlarge(child.get_submodule("conv" if child.name == "conv" else "Conv2d_0")))
        else:
            _without_branches(child)
    return module
