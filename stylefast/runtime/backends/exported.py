"""Steps through exported graphs of the UNet: binds tables and pages to a graph's inputs by name.

The graph is the model's part of a step, from embedding to output; guidance and the sampler's update stay here. Tables
are only as wide as their batch and are widened to the graph's columns; inputs of the graph that a batch lacks
(pictures, masks, pages, LoRAs) are filled with idle ones. All tensors of one shape keep their addresses, for sessions
that replay.
"""

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, NamedTuple

import torch

from stylefast.errors import EngineClosed, EngineMismatch, ExportError
from stylefast.export.sessions import Session
from stylefast.export.unet_graph import (
    DIMENSIONS,
    FLAVOURS,
    OUTPUT,
    GraphShape,
    Tensor,
    dimensions,
    graph_inputs,
    graph_output,
    with_tokens,
)
from stylefast.kernels.row_lora import RANK
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.row_loras import NO_UNIT, RowLoras, table_width
from stylefast.models.row_table import COLUMNS, RowTable
from stylefast.models.unet import UNet
from stylefast.runtime.backends.base import Backend, LatentSlots, ModelInputs, StepNeeds, model_input, sampler_update
from stylefast.runtime.backends.exported_parts import ExportedParts
from stylefast.runtime.plan.sample import SampleGroup
from stylefast.runtime.steps.step_buffers import StepColumns
from stylefast.slots import LruDict
from stylefast.values import quoted

# batch shapes whose tensors are kept
_SHAPES = 32
# dimension -> the column with the page or mask that each row reads
_PICKS = {"text_pages": "text_page", "image_pages": "image_page", "masks": "image_mask"}
_COMMANDS = {"onnxruntime": "onnx"}  # backend -> kind of export, where the names differ


class Graph(NamedTuple):
    """One exported UNet.

    session: has `run(inputs, outputs)` like `export.sessions.Session`, or is a function that opens it on first use.
    ranges: dimension (`export.unet_graph.DIMENSIONS`) -> (least, most) that the graph accepts, if narrower than there.
    nbytes: bytes of the open session, if it has no `nbytes` of its own.
    """

    shape: GraphShape
    session: Any
    ranges: Mapping[str, tuple[int, int]] = {}
    nbytes: int = 0


