"""One denoising step, the interface of the backends that run it, and the backend that runs it as it is.

`run_step` is a function of tensors with fixed addresses, for capturing and compiling. `LatentSlots` holds the pictures
that it advances.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from stylefast.kernels.guided_step import Branches, SamplerStep
from stylefast.kernels.guided_step import operation as guided_step
from stylefast.models.control_net import ControlRows, residuals_of
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.row_features import Recorder
from stylefast.models.row_loras import RowLoras
from stylefast.models.row_table import ImageKV, KeyValue, StylePages
from stylefast.models.unet import UNet
from stylefast.runtime.backends.cuda_graphs import CudaCapture, StepGraphs
from stylefast.runtime.plan.sample import SampleGroup
from stylefast.runtime.steps.step_buffers import StepColumns
from stylefast.slots import Slots

# slot 0 holds no picture: idle rows of a padded batch read and write it
_FIRST_SLOTS = 2
# shared by all instances, so that no two buffers have the same generation
_generations = itertools.count(1)


_BUFFERS = ("latents", "anchor", "history", "beside", "finite")  # of `LatentSlots`


class LatentSlots:
    """Buffers `latents`, `anchor` [slots, channels, h, w], `history` [slots, 2, channels, h, w]; `finite` [slots].

    `beside` [slots, more, h, w] is what the model sees in addition, in `more` channels; they are 0 but for inpainting
    models. All but `finite` are float32. They are replaced when they grow, and `generation` increases.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device, more: int = 0):
        self.shape, self.generation, self._device = shape, next(_generations), device
        self.latents = torch.zeros(0, *shape, device=device)
        self.anchor = torch.zeros(0, *shape, device=device)
        self.history = torch.zeros(0, 2, *shape, device=device)
        self.beside = torch.zeros(0, more, *shape[1:], device=device)
        self.finite = torch.ones(0, dtype=torch.bool, device=device)
        self._slots = Slots(1, used=1)
        self._grow(_FIRST_SLOTS)

    @property
    def used(self) -> int:
        """Count the slots that hold a picture."""
        return self._slots.used - 1

    @property
    def nbytes(self) -> int:
        """Return the bytes of all buffers."""
        return sum(x.numel() * x.element_size() for x in (getattr(self, name) for name in _BUFFERS))

    def take(self, latents: torch.Tensor, beside: torch.Tensor | None = None) -> np.ndarray:
        """Put pictures [n, channels, h, w] and what is seen beside them into free slots; return their numbers [n]."""
        while self._slots.free < len(latents):
            self._grow(2 * len(self.latents))
        slots = self._slots.lowest(len(latents))
        index = torch.tensor(slots, device=self._device)
        self.latents[index] = latents.to(self.latents)
        if beside is not None:
            self.beside[index] = beside.to(self.beside)
        self.anchor[index], self.history[index], self.finite[index] = 0, 0, True
        # taken only after all writes succeeded
        return np.array(self._slots.take(len(slots)), dtype=np.int64)

    def release(self, slots: Iterable[int]) -> None:
        """Release slots."""
        self._slots.release(slots)

    def _grow(self, count: int) -> None:
        before, grown = len(self.latents), {}
        for name in _BUFFERS:
            old = getattr(self, name)
            grown[name] = old.new_zeros(count, *old.shape[1:])
            grown[name][:before] = old
        # replace all or none, in case memory runs out
        for name, new in grown.items():
            setattr(self, name, new)
        self._slots.grow(count)
        self.generation = next(_generations)


class ModelInputs(NamedTuple):
    """Everything that a step reads besides its columns.

    `pages` is set if a row reads a bank, `image_kv` if one may have a picture, `loras` if one uses a LoRA,
    `text_lengths` if one may have a text that is shorter than the pages.
    `graph_inputs` has all pages and masks, whether or not a row reads them, by the input names of exported graphs.
    """

    text_kv: tuple[KeyValue, ...]
    pooled: torch.Tensor  # [text pages, pooled_dim]
    image_kv: ImageKV | None
    pages: StylePages | None
    masks: tuple[torch.Tensor, ...]
    graph_inputs: Mapping[str, torch.Tensor] = MappingProxyType({})
    loras: RowLoras | None = None
    text_lengths: torch.Tensor | None = None  # [text pages] int64: tokens in use
    controls: tuple[ControlRows, ...] = ()  # rows that ControlNets steer


