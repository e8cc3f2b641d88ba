"""The UNet as a graph of flat tensors: styles, strengths and references are inputs; only weights are constants.

`UNetGraph` is exported to ONNX, TensorRT and AOTInductor; `GraphShape` determines its inputs. It has three flavours,
each a superset of the one before:

    plain     rows attend to themselves and to text, and to picture segments where `segments` is above 0
    live      rows also attend to other rows of the batch (StyleAligned), with AdaIN and shared group norms
    banked    rows also attend to pages of style banks, which are inputs

Keys and values of all layers of one attention level share one tensor, so that SDXL's 70 layers take 2 inputs each for
text, pictures and pages. The row table's columns are inputs under their own names (`models.row_table`).

A graph of any flavour may take LoRAs, whose factors are inputs too: the pool of units of each kind of layer, and the
units that every row uses in every layer (`models.row_loras`). And it may take texts of several chunks, each page with
its own length.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import nn

from stylefast import values
from stylefast.errors import ExportError, InvalidRequest
from stylefast.kernels.row_lora import RANK
from stylefast.models.layout import AttentionLayout
from stylefast.models.row_loras import NO_UNIT, StepLoras, table_width
from stylefast.models.row_table import COLUMNS, IMAGE, SHARING, TEXT, ImageKV, KeyValue, RowTable, StylePages
from stylefast.models.text_chunks import MAX_CHUNKS
from stylefast.models.unet import GroupNorm, UNet

FLAVOURS = ("plain", "live", "banked")
OUTPUT = "output"  # the model's output [rows, channels, height, width]
TEXT_TOKENS = 77
MOST_RANK, MOST_SLOTS = 128, 32
# of one input: TensorRT counts in 31 bits
_MOST_ELEMENTS = 2**31 - 1


@dataclass(frozen=True)
class GraphShape:
    """Flavour and fixed sizes of a UNet graph.

    flavour: see the module. references: columns of `self_page`, the most references of a row; segments: columns of
    `image_page`, the most pictures of a row; text_tokens: the text encoders' token count. text_chunks: the most chunks
    of a text, each of that many tokens. lora_slots: the most LoRAs of a row, 0 for a graph without inputs for them;
    lora_rank: their largest rank, rounded up to whole units. Row, page and mask counts and the picture's size may vary.
    """

    flavour: str = "live"
    references: int = 1
    segments: int = 2
    text_tokens: int = TEXT_TOKENS
    text_chunks: int = 1
    lora_rank: int = 0
    lora_slots: int = 0

    def __post_init__(self):
        values.one_of("flavour", self.flavour, FLAVOURS)
        least = 0 if self.flavour == "plain" else 1
        if self.flavour == "plain" and self.references:
            object.__setattr__(self, "references", 0)
        limits = {
            "references": (least, 16),
            "segments": (0, 16),
            "text_tokens": (1, 4096),
            "text_chunks": (1, MAX_CHUNKS),
            "lora_rank": (0, MOST_RANK),
            "lora_slots": (0, MOST_SLOTS),
        }
        for name, (low, high) in limits.items():
            values.whole_number(name, getattr(self, name), low, high)
        if bool(self.lora_rank) != bool(self.lora_slots):
            raise InvalidRequest(
                f"lora_rank is {self.lora_rank} and lora_slots {self.lora_slots}; give both above 0, or none"
            )
        object.__setattr__(self, "lora_rank", -(-self.lora_rank // RANK) * RANK)

    @property
    def shares(self) -> bool:
        """Return whether rows may have references."""
        return self.flavour != "plain"

    @property
    def row_units(self) -> int:
        """Return the most units that a row uses in a layer."""
        return self.lora_slots * table_width(self.lora_rank // RANK)

    @classmethod
    def from_dict(cls, found: Mapping) -> "GraphShape":
        """Return the shape from the result of `to_dict`, which manifests hold."""
        return cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found or f.name not in _LATER})

    @classmethod
    def knows(cls, found: Mapping) -> bool:
        """Return whether `from_dict` reads all of a manifest's shape."""
        names = {field.name for field in fields(cls)}
        return names - _LATER.keys() <= found.keys() <= names

    def to_dict(self) -> dict:
        """Return the fields by name, without those of inputs that the graph lacks."""
        return {name: value for name, value in asdict(self).items() if _LATER.get(name) != value}


