"""The interface of backends, and the backend that runs a step as it is."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch

from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.unet import UNet
from stylefast.runtime.backends.cuda_graphs import CudaCapture, StepGraphs
from stylefast.runtime.plan.sample_group import SampleGroup
from stylefast.runtime.steps.step import LatentSlots, ModelInputs, run_step
from stylefast.runtime.steps.step_buffers import StepColumns


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
        takes_long_texts: whether rows may read texts of several chunks.
    """

    name: str = "own"
    buckets: tuple[int, ...] = ()
    pads_columns: bool = False
    limits: Mapping[str, int] = MappingProxyType({})
    takes_loras: bool = False
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
    takes_loras = takes_long_texts = True

    def __init__(self, unet: UNet, graphs: StepGraphs | None | Literal["auto"] = "auto"):
        self._unet, self._graphs = unet, graphs_for(unet.device) if graphs == "auto" else graphs

    def run(self, key: tuple, state: LatentSlots, columns: StepColumns, buffers: ModelInputs) -> None:
        if self._graphs is None:
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