def run_step(
    unet: UNet,
    state: LatentSlots,
    columns: StepColumns,
    buffers: ModelInputs,
    recorder: Recorder | None = None,
) -> None:
    """Advance the pictures in `columns.slot` by one step, in place.

    The model sees every row's picture at its noise level; guidance and the sampler's update combine the rows of a
    picture. Nothing here waits for the device. `recorder` records it.
    """
    if recorder is not None:
        recorder.keep_rows(columns.branch_rows)
    latents, seen = model_input(state, columns, unet.dtype)
    picture = columns.row_picture
    loras = None if buffers.loras is None else buffers.loras.of_rows(columns.table.lora, columns.table.lora_scale)
    pooled = buffers.pooled[columns.table.text_page]
    timestep, time_ids = columns.timestep[picture], columns.time_ids[picture]
    embedding = unet.embed(timestep, pooled, time_ids, loras)
    own = seen[:, : latents.shape[1]]
    residuals = residuals_of(buffers.controls, own, timestep, pooled, time_ids) if buffers.controls else ()
    output = unet(
        seen,
        embedding,
        buffers.text_kv,
        buffers.image_kv,
        columns.table,
        buffers.pages,
        buffers.masks,
        residuals=residuals,
        recorder=recorder,
        loras=loras,
        text_lengths=buffers.text_lengths,
    )
    sampler_update(state, columns, latents, output)