class ExportedBackend(Backend):
    """Backend that runs the UNet's part of a step in exported graphs; replaces `TorchBackend`.

    graphs: by any name, each a `Graph` or a tuple of its fields; a batch uses the smallest that fits. name: for error
    messages and `Engine.runner.backend.name`. stale: called at every step, returns why the graphs no longer match the
    weights; None if they do. components: graphs of the model's other parts.

    Raises EngineMismatch if no graph fits a batch; the runner then splits the batch and retries.
    """

    pads_columns = True

    def __init__(
        self,
        unet: UNet,
        graphs: Mapping[str, Graph | tuple],
        name: str = "graphs",
        stale: Callable[[], str | None] = lambda: None,
        components: ExportedParts | None = None,
    ):
        if not graphs:
            raise EngineMismatch(
                f"the export contains no UNet graph; run `stylefast export {_COMMANDS.get(name, name)}`"
            )
        self.name, self._unet, self._stale, self._closed = name, unet, stale, False
        self._components = components or ExportedParts({})
        found = [graph if isinstance(graph, Graph) else Graph(*graph) for graph in graphs.values()]
        self._graphs = [_Loaded(unet, graph) for graph in sorted(found, key=lambda graph: _size(graph.shape))]
        self._prepared: LruDict[tuple, _Prepared] = LruDict()
        # unread pages, masks and pictures, by input
        self._idle: dict[tuple, torch.Tensor] = {}
        # smaller batches are padded to the graph's least row count
        self.buckets = tuple(sorted({low for graph in found if (low := graph.ranges.get("rows", (1, 1))[0]) > 1}))
        shapes = [graph.shape for graph in found]
        self.limits = {
            name: max(graph.ranges.get(name, DIMENSIONS[name])[1] for graph in found) for name in ("rows", "pages")
        } | {
            "lora_slots": max(shape.lora_slots for shape in shapes),
            "lora_rank": max(shape.lora_rank for shape in shapes),
            "text_tokens": max(shape.text_tokens * shape.text_chunks for shape in shapes),
        }
        self.takes_loras = self.limits["lora_slots"] > 0
        self.takes_long_texts = any(shape.text_chunks > 1 for shape in shapes)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Return the flavours whose sessions are open."""
        return tuple(graph.shape.flavour for graph in self._graphs if graph.opened)

    def attach(self, engine: Any) -> None:
        """Install the other components' graphs in an engine. Raises EngineMismatch if made from another VAE."""
        self._components.install(engine)

    def adapter(self, adapter: IPAdapter, encoder: ImageEncoder) -> tuple[IPAdapter, ImageEncoder]:
        """Return graph versions of both if exactly these weights were exported; else return them unchanged."""
        return self._components.adapter(adapter, encoder)

    @property
    def nbytes(self) -> int:
        """Return the bytes of idle tensors, inputs and outputs, and of the open sessions."""
        tensors = [*self._idle.values(), *(x for one in self._prepared.values() for x in one.tensors())]
        return sum(x.nbytes for x in tensors) + sum(graph.nbytes for graph in self._graphs) + self._components.nbytes

    @torch.inference_mode()
    def run(self, key: tuple, state: LatentSlots, columns: StepColumns, buffers: ModelInputs) -> None:
        """Run one step. Raises EngineMismatch if no graph fits it, EngineClosed, and the session's errors."""
        if self._closed:
            raise EngineClosed("the engine was closed while this step ran; load another one")
        why = self._stale()
        if why is not None:
            raise EngineMismatch(why)
        latents, seen = model_input(state, columns, self._unet.dtype)
        graph = self._choose(columns, buffers, state.shape[1:])
        if buffers.text_lengths is not None and graph.shape.text_chunks == 1:
            raise EngineMismatch(
                f"a text of this step is shorter than others, but graphs of backend {quoted(self.name)} read equally "
                "many tokens of each; export the model with --max-text-chunks, or use backend='torch' for texts of "
                "unequal length"
            )
        prepared = self._prepare(graph, columns, buffers.loras, state.shape)
        inputs = prepared.fill(columns, seen, buffers.loras)
        for tensor in graph.inputs:
            if tensor.name not in inputs:
                found = buffers.pooled if tensor.name == "pooled" else buffers.graph_inputs.get(tensor.name)
                inputs[tensor.name] = self._idle_tensor(graph, tensor, state.shape[1:]) if found is None else found
        inputs = prepared.within(graph.ranges, {tensor.name: inputs[tensor.name] for tensor in graph.inputs})
        graph.session().run(inputs, {OUTPUT: prepared.output})
        sampler_update(state, columns, latents, prepared.output)

    def reset(self) -> None:
        """Free prepared tensors; sessions stay open."""
        self._prepared.clear()
        self._idle.clear()

    def close(self) -> None:
        """Close the sessions; no steps can run afterwards."""
        self._closed = True
        self.reset()
        for graph in self._graphs:
            graph.close()
        self._components.close()

    def ready(self, group: SampleGroup) -> Callable[[], object] | None:
        """Return a function that opens the session of the graph for the group alone; None if it is open.

        If no graph fits, returns None as well; the step will raise the error.
        """
        all_rows = [group.rows_at(step) for step in range(group.first, group.steps)]
        banked = any(
            reference.bank is not None for group_rows in all_rows for row in group_rows.references for reference in row
        )
        references = max(group_rows.width for group_rows in all_rows)
        segments = max(group_rows.segment_width for group_rows in all_rows)
        loras = max(group_rows.lora_width for group_rows in all_rows)
        rank = max((lora.rank for lora in group.conditions.held_loras), default=0)
        needs = StepNeeds(group.rows, group.latent_shape[1:], references, segments, banked, loras, rank)
        try:
            graph = self._able(needs)
        except EngineMismatch:
            return None
        return None if graph.opened else graph.session

    def _choose(self, columns: StepColumns, buffers: ModelInputs, latent_size: tuple[int, int]) -> "_Loaded":
        table, loras = columns.table, buffers.loras
        needs = StepNeeds(
            len(columns.row_picture),
            latent_size,
            references=table.self_page.shape[1],
            segments=table.image_page.shape[1],
            banked=buffers.pages is not None,
            loras=0 if loras is None else table.lora.shape[1],
            lora_rank=0 if loras is None else RANK * loras.units.shape[2],
            text_tokens=buffers.text_kv[0][0].shape[1],
        )
        return self._able(needs)

    def check(self, needs: StepNeeds) -> None:
        """Raise EngineMismatch if no graph could run a step of such a group."""
        # smaller batches are padded
        self._able(needs._replace(rows=max([needs.rows, *self.buckets[:1]])))

    def _able(self, needs: StepNeeds) -> "_Loaded":
        """Return the smallest graph that fits a step. Raises EngineMismatch."""
        flavour = "banked" if needs.banked else "live" if needs.references else "plain"
        able = [
            graph
            for graph in self._graphs
            if FLAVOURS.index(graph.shape.flavour) >= FLAVOURS.index(flavour) and graph.has_inputs(needs)
        ]
        if not able:
            raise EngineMismatch(self._lacking(flavour, needs))
        sizes = {"rows": needs.rows, "height": needs.latent_size[0], "width": needs.latent_size[1]}
        refused = []
        for graph in able:
            beyond = graph.beyond(sizes)
            if beyond is None:
                return graph
            refused.append(f"{graph.shape.flavour}: {beyond}")
        raise EngineMismatch(
            f"no exported graph supports a step of {sizes['rows']} rows at {sizes['width']}x{sizes['height']} "
            f"latents ({'; '.join(refused)}); ask for another size or fewer pictures at once, or export for this one"
        )

    def _lacking(self, flavour: str, needs: StepNeeds) -> str:
        """Describe the graph that a batch needs, the available ones, and the export command."""
        wanted = f"references: {needs.references}, pictures per row: {needs.segments}"
        options = f"--flavour {flavour}"
        if flavour != "plain":
            options += f" --references {max(1, needs.references)}"
        if needs.segments:
            options += f" --segments {needs.segments}"
        if needs.loras:
            wanted += f", LoRAs per row: {needs.loras} of rank {needs.lora_rank}"
            options += f" --lora-rank {needs.lora_rank} --lora-slots {needs.loras}"
        chunks = max(-(-needs.text_tokens // graph.shape.text_tokens) for graph in self._graphs)
        if chunks > 1:
            wanted += f", chunks of text: {chunks}"
            options += f" --max-text-chunks {chunks}"
        return (
            f"this step needs a {flavour} graph ({wanted}); available: "
            f"{', '.join(_shown(graph.shape) for graph in self._graphs)}. Run `stylefast export "
            f"{_COMMANDS.get(self.name, self.name)} {options}`, or use backend='torch'"
        )

    def _prepare(
        self, graph: "_Loaded", columns: StepColumns, loras: RowLoras | None, latent_shape: tuple[int, int, int]
    ) -> "_Prepared":
        table, units = columns.table, graph.row_units(columns.table, loras)
        widths = (table.self_page.shape[1], table.image_page.shape[1], len(table.norm_page), units)
        key = (id(graph), len(columns.row_picture), widths, latent_shape)
        prepared = self._prepared.use(key)
        if prepared is None:
            for oldest in self._prepared.beyond(_SHAPES - 1):
                del self._prepared[oldest]
            prepared = self._prepared[key] = _Prepared(self._unet, graph, key[1], units, latent_shape)
        return prepared

    def _idle_tensor(self, graph: "_Loaded", tensor: Tensor, latent_size: tuple[int, int]) -> torch.Tensor:
        """Return a minimal tensor for an unread input: zeros, but pictures have one token."""
        least = {name: graph.ranges.get(name, (1, 1))[0] for name in graph.limits}
        sizes = with_tokens(self._unet, least | {"height": latent_size[0], "width": latent_size[1]})
        dims = tensor.shape(sizes)
        key = (tensor.name, tensor.dtype, dims)
        if key not in self._idle:
            value = 1 if tensor.name == "image_lengths" else 0
            self._idle[key] = torch.full(dims, value, dtype=tensor.dtype, device=self._unet.device)
        return self._idle[key]


class _Loaded:
    """A graph, its inputs, and its session once it is open."""

    def __init__(self, unet: UNet, graph: Graph):
        self.shape, self.ranges, self._nbytes = graph.shape, graph.ranges, graph.nbytes
        self.inputs, self.limits = graph_inputs(unet, graph.shape), dimensions(unet, graph.shape)
        self._open: Callable[[], Session] = graph.session
        self._session: Session | None = graph.session if hasattr(graph.session, "run") else None
        self._broken: ExportError | None = None
        self._opening = Lock()

    @property
    def opened(self) -> bool:
        return self._session is not None

    @property
    def nbytes(self) -> int:
        return getattr(self._session, "nbytes", self._nbytes) if self.opened else 0

    def session(self) -> Session:
        # a step may need the session while another thread is opening it
        with self._opening:
            if self._broken is not None:
                raise self._broken
            if self._session is None:
                try:
                    self._session = self._open()
                except ExportError as error:
                    # the files won't change, and checking them again takes seconds
                    self._broken = error
                    raise
            return self._session

    def has_inputs(self, needs: StepNeeds) -> bool:
        """Return whether the graph has inputs for all that a step's rows read."""
        shape = self.shape
        return (
            shape.references >= needs.references
            and shape.segments >= needs.segments
            and shape.lora_slots >= needs.loras
            and table_width(shape.lora_rank // RANK) >= table_width(needs.lora_rank // RANK)
            and shape.text_tokens * shape.text_chunks >= needs.text_tokens
        )

    def row_units(self, table: RowTable, loras: RowLoras | None) -> int:
        """Return the units per row and layer that the graph gets for a batch: as few as can be, but rarely others.

        Idle ones cost as much as those in use. 0: the graph takes none.
        """
        if loras is None:
            return min(1, self.shape.lora_slots)
        used = 1 << (table.lora.shape[1] - 1).bit_length()
        return min(used, self.shape.lora_slots) * loras.units.shape[2]

    def close(self) -> None:
        if self._session is not None and hasattr(self._session, "close"):
            self._session.close()
            self._nbytes = 0

    def beyond(self, sizes: Mapping[str, int]) -> str | None:
        """Describe the first size that the graph does not accept; None if all fit."""
        for name, size in sizes.items():
            low, high = self.ranges.get(name, DIMENSIONS[name])
            if not low <= size <= high:
                return f"{name} {size} is outside {low} to {high}"
        return None


class _Prepared:
    """Input tensors that are written at every step, and the output, for one batch shape."""

    def __init__(self, unet: UNet, graph: _Loaded, rows: int, units: int, latent_shape: tuple[int, int, int]):
        channels, height, width = latent_shape
        sizes = {"rows": rows, "height": height, "width": width}
        device, output = unet.device, graph_output(unet)
        self._own = {
            "latents": torch.empty(rows, *latent_shape, dtype=unet.dtype, device=device),
            "timestep": torch.empty(rows, device=device),
            "time_ids": torch.empty(rows, 6, device=device),
        }
        if units:
            layers = len(unet.loras.names)
            self._own["lora_unit"] = torch.full((layers, rows, units), NO_UNIT, device=device)
            self._own["lora_unit_scale"] = torch.zeros(rows, units, device=device)
        self._limits = graph.limits
        self.output = torch.empty(output.shape(sizes), dtype=output.dtype, device=device)
        self._inputs = graph.inputs
        self._columns = [x for x in graph.inputs if x.name in COLUMNS]
        self._device, self._rows = device, rows

    def tensors(self) -> list[torch.Tensor]:
        return [*self._own.values(), self.output]

    def fill(self, columns: StepColumns, seen: torch.Tensor, loras: RowLoras | None) -> dict[str, torch.Tensor]:
        """Return inputs by name, filled from the table, the latents and the LoRAs; `seen` [rows, channels, h, w]."""
        picture, table = columns.row_picture, columns.table._asdict()
        self._own["latents"].copy_(seen)
        self._own["timestep"].copy_(columns.timestep[picture])
        self._own["time_ids"].copy_(columns.time_ids[picture])
        inputs = {name: self._own[name] for name in ("latents", "timestep", "time_ids")}
        if "lora_unit" in self._own:
            inputs |= self._with_loras(columns.table, loras)
        for tensor in self._columns:
            column = table[tensor.name]
            dims = tensor.shape({"rows": self._rows})
            inputs[tensor.name] = column if tuple(column.shape) == dims else self._widened(tensor, column, dims)
        return inputs

    def _with_loras(self, table: RowTable, loras: RowLoras | None) -> dict[str, torch.Tensor]:
        """Return the units that rows use, idle beyond those, and the pools that they lie in, if any row uses one."""
        unit, scale = self._own["lora_unit"], self._own["lora_unit_scale"]
        found = {"lora_unit": unit, "lora_unit_scale": scale}
        if loras is None:
            return found
        used = loras.of_rows(table.lora, table.lora_scale)
        unit.fill_(NO_UNIT)  # an earlier batch of this shape may have used more
        unit[:, :, : used.unit.shape[2]], scale[:, : used.scale.shape[1]] = used.unit, used.scale
        for number, (down, up) in enumerate(zip(loras.down, loras.up, strict=True)):
            most = self._limits.get(f"units_{number}", (1, len(up)))[1]
            if len(up) > most:
                raise EngineMismatch(
                    f"the LoRAs on the device take {len(up)} units in layers of a kind, but the graph supports {most}; "
                    "load the model with a smaller lora_memory"
                )
            found |= {f"lora_down_{number}": down, f"lora_up_{number}": up}
        return found

    def within(self, ranges: Mapping[str, tuple[int, int]], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Reduce pages and masks to those that rows read, if the graph does not accept all of them."""
        for dimension, column in _PICKS.items():
            holders = [x for x in self._inputs if dimension in x.dims]
            least, most = ranges.get(dimension, DIMENSIONS[dimension])
            if not holders or least <= inputs[holders[0].name].shape[holders[0].dims.index(dimension)] <= most:
                continue
            picked = inputs[column]
            count = max(picked.numel(), least)
            if count > most:
                raise EngineMismatch(
                    f"a step of {self._rows} rows reads up to {count} {dimension}, but the graph supports {least} "
                    f"to {most}; export with a wider range, or ask for fewer pictures at once"
                )
            index = torch.zeros(count, dtype=torch.int64, device=self._device)
            index[: picked.numel()] = picked.flatten().clamp(min=0)
            for x in holders:
                axis, found = x.dims.index(dimension), inputs[x.name]
                key = f"{x.name} as picked"
                if key not in self._own:
                    shape = (*found.shape[:axis], count, *found.shape[axis + 1 :])
                    self._own[key] = torch.empty(shape, dtype=found.dtype, device=self._device)
                inputs[x.name] = torch.index_select(found, axis, index, out=self._own[key])
            places = torch.arange(picked.numel(), device=self._device).view_as(picked)
            inputs[column] = torch.where(picked >= 0, places, -1)
        return inputs

    def _widened(self, tensor: Tensor, column: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        """Return a column padded with idle values to the graph's width."""
        name = tensor.name
        if name not in self._own:
            self._own[name] = COLUMNS[name].filled(dims, self._device)
        if column.numel():
            self._own[name][:, : column.shape[1]] = column
        return self._own[name]


def _size(shape: GraphShape) -> tuple:
    return FLAVOURS.index(shape.flavour), shape.row_units, shape.references, shape.segments, shape.text_chunks


def _shown(shape: GraphShape) -> str:
    loras = f", {shape.lora_slots} LoRAs of rank {shape.lora_rank}" if shape.lora_slots else ""
    chunks = f", {shape.text_chunks} chunks" if shape.text_chunks > 1 else ""
    return f"{shape.flavour} ({shape.references}, {shape.segments}{loras}{chunks})"
