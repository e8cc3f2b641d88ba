"""Exported graphs in place of text encoders, projections, image encoder and VAE decoder.

Each class here replaces one class of `stylefast.models`, with the same interface. Still run in PyTorch: tokenizers and
the preparation of pictures; the zeros of a null prompt; the embedding of pooled text and time; the VAE's encoder
(reference pictures) and its scale and shift, the blending of tiles, the retry in float32 after overflow in a half type;
previews; baking; adapters and image encoders that were not exported; prompts under LoRAs of the text encoders, and what
LoRAs add to the text's keys and values.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import Any

import torch

from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, ModelFormatError
from stylefast.export.components import adapter_digest, decoder_digest, image_encoder_digest
from stylefast.export.manifest import GraphEntry
from stylefast.export.sessions import Session
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter, KeyValues
from stylefast.models.layout import AttentionLayout
from stylefast.models.row_loras import LoraProducts
from stylefast.models.row_table import KeyValue
from stylefast.models.text import TextEncoder, TextLoras
from stylefast.models.unet import UNet


class ExportedPart:
    """The session of one component, opened on first use.

    load: opens it. facts: the exporter's notes about the component (`Component.facts`). dtype: element type.
    """

    def __init__(self, load: Callable[[], Session], dtype: torch.dtype, facts: Mapping[str, Any] | None = None):
        self._load, self._opening = load, Lock()
        self._session: Session | None = None
        self.dtype, self.facts = dtype, dict(facts or {})

    @property
    def nbytes(self) -> int:
        """Return the bytes of the open session; 0 before."""
        return 0 if self._session is None else getattr(self._session, "nbytes", 0)

    def open(self) -> Session:
        """Return the session, opened unless it is open. Raises the error with which its file is refused."""
        with self._opening:
            if self._session is None:
                self._session = self._load()
            return self._session

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Run on contiguous inputs and write to `outputs`, which must be all outputs of the graph."""
        self.open().run({name: x.contiguous() for name, x in inputs.items()}, outputs)

    def close(self) -> None:
        """Close the session; the next run opens it again."""
        with self._opening:
            if self._session is not None:
                self._session.close()
                self._session = None