def model_input(state: LatentSlots, columns: StepColumns, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents [pictures, channels, h, w] float32, and the model's input for the rows [rows, channels, h, w]."""
    latents = state.latents[columns.slot]
    seen = latents * columns.input_scale[:, None, None, None]
    if state.beside.shape[1]:
        seen = torch.cat([seen, state.beside[columns.slot]], dim=1)
    return latents, seen[columns.row_picture].to(dtype)


def sampler_update(state: LatentSlots, columns: StepColumns, latents: torch.Tensor, output: torch.Tensor) -> None:
    """Apply guidance and the sampler's update to the model's output [rows, channels, h, w]; store the next latents."""
    slot = columns.slot
    latents, anchor, history = guided_step.run(
        latents,
        state.anchor[slot],
        state.history[slot],
        output,
        Branches(columns.branch_rows, columns.branch_weights, columns.rescale),
        SamplerStep(columns.denoised, columns.update, columns.noise),
    )
    finite = torch.isfinite(latents).flatten(1).all(1)
    # write last: if memory runs out before, the step can be run again
    state.latents[slot], state.anchor[slot], state.history[slot] = latents, anchor, history
    state.finite[slot] = finite


class StepNeeds(NamedTuple):
    """The sizes that a graph must support to run a step, or the steps of a group.

    rows: of one UNet call. latent_size: (height, width). references, segments, loras, text_tokens: the most that a row
    reads. banked: whether rows read a bank. lora_rank: the largest one.
    """

    rows: int
    latent_size: tuple[int, int]
    references: int = 0
    segments: int = 0
    banked: bool = False
    loras: int = 0
    lora_rank: int = 0
    text_tokens: int = 0


class Backend:
    """Executor of steps; the option `backend` of an engine accepts custom ones.

    Attributes:
        name: the value of `Engine.runner.backend.name`.
        buckets: row counts to which batches are padded; empty: a table has the shape of its batch.
        pads_columns: whether `run` itself pads columns of references and pictures, so that tables are only as wide as
            their batch.
        limits: the largest graph dimensions ("rows", "pages") that it supports, LoRAs per picture ("lora_slots"), their
            rank ("lora_rank") and tokens of a text ("text_tokens"); there is no limit to those that are missing.
        takes_loras: whether rows may use LoRAs.
        takes_controls: whether ControlNets may steer rows.
        takes_long_texts: whether rows may read texts of several chunks.
    """

    name: str = "own"
    buckets: tuple[int, ...] = ()
    pads_columns: bool = False
    limits: Mapping[str, int] = MappingProxyType({})
    takes_loras: bool = False
    takes_controls: bool = False
    takes_long_texts: bool = False

    def run(self, key: tuple, state: LatentSlots, columns: StepColumns, buffers: ModelInputs) -> None:
        """Run one step; `key` identifies shapes and buffers, for backends that prepare something for each.

        If it raises, the pictures must be unchanged: a step that ran out of memory (`OutOfMemory`) or that can't be run
        as a whole (`ExportError`) is run again in halves.
        """
        raise NotImplementedError

    def check(self, needs: StepNeeds) -> None:
        """Raise ExportError if a group of that many rows or more can't be run; called before its job is accepted."""

    def ready(self, group: SampleGroup) -> Callable[[], object] | None:
        """Return slow work to do before a group's first step, such as opening a file; None: nothing.

        It is called alongside other groups' steps, so it must not touch state used by `run`.
        """
        return None

    def attach(self, engine: Any) -> None:
        """Replace other parts of a new engine, such as its text encoders."""

    def adapter(self, adapter: IPAdapter, encoder: ImageEncoder) -> tuple[IPAdapter, ImageEncoder]:
        """Return the adapter and image encoder that the engine should use."""
        return adapter, encoder

    def reset(self) -> None:
        """Drop prepared data."""

    def close(self) -> None:
        """Free everything held outside of Python; called when the engine is closed."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of prepared data."""
        return 0


class TorchBackend(Backend):
    """Backend that runs a step eagerly.

    Args:
        graphs: captures and replays steps; "auto": CUDA graphs on a GPU, where launching a step's thousands of kernels
            takes longer than running them; none on a CPU. None: every step is launched kernel by kernel.
    """

    name = "torch"
    takes_loras = takes_long_texts = takes_controls = True

    def __init__(self, unet: UNet, graphs: StepGraphs | None | Literal["auto"] = "auto"):
        self._unet, self._graphs = unet, graphs_for(unet.device) if graphs == "auto" else graphs

    def run(self, key: tuple, state: LatentSlots, columns: StepColumns, buffers: ModelInputs) -> None:
        if self._graphs is None or buffers.controls:  # which rows are steered changes the shapes
            run_step(self._unet, state, columns, buffers)
        else:
            step = partial(run_step, self._unet, state, columns, buffers)
            self._graphs.run(key, read_in_place(state, columns, buffers), step)

    def reset(self) -> None:
        """Free the memory of captured graphs."""
        if self._graphs is not None:
            self._graphs.reset()

    def close(self) -> None:
        self.reset()

    @property
    def captures(self) -> int:
        """Count the CUDA graphs that are ready for replay."""
        return 0 if self._graphs is None else len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Return the bytes of captured graphs' memory."""
        return 0 if self._graphs is None else self._graphs.nbytes


def graphs_for(device: torch.device) -> StepGraphs | None:
    """Return the object that captures steps on a device: CUDA graphs on a GPU, None elsewhere."""
    return StepGraphs(CudaCapture(device)) if device.type == "cuda" else None


def read_in_place(state: LatentSlots, columns: StepColumns, buffers: ModelInputs) -> list[torch.Tensor]:
    """Return one tensor for each set of buffers that a step reads in place and that are replaced together."""
    found = [state.latents, columns.slot, buffers.text_kv[0][0], buffers.pooled]
    if buffers.text_lengths is not None:
        found.append(buffers.text_lengths)
    if buffers.image_kv is not None:
        found += [buffers.image_kv.layers[0][0], buffers.image_kv.lengths]
    if buffers.pages is not None:
        found.append(buffers.pages.layers[0][0])
    if buffers.loras is not None:
        found.append(buffers.loras.units)
    return found + list(buffers.masks[:1])