# fields that earlier manifests lack, and their values there
_LATER = {"text_chunks": 1, "lora_rank": 0, "lora_slots": 0}


@dataclass(frozen=True)
class Tensor:
    """Input or output of a graph: its type, and its dimensions as numbers or, if they may vary, as names.

    Names are those of `dimensions`, or "tokens_<level>" for the feature map of an attention level.
    """

    name: str
    dtype: torch.dtype
    dims: tuple[int | str, ...]

    def fixed(self, sizes: Mapping[str, int]) -> "Tensor":
        """Return the tensor with numbers for the names in `sizes`, which may have a factor, as in "4*height"."""

        def known(dim: int | str) -> int | str:
            factor, _, name = str(dim).rpartition("*")
            return int(factor or 1) * sizes[name] if name in sizes else dim

        return replace(self, dims=tuple(map(known, self.dims)))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the dimensions as numbers; `sizes` has all names."""
        return tuple(map(int, self.fixed(sizes).dims))


def short_name(dtype: torch.dtype | None) -> str:
    """Return a type's name without "torch.", as manifests hold it."""
    return str(dtype).removeprefix("torch.")


# name of a dimension that may vary -> (least, most) that a graph without profiles is exported for
DIMENSIONS = {
    "rows": (1, 256),
    "text_pages": (1, 4096),
    "image_pages": (1, 4096),
    "image_tokens": (1, 1024),
    "masks": (1, 4096),
    "pages": (1, 4096),
    "height": (8, 1024),
    "width": (8, 1024),
}


def dimensions(unet: UNet, shape: GraphShape) -> dict[str, tuple[int, int]]:
    """Return `DIMENSIONS` with those that follow from the shape, of which `shape_ranges` tells more."""
    return DIMENSIONS | {name: (least, most) for name, (least, _, most) in shape_ranges(unet, shape).items()}


