"""IP-Adapter: turns image features into tokens, and tokens into extra keys and values of every cross-attention.

Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter", 2023, equation 5:
`out = softmax(Q K^T / sqrt(d)) V + strength * softmax(Q K_image^T / sqrt(d)) V_image`, where Q, K, V are the text
cross-attention's own and `K_image = tokens W_k`, `V_image = tokens W_v` come from the adapter.
"""

import os
import weakref
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from stylefast import values
from stylefast.errors import AdapterError, ModelNotFound
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.layout import AttentionLayout
from stylefast.models.pictures import PictureSource
from stylefast.models.tensor_files import PICKLE_ENDINGS, Entry, flat_entries, open_tensors
from stylefast.models.weight_files import WeightHeader, recognise

# (kind, width) of published adapters -> (encoder they were trained with, its folder in h94/IP-Adapter)
_ENCODERS = {
    ("global", 1280): ("OpenCLIP ViT-bigG/14", "sdxl_models/image_encoder"),
    ("global", 1024): ("OpenCLIP ViT-H/14", "models/image_encoder"),
    ("plus", 1280): ("OpenCLIP ViT-H/14", "models/image_encoder"),
}
_FACE_WIDTH = 512  # width of InsightFace's embeddings
# head width of every published resampler; files don't state it
_RESAMPLER_HEAD = 64

KeyValues = tuple[tuple[torch.Tensor, torch.Tensor] | None, ...]


class GlobalProjector(nn.Module):
    """Projector of one image embedding to a few tokens: `LayerNorm(reshape(W e + b))`."""

    def __init__(self, embed_dim: int, cross_dim: int, token_count: int):
        super().__init__()
        self.token_count = token_count
        self.proj = nn.Linear(embed_dim, token_count * cross_dim)
        self.norm = nn.LayerNorm(cross_dim)

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        """Project `[n, embed_dim]` to `[n, token_count, cross_dim]`."""
        return self.norm(self.proj(embeds).unflatten(-1, (self.token_count, -1)))