class ExportedText:
    """Both text encoders as graphs; a `models.text.TextRunner`. Supports neither gradients nor skipped layers.

    Prompts under LoRAs are encoded by the runner that this one replaces.
    """

    most_skipped = 0
    takes_loras = True
    takes_masks = False

    def __init__(self, text_encoder: TextEncoder, parts: tuple[ExportedPart, ExportedPart]):
        self._parts, self._widths, self._with_loras = parts, text_encoder.widths, text_encoder.runner
        self._device = text_encoder.encoders[1].text_projection.weight.device
        self._pooled = text_encoder.encoders[1].text_projection.out_features
        tables = [encoder.get_input_embeddings().num_embeddings for encoder in text_encoder.encoders]
        for index, (part, rows) in enumerate(zip(parts, tables, strict=True)):
            exported = part.facts.get("vocabulary")
            if exported != rows:
                raise EngineMismatch(
                    f"the graph of text encoder {index + 1} has {exported} tokens and the model's {rows}; export "
                    "the model again"
                )

    def __call__(
        self,
        index: int,
        ids: Sequence[Sequence[int]],
        rows: Sequence[torch.Tensor],
        ends: Sequence[tuple[int, int]],
        skips: Sequence[int],
        loras: TextLoras = (),
        seen: Sequence[Sequence[bool]] | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        if seen is not None:
            raise ExportError("exported text encoders can't mask tokens; load the model with backend='torch'")
        if loras:
            return self._with_loras(index, ids, rows, ends, skips, loras)
        if torch.is_grad_enabled() and any(row.requires_grad for row in rows):
            raise InvalidRequest(
                "exported text encoders have no gradients; load the model with backend='torch' to learn vectors"
            )
        part, width, device = self._parts[index], self._widths[index], self._device
        vocabulary = part.facts["vocabulary"]
        numbers = [[token if token >= 0 else vocabulary - 1 - token for token in sequence] for sequence in ids]
        tokens = torch.tensor(numbers, device=device)  # [prompts, tokens]
        extra = torch.zeros(len(rows), width, dtype=part.dtype, device=device)
        if rows:
            torch.stack([row.detach().to(extra) for row in rows], out=extra)
        if index == 0:
            hidden = torch.empty(*tokens.shape, width, dtype=part.dtype, device=device)
            part.run({"ids": tokens, "extra": extra}, {"hidden": hidden})
            return hidden, []
        # a prompt pooled at two places runs twice
        prompts = torch.tensor([prompt for prompt, _ in ends], device=device)
        position = torch.tensor([position for _, position in ends], device=device)
        hidden = torch.empty(len(ends), tokens.shape[1], width, dtype=part.dtype, device=device)
        pooled = torch.empty(len(ends), self._pooled, dtype=part.dtype, device=device)
        part.run({"ids": tokens[prompts], "extra": extra, "position": position}, {"hidden": hidden, "pooled": pooled})
        order = [prompt for prompt, _ in ends]
        first = torch.tensor([order.index(prompt) for prompt in range(len(numbers))], device=device)
        return hidden[first], list(pooled.unbind())


class ExportedTextProjector:
    """`UNet.project_text` as a graph, which takes texts chunk by chunk; `window`: the tokens of one."""

    def __init__(self, unet: UNet, window: int, part: ExportedPart):
        self._unet, self._window, self._part = unet, window, part

    def __call__(  # states [pages, tokens, cross_dim]
        self, states: torch.Tensor, loras: LoraProducts | None = None
    ) -> tuple[KeyValue, ...]:
        layout, states = self._unet.layout, states.to(self._part.dtype)
        chunks = states.reshape(-1, self._window, states.shape[2])
        packed = _packed("text_kv", layout, states, *chunks.shape[:2])
        self._part.run({"states": chunks}, packed)
        found: dict[int, KeyValue] = {}
        for level, members in enumerate(_levels(layout)):
            for i, pair in zip(members, packed[f"text_kv_{level}"], strict=True):
                k, v = (x.reshape(*states.shape[:2], *x.shape[2:]) for x in pair)
                if loras is not None:
                    attention = self._unet.block(layout.layers[i].name).attn2
                    k = loras.added(k.flatten(2), states, attention.to_k).view_as(k)
                    v = loras.added(v.flatten(2), states, attention.to_v).view_as(v)
                found[i] = (k, v)
        return tuple(found[i] for i in range(len(found)))


class ExportedImageEncoder(ImageEncoder):
    """An image encoder whose model is a graph; pictures are prepared as before."""

    def __init__(self, encoder: ImageEncoder, part: ExportedPart):
        # reuse the checked model and its preparation
        self.__dict__.update(encoder.__dict__)
        self._part = part
        model = encoder.vision_model.vision_model
        self._tokens = model.embeddings.position_embedding.num_embeddings

    def _embeds(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._run(pixels)["embeds"]

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._run(pixels)["patches"]

    def _run(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels = pixels.to(self._part.dtype)
        outputs = {
            "embeds": pixels.new_empty(len(pixels), self.embed_dim),
            "patches": pixels.new_empty(len(pixels), self._tokens, self.hidden_size),
        }
        self._part.run({"pixels": pixels}, outputs)
        return outputs


class ExportedAdapter(IPAdapter):
    """An adapter whose projections are one graph.

    Its `tokens` [n, token_count, numbers] are not tokens in the UNet's text space but the concatenated keys and values
    of all layers. They can be cut and joined like tokens.
    """

    def __init__(self, adapter: IPAdapter, part: ExportedPart):
        linears = {int(layer): linear for layer, linear in adapter.layer_projections.items()}
        super().__init__(
            adapter.kind, adapter.projector, linears, adapter.layout, adapter.embed_dim, adapter.cross_dim, adapter.name
        )
        self._part = part

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        features = features.to(self._part.dtype)
        packed = _packed("image_kv", self.layout, features, len(features), self.token_count)
        self._part.run({"features": features}, packed)
        # [layers, 2, n, tokens, heads, d] -> [n, tokens, layers * 2 * heads * d]
        return torch.cat([kv.permute(2, 3, 0, 1, 4, 5).flatten(2) for kv in packed.values()], dim=2)

    def key_values(self, tokens: torch.Tensor) -> KeyValues:
        """Return keys and values per layer from `tokens` [pages, t, numbers]; None for layers without a projection."""
        layers, start = self.layout.layers, 0
        pairs: list[KeyValue | None] = [None] * len(layers)
        for members in _levels(self.layout):
            for i in members:
                width = layers[i].channels
                ends = (start + width, start + 2 * width)
                k, v = (tokens[..., end - width : end].unflatten(-1, (layers[i].heads, -1)) for end in ends)
                start = ends[1]
                if str(i) in self.layer_projections:
                    pairs[i] = (k, v)
        return tuple(pairs)


class ExportedDecoder:
    """A VAE's decoder as a graph, in the type `part.dtype`; a `models.vae.DecoderRun`."""

    def __init__(self, part: ExportedPart, factor: int):
        self._part, self._factor = part, factor

    def open(self) -> None:
        """Open the session before it is needed."""
        self._part.open()

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:  # [n, C, h, w] -> [n, 3, H, W]
        height, width = (side * self._factor for side in latents.shape[2:])
        pixels = torch.empty(len(latents), 3, height, width, dtype=latents.dtype, device=latents.device)
        self._part.run({"latents": latents}, {"pixels": pixels})
        return pixels


class ExportedParts:
    """The available parts, by component, and their installation in an engine.

    A missing part leaves that component in PyTorch.
    """

    def __init__(self, parts: Mapping[str, ExportedPart]):
        self.parts = dict(parts)

    @classmethod
    def of(cls, entries: Iterable[GraphEntry], open_session: Callable[[GraphEntry], Session]) -> "ExportedParts":
        """Return the parts that a manifest lists; `open_session` is called for an entry on first use.

        Raises ModelFormatError for an entry whose outputs have an unknown type.
        """
        return cls(
            {
                entry.component: ExportedPart(partial(open_session, entry), _output_dtype(entry), entry.extra)
                for entry in entries
                if entry.component != "unet"
            }
        )

    def install(self, engine: Any) -> tuple[str, ...]:
        """Install the graphs in an engine's text encoder, text projection and decoder; return their names.

        Adapters are handled by `adapter`. Raises EngineMismatch for a VAE or tokenizer that the graphs were not made
        for.
        """
        used, parts = [], self.parts
        if {"text_encoder", "text_encoder_2"} <= parts.keys():
            engine.text_encoder.runner = ExportedText(
                engine.text_encoder, (parts["text_encoder"], parts["text_encoder_2"])
            )
            used += ["text_encoder", "text_encoder_2"]
        if "text_projector" in parts:
            # override on the instance: the class keeps its own method
            engine.unet.project_text = ExportedTextProjector(
                engine.unet, engine.text_encoder.max_tokens, parts["text_projector"]
            )
            used.append("text_projector")
        if "vae_decoder" in parts:
            part = parts["vae_decoder"]
            if part.facts.get("weights") != decoder_digest(engine.vae):
                raise EngineMismatch(
                    "the graph of the VAE's decoder was made from another VAE; export with the same vae=, or load "
                    "the model with the exported one"
                )
            engine.decoder.decode_by(ExportedDecoder(part, engine.downscale), part.dtype)
            used.append("vae_decoder")
        return tuple(used)

    def adapter(self, adapter: IPAdapter, encoder: ImageEncoder) -> tuple[IPAdapter, ImageEncoder]:
        """Return an adapter and its image encoder as graphs if they were exported; else unchanged."""
        part = self.parts.get("image_projector")
        if part is not None and part.facts.get("weights") == adapter_digest(adapter):
            adapter = ExportedAdapter(adapter, part)
        part = self.parts.get("image_encoder")
        if part is not None and part.facts.get("weights") == image_encoder_digest(encoder):
            encoder = ExportedImageEncoder(encoder, part)
        return adapter, encoder

    @property
    def nbytes(self) -> int:
        """Return the bytes of the open sessions."""
        return sum(part.nbytes for part in self.parts.values())

    def close(self) -> None:
        """Close all sessions."""
        for part in self.parts.values():
            part.close()


def _output_dtype(entry: GraphEntry) -> torch.dtype:
    found = getattr(torch, entry.outputs[0][1], None) if entry.outputs else None
    if not isinstance(found, torch.dtype):
        raise ModelFormatError(
            f"the manifest's outputs of {entry.label} are {entry.outputs}; the first must be the name of a type, "
            "such as float32; export again"
        )
    return found


def _levels(layout: AttentionLayout) -> list[list[int]]:
    """Return the layers of every level, in the order of packed tensors."""
    return [layout.at_level(level) for level in range(layout.levels)]


def _packed(name: str, layout: AttentionLayout, like: torch.Tensor, pages: int, tokens: int) -> dict[str, torch.Tensor]:
    """Allocate keys and values [layers, 2, pages, tokens, heads, d] for every level."""
    found = {}
    for level, members in enumerate(_levels(layout)):
        layer = layout.layers[members[0]]
        shape = (len(members), 2, pages, tokens, layer.heads, layer.channels // layer.heads)
        found[f"{name}_{level}"] = like.new_empty(shape)
    return found


__all__ = [
    "ExportedAdapter",
    "ExportedParts",
    "ExportedDecoder",
    "ExportedImageEncoder",
    "ExportedPart",
    "ExportedText",
    "ExportedTextProjector",
]