def shape_ranges(unet: UNet, shape: GraphShape) -> dict[str, tuple[int, int, int]]:
    """Return (least, usual, most) of the dimensions that follow from the shape: tokens of texts, and units of LoRAs.

    "row_units" are those of a row in a layer, "units_<kind>" those in the pool of a kind of layers. Usual are texts of
    one chunk, and one LoRA of the largest rank.
    """
    found, width = {}, table_width(shape.lora_rank // RANK)
    if shape.text_chunks > 1:
        found["text_tokens"] = (shape.text_tokens, shape.text_tokens, shape.text_tokens * shape.text_chunks)
    if shape.lora_slots:
        found["row_units"] = (1, width, shape.row_units)
        for number in lora_kinds(unet):
            taps, inner, out = unet.loras.kinds[number]
            most = _MOST_ELEMENTS // (RANK * max(taps * inner, out))
            found[f"units_{number}"] = (1, width * unet.loras.kind_of.count(number), most)
    return found


def lora_kinds(unet: UNet) -> list[int]:
    """Return the kinds of layers that a graph has: text's keys and values are made outside of it."""
    layout = unet.loras
    names = zip(layout.names, layout.kind_of, strict=True)
    return sorted({kind for name, kind in names if not name.endswith((".attn2.to_k", ".attn2.to_v"))})


def graph_inputs(unet: UNet, shape: GraphShape) -> list[Tensor]:
    """Return the inputs of a UNet's graph, in order."""
    layout, dtype, i64, f32 = unet.layout, unet.dtype, torch.int64, torch.float32
    sizes = _sizes(layout, shape) | {"rows": "rows", "norm_rows": "rows"}
    pooled = unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]
    levels = [layout.at_level(level) for level in range(layout.levels)]
    heads = [layout.layers[found[0]].heads for found in levels]
    widths = [layout.layers[found[0]].channels // count for found, count in zip(levels, heads)]
    norms = [m for m in unet.modules() if isinstance(m, GroupNorm)]

    def of_table(part: str) -> list[Tensor]:
        columns = [(name, column) for name, column in COLUMNS.items() if column.part == part]
        return [Tensor(name, column.dtype, column.shape(sizes)) for name, column in columns]

    found = [
        Tensor("latents", dtype, ("rows", unet.config["in_channels"], "height", "width")),
        Tensor("timestep", f32, ("rows",)),
        Tensor("pooled", dtype, ("text_pages", pooled)),
        Tensor("time_ids", f32, ("rows", 6)),
        *of_table(TEXT),
    ]
    tokens = shape.text_tokens if shape.text_chunks == 1 else "text_tokens"
    for level, (members, h, d) in enumerate(zip(levels, heads, widths)):
        found.append(Tensor(f"text_kv_{level}", dtype, (len(members), 2, "text_pages", tokens, h, d)))
    if shape.text_chunks > 1:
        found.append(Tensor("text_lengths", i64, ("text_pages",)))
    if shape.segments:
        for level, (members, h, d) in enumerate(zip(levels, heads, widths)):
            found.append(Tensor(f"image_kv_{level}", dtype, (len(members), 2, "image_pages", "image_tokens", h, d)))
        found += [
            Tensor("image_lengths", i64, ("image_pages",)),
            *of_table(IMAGE),
            *(Tensor(f"mask_{level}", f32, ("masks", f"tokens_{level}")) for level in range(len(levels))),
        ]
    if shape.shares:
        found += of_table(SHARING)
    if shape.flavour == "banked":
        for level, (members, h, d) in enumerate(zip(levels, heads, widths)):
            count = len(members)
            found.append(Tensor(f"page_kv_{level}", dtype, ("pages", count, 2, f"tokens_{level}", h, d)))
            found.append(Tensor(f"page_stats_{level}", f32, ("pages", count, 2, 3, h, d)))
        found.append(Tensor("page_norms", f32, ("pages", len(norms), 2, norms[0].groups)))
    if shape.lora_slots:
        found.append(Tensor("lora_unit", i64, (len(unet.loras.names), "rows", "row_units")))
        found.append(Tensor("lora_unit_scale", f32, ("rows", "row_units")))
        for number in lora_kinds(unet):
            taps, inner, out = unet.loras.kinds[number]
            found.append(Tensor(f"lora_down_{number}", dtype, (f"units_{number}", taps, inner, RANK)))
            found.append(Tensor(f"lora_up_{number}", dtype, (f"units_{number}", RANK, out)))
    return found


def _sizes(layout: AttentionLayout, shape: GraphShape) -> dict[str, int | str]:
    """Return the sizes of the row table's columns, rows apart."""
    return {
        "references": shape.references,
        "segments": shape.segments,
        "loras": 0,
        "layers": len(layout.layers),
        "modules": len(layout.modules),
    }


def graph_output(unet: UNet) -> Tensor:
    """Return the one output of a UNet's graph."""
    return Tensor(OUTPUT, unet.dtype, ("rows", unet.config["out_channels"], "height", "width"))


class UNetGraph(nn.Module):
    """UNet call on the inputs that `graph_inputs` lists, in their order. Returns [rows, channels, height, width].

    For tracing only; the engine calls `UNet` itself.
    """

    def __init__(self, unet: UNet, shape: GraphShape):
        super().__init__()
        self.unet, self.shape = unet, shape
        self.names = [tensor.name for tensor in graph_inputs(unet, shape)]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        unet, latents = self.unet, given["latents"]
        table, loras = self._table(given), self._loras(given) if self.shape.lora_slots else None
        embedding = unet.embed(given["timestep"], given["pooled"][table.text_page], given["time_ids"], loras)
        masks, images = (), None
        if self.shape.segments:
            masks = tuple(given[f"mask_{level}"] for level in range(unet.layout.levels))
            images = ImageKV(self._unpacked(given, "image_kv"), given["image_lengths"])
        pages = self._pages(given) if self.shape.flavour == "banked" else None
        return unet(
            latents,
            embedding,
            self._unpacked(given, "text_kv"),
            images,
            table,
            pages,
            masks,
            loras=loras,
            text_lengths=given.get("text_lengths"),
        )

    def _loras(self, given: Mapping[str, torch.Tensor]) -> StepLoras:
        """Return the LoRAs of the rows; kinds of layers outside of the graph have no pool."""
        kinds, nothing = range(len(self.unet.loras.kinds)), given["lora_unit_scale"]
        down, up = (tuple(given.get(f"lora_{name}_{kind}", nothing) for kind in kinds) for name in ("down", "up"))
        return StepLoras(down, up, given["lora_unit"], given["lora_unit_scale"])

    def _table(self, given: Mapping[str, torch.Tensor]) -> RowTable:
        """Return the row table, with idle columns in place of inputs that the graph lacks."""
        latents = given["latents"]
        # a graph without references has no rows that share norms either
        sizes = _sizes(self.unet.layout, self.shape) | {"rows": latents.shape[0], "norm_rows": 0}
        return RowTable(
            **{
                name: given[name] if name in given else column.filled(column.shape(sizes), latents.device)
                for name, column in COLUMNS.items()
            }
        )

    def _unpacked(self, given: Mapping[str, torch.Tensor], name: str) -> tuple[KeyValue, ...]:
        """Return keys and values per layer, from one tensor [layers, 2, pages, tokens, heads, d] per level."""
        return tuple((packed[0], packed[1]) for packed in self._layers(given, name, 0))

    def _layers(self, given: Mapping[str, torch.Tensor], name: str, dim: int) -> list[torch.Tensor]:
        """Return every layer's part of a packed tensor, whose layers are along `dim`."""
        found: dict[int, torch.Tensor] = {}
        for level in range(self.unet.layout.levels):
            for place, layer in enumerate(self.unet.layout.at_level(level)):
                found[layer] = given[f"{name}_{level}"].select(dim, place)
        return [found[layer] for layer in range(len(found))]

    def _pages(self, given: Mapping[str, torch.Tensor]) -> StylePages:
        kv = self._layers(given, "page_kv", 1)  # [pages, 2, tokens, heads, d]
        stats = self._layers(given, "page_stats", 1)  # [pages, 2, 3, heads, d]
        norms = given["page_norms"]  # [pages, norms, 2, groups]
        return StylePages(
            layers=tuple((x[:, 0], x[:, 1]) for x in kv),
            means=tuple(x[:, 0].transpose(0, 1) for x in stats),
            variances=tuple(x[:, 1].transpose(0, 1) for x in stats),
            norm_means=tuple(norms[:, i, 0] for i in range(norms.shape[1])),
            norm_variances=tuple(norms[:, i, 1] for i in range(norms.shape[1])),
            # a page has the size of the pictures that read it
            norm_elements=(None,) * norms.shape[1],
        )


def native_latents(unet: UNet) -> tuple[int, int]:
    """Return (height, width) of the latents that a model was trained at."""
    side = unet.config.get("sample_size") or 128
    height, width = (side, side) if isinstance(side, int) else side
    return height, width


def example_sizes(unet: UNet, latent_size: tuple[int, int] | None = None) -> dict[str, int]:
    """Return sizes to trace with: all different and above 1, so that no dimension is mistaken for another or for 1."""
    height, width = latent_size or native_latents(unet)
    sizes = {"rows": 4, "text_pages": 3, "image_pages": 5, "image_tokens": 6, "masks": 7, "pages": 2}
    return with_tokens(unet, sizes | {"height": height, "width": width})


def _own_sizes(unet: UNet, shape: GraphShape) -> dict[str, int]:
    """Return sizes to trace with of the dimensions that follow from the shape, all within `dimensions`."""
    found = {name: 11 + number for number, name in enumerate(f"units_{kind}" for kind in lora_kinds(unet))}
    return found | {"text_tokens": 2 * shape.text_tokens, "row_units": shape.row_units}


def with_tokens(unet: UNet, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return `sizes` with the token counts of attention levels, which follow from height and width, if it has those."""
    found = dict(sizes)
    if {"height", "width"} <= found.keys():
        maps = unet.attention_sizes(found["height"], found["width"])
        found |= {f"tokens_{level}": h * w for level, (h, w) in enumerate(maps)}
    return found


def example_inputs(unet: UNet, shape: GraphShape, sizes: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random but valid inputs by name: every mode, some strengths of 0, and pages in use.

    sizes: of all dimensions of `graph_inputs`, without which those that follow from the shape are examples; numbers are
    drawn on the CPU from `seed`.
    """
    draw = torch.Generator().manual_seed(seed)
    sizes = _own_sizes(unet, shape) | dict(sizes)
    references = (-1, sizes["rows"] + (sizes["pages"] if shape.flavour == "banked" else 0))
    whole = {  # least, and the first above the most
        "text_page": (0, sizes["text_pages"]),
        "image_lengths": (1, sizes["image_tokens"] + 1),
        "image_page": (-1, sizes["image_pages"]),
        "image_mask": (-1, sizes["masks"]),
        "image_group": (0, max(1, shape.segments)),
        "self_mode": (0, 3),
        **dict.fromkeys(("self_page", "adain_page", "norm_page"), references),
    }
    spread = {  # width and least
        "timestep": (1000, 0),
        "time_ids": (1024, 0),
        "self_shift": (4, -2),
        "self_scale": (2, 0),
        "mask": (2, 0),
        "page_stats": (1, 0.5),
        "page_norms": (1, 0.5),
    }
    made = {}
    whole |= {"text_lengths": (1, sizes["text_tokens"] + 1)}
    for tensor in graph_inputs(unet, shape):
        dims, kind = tensor.shape(sizes), tensor.name.rstrip("0123456789").rstrip("_")
        if kind in whole:
            least, beyond = whole[kind]
            value = torch.randint(least, beyond, dims, generator=draw)
        elif kind in spread:
            value = spread[kind][0] * torch.rand(dims, generator=draw) + spread[kind][1]
        elif kind == "self_layers":
            value = torch.rand(dims, generator=draw) < 0.7
        elif kind == "lora_unit":
            most = min(size for name, size in sizes.items() if name.startswith("units_"))
            value = torch.randint(NO_UNIT, most, dims, generator=draw)
        elif kind in ("image_strength", "adain_strength", "lora_unit_scale"):
            value = torch.rand(dims, generator=draw) * (torch.rand(dims, generator=draw) < 0.8)
        elif kind in ("lora_down", "lora_up"):
            value = torch.randn(dims, generator=draw) / 8
        else:
            value = torch.randn(dims, generator=draw)
        made[tensor.name] = value.to(tensor.dtype).to(unet.device)
    return made


def dynamic_shapes(unet: UNet, shape: GraphShape, fixed: Mapping[str, int] | None = None) -> tuple[dict, ...]:
    """Return, for `torch.export`, the dimensions of every input that may vary; those in `fixed` don't."""
    fixed = with_tokens(unet, fixed or {})
    limits = dimensions(unet, shape).items()
    named = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in limits}

    def dims(tensor: Tensor) -> dict:
        # token counts follow from height and width; the exporter derives them
        return {
            i: named.get(d, torch.export.Dim.AUTO)
            for i, d in enumerate(tensor.dims)
            if isinstance(d, str) and d not in fixed
        }

    return tuple(dims(tensor) for tensor in graph_inputs(unet, shape))


@contextmanager
def _quickly() -> Iterator[None]:
    """Disable PyTorch's per-operation work that slows down tracing without changing the graph.

    Its shape cache must prove symbolic sizes equal before each hit, which takes longer than recomputing shapes. Nodes'
    stack traces are not used here: nodes are named after their modules.
    """
    from torch._dynamo import config as dynamo
    from torch.fx import config as fx

    stacks = getattr(fx, "do_not_emit_stack_traces", False)  # PyTorch releases without the option keep the traces
    fx.do_not_emit_stack_traces = True
    try:
        with dynamo.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        fx.do_not_emit_stack_traces = stacks


def trace(unet: UNet, shape: GraphShape, fixed: Mapping[str, int] | None = None) -> torch.export.ExportedProgram:
    """Return the graph with stylefast's custom operations in it; `fixed` are sizes that don't vary.

    All operations of the graph work on CPUs and GPUs; the UNet may be on the meta device, without weights. Raises
    ExportError for a UNet whose smallest pictures would have an empty or single-valued middle, InvalidRequest for an
    unknown dimension.
    """
    halvings = len(unet.down_blocks) - 1
    if DIMENSIONS["height"][0] <= 2**halvings:
        raise ExportError(
            f"this UNet halves its feature maps {halvings} times; graphs are exported for 2 at most, as SDXL has; run "
            "this model with backend='torch' or 'compile'"
        )
    fixed = dict(fixed or {})
    unknown = sorted(fixed.keys() - DIMENSIONS.keys())
    if unknown:
        raise InvalidRequest(f"there is no dimension {values.quoted(unknown[0])}; there are {', '.join(DIMENSIONS)}")
    sizes = with_tokens(unet, example_sizes(unet) | fixed)
    inputs = tuple(example_inputs(unet, shape, sizes).values())
    graph = UNetGraph(unet, shape).eval()
    with torch.no_grad(), _quickly():
        return torch.export.export(graph, inputs, dynamic_shapes=(dynamic_shapes(unet, shape, fixed),), strict=False)