class _ResamplerAttention(nn.Module):
    """Attention of learned queries to the image features and to one another; names follow the published files."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, features: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Map features `[n, tokens, width]` and queries `[n, queries, width]` to `[n, queries, width]`."""
        queries = self.norm2(queries)
        seen = torch.cat([self.norm1(features), queries], dim=1)
        q, k, v = (
            x.unflatten(-1, (-1, _RESAMPLER_HEAD)).transpose(1, 2)
            for x in (self.to_q(queries), *self.to_kv(seen).chunk(2, dim=-1))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Perceiver resampler of the plus adapters, from patch features to a fixed number of tokens."""

    def __init__(
        self, embed_dim: int, width: int, inner: int, hidden: int, depth: int, token_count: int, cross_dim: int
    ):
        super().__init__()
        self.token_count = token_count
        self.latents = nn.Parameter(torch.empty(1, token_count, width))
        self.proj_in = nn.Linear(embed_dim, width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _ResamplerAttention(width, inner),
                    nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, hidden, bias=False),
                        nn.GELU(),
                        nn.Linear(hidden, width, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, cross_dim)
        self.norm_out = nn.LayerNorm(cross_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `[n, tokens, embed_dim]` to `[n, token_count, cross_dim]`."""
        features = self.proj_in(features)
        queries = self.latents.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            attention, feed_forward = layer.children()
            queries = queries + attention(features, queries)
            queries = queries + feed_forward(queries)
        return self.norm_out(self.proj_out(queries))


class IPAdapter(nn.Module):
    """One loaded adapter, created by `IPAdapter.load`.

    `kind` is "global" (reads one embedding) or "plus" (reads patch features), `embed_dim` its input width,
    `token_count` the number of tokens per picture, `cross_dim` their width.
    """

    def __init__(
        self,
        kind: str,
        projector: "GlobalProjector | Resampler",
        key_values: Mapping[int, nn.Module],
        layout: AttentionLayout,
        embed_dim: int,
        cross_dim: int,
        name: str,
    ):
        super().__init__()
        self.kind, self.embed_dim, self.cross_dim, self.name = kind, embed_dim, cross_dim, name
        self.token_count: int = projector.token_count
        self.layout = layout
        self.projector = projector
        # registry index of a layer -> its key and value projections, stacked into one matrix
        self.layer_projections = nn.ModuleDict({str(layer): linear for layer, linear in key_values.items()})
        # (encoder, device, type, tokens) of the last call; the reference is weak, so that dropping the encoder frees it
        self._negative: tuple | None = None
        self.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping,
        layout: AttentionLayout,
        cross_dim: int,
        *,
        modules: Collection[str] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "IPAdapter":
        """Load a published adapter: a `.safetensors` file, a `.bin` file, or its state dict, nested or flat.

        The kind is recognised by the keys. `modules` (names from `layout.modules`) restricts what is read: the style
        module alone needs 20 of 140 matrices. `key_values` then returns None for the other layers.

        Raises ModelNotFound, ModelFormatError for files that can't be read, and AdapterError for unsupported kinds
        (FaceID, InstantID, full-face) and for adapters of another base model, naming the shapes.
        """
        entries, name = _read(source)
        kind, projector = _projector(entries, cross_dim, name)
        _check_layers(entries, layout, cross_dim, name)
        unknown = sorted(set(modules or ()) - set(layout.modules))
        if unknown:
            raise AdapterError(
                f"the model has no attention module {values.quoted(unknown[0])}; it has {', '.join(layout.modules)}"
            )
        wanted = [i for i, layer in enumerate(layout.layers) if modules is None or layer.module in modules]

        with torch.device("meta"):
            linears = {i: nn.Linear(cross_dim, 2 * layout.layers[i].channels, bias=False) for i in wanted}
        for i, linear in linears.items():
            key = layout.ip_adapter_key(i)
            halves = [entries[f"ip_adapter.{key}.to_{which}_ip.weight"].read() for which in "kv"]
            linear.load_state_dict({"weight": torch.cat(halves).to(device, dtype)}, assign=True)
        weights = {key: entries[f"image_proj.{key}"].read().to(device, dtype) for key in projector.state_dict()}
        projector.load_state_dict(weights, assign=True)
        embed_dim = (projector.proj if isinstance(projector, GlobalProjector) else projector.proj_in).in_features
        return cls(kind, projector, linears, layout, embed_dim, cross_dim, name)

    def check_encoder(self, encoder: ImageEncoder) -> None:
        """Raise AdapterError, naming the right encoder, if the adapter was trained with another image encoder."""
        given = encoder.embed_dim if self.kind == "global" else encoder.hidden_size
        if given == self.embed_dim:
            return
        what = "embeddings" if self.kind == "global" else "patch features"
        right = _ENCODERS.get((self.kind, self.embed_dim))
        way_out = (
            f"use {right[0]}, folder {values.quoted(right[1])} of h94/IP-Adapter"
            if right
            else ("load the image encoder that the adapter was trained with")
        )
        raise AdapterError(
            f"{self.name} ({self.kind}) reads {what} {self.embed_dim} wide, but the image encoder returns {given} "
            f"(hidden size {encoder.hidden_size}, projection {encoder.embed_dim}); {way_out}"
        )

    def features(self, encoder: ImageEncoder, images: Sequence[PictureSource], crop: str = "center") -> torch.Tensor:
        """Encode pictures into input features: `[n, embed_dim]` (global) or `[n, patches, embed_dim]` (plus).

        Raises AdapterError for another encoder than the adapter's.
        """
        self.check_encoder(encoder)
        return encoder.embed(images, crop) if self.kind == "global" else encoder.patches(images, crop)

    def check_features(self, features: torch.Tensor) -> None:
        """Raise AdapterError unless the features have this adapter's input width and number of axes."""
        dims = 2 if self.kind == "global" else 3
        if features.ndim != dims or features.shape[-1] != self.embed_dim:
            shape = f"[n, {self.embed_dim}]" if dims == 2 else f"[n, patches, {self.embed_dim}]"
            raise AdapterError(f"{self.name} ({self.kind}) reads features {shape}, not {list(features.shape)}")

    @torch.no_grad()
    def tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Return image tokens `[n, token_count, cross_dim]` for the features of n pictures."""
        self.check_features(features)
        weight = next(self.projector.parameters())
        return self._project(features.to(weight.device, weight.dtype))

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        return self.projector(features)

    def negative_tokens(self, encoder: ImageEncoder | None = None) -> torch.Tensor:
        """Return the cached tokens of "no picture" `[token_count, cross_dim]`, for the unconditional branch.

        Global: from a zero embedding, hence `LayerNorm(bias)`, not zeros. Plus: from a picture that is zero after
        normalisation, which needs `encoder`. Raises AdapterError if it is missing or another one.
        """
        used = self
        if self.kind == "plus":
            if encoder is None:
                raise AdapterError(f"{self.name} (plus) needs the image encoder for its negative tokens; pass it")
            self.check_encoder(encoder)
            used = encoder
        weight = next(self.projector.parameters())
        if self._negative is not None:
            of, device, dtype, tokens = self._negative
            if of() is used and (device, dtype) == (weight.device, weight.dtype):
                return tokens
        features = used.blank_patches() if isinstance(used, ImageEncoder) else torch.zeros(1, self.embed_dim)
        tokens = self.tokens(features)[0]
        self._negative = (weakref.ref(used), weight.device, weight.dtype, tokens)
        return tokens

    @torch.no_grad()
    def key_values(self, tokens: torch.Tensor) -> KeyValues:
        """Return keys and values of image tokens `[pages, t, cross_dim]`, per layer in registry order.

        Each is a pair of `[pages, t, heads, head_dim]`, or None for a layer outside `modules`.
        """
        if tokens.ndim != 3 or tokens.shape[-1] != self.cross_dim:
            raise AdapterError(f"{self.name} takes tokens [pages, t, {self.cross_dim}], not {list(tokens.shape)}")
        pairs: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        for i, layer in enumerate(self.layout.layers):
            if str(i) not in self.layer_projections:
                pairs.append(None)
                continue
            linear = self.layer_projections[str(i)]
            weight = linear.get_parameter("weight")
            both = linear(tokens.to(weight.device, weight.dtype))
            k, v = both.unflatten(-1, (2, layer.heads, -1)).unbind(-3)
            pairs.append((k, v))
        return tuple(pairs)


def _read(source: str | Path | Mapping) -> tuple[dict[str, Entry], str]:
    """Return all tensors under flat keys, and a name for messages. Raises ModelNotFound."""
    if isinstance(source, Mapping):
        return flat_entries(source, "the adapter"), "the adapter"
    path = values.path("an adapter", source)
    if os.path.isdir(path):
        endings = (".safetensors", *PICKLE_ENDINGS)
        files = sorted(f.name for f in path.iterdir() if f.suffix in endings)
        raise ModelNotFound(f"{path} is a folder; give one adapter file in it: {', '.join(files) or 'it has none'}")
    if not os.path.isfile(path):
        raise ModelNotFound(
            f"no adapter found at {values.quoted(str(path))}; download one from h94/IP-Adapter's sdxl_models and "
            "pass its path"
        )
    return open_tensors(path)[0], path.name


def _projector(entries: Mapping[str, Entry], cross_dim: int, name: str) -> tuple[str, GlobalProjector | Resampler]:
    """Return the kind, and an empty projector of the file's dimensions, whose keys and shapes are checked.

    Raises AdapterError.
    """
    shapes = {key.removeprefix("image_proj."): e.shape for key, e in entries.items() if key.startswith("image_proj.")}
    face = _face_kind(entries, shapes)
    if face:
        raise AdapterError(f"{name} is {face}, which stylefast does not support; use a global or plus IP-Adapter")
    if not shapes or not any(key.startswith("ip_adapter.") for key in entries):
        header = WeightHeader(Path(name), {key: ("", entry.shape) for key, entry in entries.items()}, {})
        raise AdapterError(
            f"{name} is not an IP-Adapter, which has keys image_proj.* and ip_adapter.*, but: {recognise(header)[:300]}"
        )

    with torch.device("meta"):
        if _is_matrix(shapes, "proj.weight"):
            kind, (rows, embed_dim) = "global", shapes["proj.weight"]
            width = shapes.get("norm.weight", (cross_dim,))[0]
            if width != cross_dim or rows % cross_dim:
                raise _wrong_width(name, width, cross_dim)
            projector = GlobalProjector(embed_dim, cross_dim, rows // cross_dim)
        elif len(shapes.get("latents", ())) == 3 and _is_matrix(
            shapes, "proj_in.weight", "proj_out.weight", "layers.0.0.to_q.weight", "layers.0.1.1.weight"
        ):
            kind = "plus"
            if shapes["proj_out.weight"][0] != cross_dim:
                raise _wrong_width(name, shapes["proj_out.weight"][0], cross_dim)
            inner = shapes["layers.0.0.to_q.weight"][0]
            if inner % _RESAMPLER_HEAD:
                raise AdapterError(
                    f"{name}'s resampler is {inner} wide inside, which is not divisible into heads of {_RESAMPLER_HEAD}"
                )
            depth = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("layers."))
            projector = Resampler(
                embed_dim=shapes["proj_in.weight"][1],
                width=shapes["latents"][2],
                inner=inner,
                hidden=shapes["layers.0.1.1.weight"][0],
                depth=depth,
                token_count=shapes["latents"][1],
                cross_dim=cross_dim,
            )
        else:
            raise AdapterError(
                f"{name} contains an image projection of unknown kind ({values.listed(sorted(shapes))}); the "
                "known kinds are global (image_proj.proj.weight) and plus (image_proj.latents)"
            )
    _compare(
        {f"image_proj.{key}": shape for key, shape in shapes.items()},
        {f"image_proj.{key}": tuple(tensor.shape) for key, tensor in projector.state_dict().items()},
        name,
    )
    return kind, projector


def _face_kind(entries: Mapping[str, Entry], shapes: Mapping[str, tuple]) -> str | None:
    """Return the kind of an adapter that reads faces instead of pictures, or None."""
    if any(key.startswith("perceiver_resampler.") for key in shapes):
        return "a FaceID-Plus adapter"
    if any("_lora" in key for key in entries):
        return "a FaceID adapter"
    first = next((key for key in ("proj.0.weight", "proj.weight", "proj_in.weight") if shapes.get(key)), None)
    if first is not None and shapes[first][-1] == _FACE_WIDTH:
        return "an InstantID adapter" if "latents" in shapes else "a FaceID adapter (portrait)"
    if "proj.0.weight" in shapes or any(key.startswith("ff.net.") for key in shapes):
        return "a full-face adapter"
    return None


def _is_matrix(shapes: Mapping[str, tuple], *keys: str) -> bool:
    return all(len(shapes.get(key, ())) == 2 for key in keys)


def _wrong_width(name: str, given: int, cross_dim: int) -> AdapterError:
    return AdapterError(
        f"{name} was made for another base model: its tokens are {given} wide, the model's text states {cross_dim}; "
        "SDXL adapters have 2048, SD 1.5's have 768"
    )


def _check_layers(entries: Mapping[str, Entry], layout: AttentionLayout, cross_dim: int, name: str) -> None:
    expected = {
        f"ip_adapter.{layout.ip_adapter_key(i)}.to_{which}_ip.weight": (layer.channels, cross_dim)
        for i, layer in enumerate(layout.layers)
        for which in "kv"
    }
    _compare({key: entry.shape for key, entry in entries.items() if not key.startswith("image_proj.")}, expected, name)


def _compare(given: Mapping[str, tuple], expected: Mapping[str, tuple], name: str) -> None:
    counts = f"it has {len(given)} such tensors, the model {len(expected)}"
    if missing := [key for key in expected if key not in given]:
        raise AdapterError(f"{name} lacks {missing[0]} and {len(missing) - 1} more; {counts}")
    if foreign := [key for key in given if key not in expected]:
        raise AdapterError(
            f"{name} holds {values.shown(foreign[0])} and {len(foreign) - 1} more that match no layer; {counts}"
        )
    for key, shape in expected.items():
        if given[key] != shape:
            raise AdapterError(
                f"{name}: {key} is {list(given[key])}, but the model needs {list(shape)}; use one made for this model"
            )
