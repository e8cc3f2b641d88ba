"""One denoising step as a function of tensors with fixed addresses, for capturing and compiling."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from stylefast.kernels.guided_step import guided_step
from stylefast.kernels.registry import trusting
from stylefast.models.conditioning import ImageKV, KeyValue, RowFeatures, StylePages
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.unet import UNet
from stylefast.runtime.graphs import CudaCapture, StepGraphs
from stylefast.runtime.latents import LatentSlots
from stylefast.runtime.step_table import StepColumns

if TYPE_CHECKING:
    from stylefast.runtime.group import Group


class StepBuffers(NamedTuple):
    """Everything that a step reads besides its columns.

    `pages` is set if a row reads a bank, `image_kv` if one may have a picture. `packed` has all existing pages and
    masks, whether or not a row reads them, by the input names of exported graphs.
    """

    text_kv: tuple[KeyValue, ...]
    pooled: torch.Tensor  # [text pages, pooled_dim]
    image_kv: ImageKV | None
    pages: StylePages | None
    masks: tuple[torch.Tensor, ...]
    packed: Mapping[str, torch.Tensor] = MappingProxyType({})


def run_step(
    unet: UNet,
    state: LatentSlots,
    columns: StepColumns,
    buffers: StepBuffers,
    features: RowFeatures | None = None,
) -> None:
    """Advance the pictures in `columns.slot` by one step, in place.

    The model sees every row's picture at its noise level; guidance and the sampler's update combine the rows of a
    picture. Nothing here waits for the device. `features` collects the rows' features as references.
    """
    # the runtime makes and checks every argument
    with trusting():
        latents, seen = see(state, columns, unet.dtype)
        picture = columns.row_picture
        embedding = unet.embed(
            columns.timestep[picture], buffers.pooled[columns.table.text_page], columns.time_ids[picture]
        )
        output = unet(
            seen,
            embedding,
            buffers.text_kv,
            buffers.image_kv,
            columns.table,
            buffers.pages,
            buffers.masks,
            features=features,
        )
        advance(state, columns, latents, output)


def see(state: LatentSlots, columns: StepColumns, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents [pictures, channels, h, w] float32, and the model's input for the rows [rows, channels, h, w]."""
    latents = state.latents[columns.slot]
    return latents, (latents * columns.input_scale[:, None, None, None])[columns.row_picture].to(dtype)


def advance(state: LatentSlots, columns: StepColumns, latents: torch.Tensor, output: torch.Tensor) -> None:
    """Apply guidance and the sampler's update to the model's output [rows, channels, h, w]; store the next latents."""
    slot = columns.slot
    latents, anchor, history = guided_step(
        latents,
        state.anchor[slot],
        state.history[slot],
        output,
        columns.branch_rows,
        columns.branch_weights,
        columns.rescale,
        columns.denoised,
        columns.update,
        columns.noise,
    )
    finite = torch.isfinite(latents).flatten(1).all(1)
    # write last: if memory runs out before, the step can be run again
    state.latents[slot], state.anchor[slot], state.history[slot] = latents, anchor, history
    state.finite[slot] = finite


class Backend:
    """Runner of steps; `Engine(backend=...)` accepts custom ones.

    name: the value of `Engine.runtime.backend.name`. buckets: row counts to which batches are padded; empty: a table
    has the shape of its batch. pads_columns: whether `run` itself pads columns of references and pictures, so that
    tables are only as wide as their batch. limits: the largest graph dimensions ("rows", "pages") that it supports.
    """

    name: str = "own"
    buckets: tuple[int, ...] = ()
    pads_columns = False
    limits: Mapping[str, int] = MappingProxyType({})

    def run(self, key: tuple, state: LatentSlots, columns: StepColumns, buffers: StepBuffers) -> None:
        """Run one step; `key` identifies shapes and buffers, for backends that prepare something for each.

        If it raises, the pictures must be unchanged: a step that ran out of memory (`OutOfMemory`) or that can't be run
        as a whole (`ExportError`) is run again in halves.
        """
        raise NotImplementedError

    def check(self, rows: int, latent_size: tuple[int, int], references: int, segments: int, banked: bool) -> None:
        """Raise ExportError if a group of `rows` rows or more can't be run; called before its job is accepted.

        latent_size: (height, width). references, segments: the most that a row reads. banked: whether rows read a bank.
        """

    def ready(self, group: "Group") -> Callable[[], None] | None:
        """Return slow work to do before a group's first step, such as opening a file; None: nothing.

        It is called alongside other groups' steps, so it must not touch state used by `run`.
        """
        return None

    def serve(self, engine: Any) -> None:
        """Replace other parts of a new engine, such as its text encoders."""

    def adapter(self, adapter: IPAdapter, encoder: ImageEncoder) -> tuple[IPAdapter, ImageEncoder]:
        """Return the adapter and image encoder that the engine should use."""
        return adapter, encoder

    def forget(self) -> None:
        """Drop prepared data."""

    def close(self) -> None:
        """Free everything held outside of Python; called when the engine is closed."""

    @property
    def nbytes(self) -> int:
        """Return the bytes of prepared data."""
        return 0


class TorchBackend(Backend):
    """Backend that runs a step eagerly.

    graphs: captures and replays steps; "auto": CUDA graphs on a GPU, where launching a step's thousands of kernels
    takes longer than running them; none on a CPU. None: every step is launched kernel by kernel.
    """

    name = "torch"

    def __init__(self, unet: UNet, graphs: StepGraphs | None | str = "auto"):
        self._unet, self._graphs = unet, graphs_for(unet.device) if graphs == "auto" else graphs

    def run(self, key: tuple, state: LatentSlots, columns: StepColumns, buffers: StepBuffers) -> None:
        def step():
            run_step(self._unet, state, columns, buffers)

        if self._graphs is None:
            step()
        else:
            self._graphs.run(key, read_in_place(state, columns, buffers), step)

    def forget(self) -> None:
        """Free the memory of captured graphs."""
        if self._graphs is not None:
            self._graphs.forget()

    def close(self) -> None:
        self.forget()

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


def read_in_place(state: LatentSlots, columns: StepColumns, buffers: StepBuffers) -> list[torch.Tensor]:
    """Return one tensor for each set of buffers that a step reads in place and that are replaced together."""
    found = [state.latents, columns.slot, buffers.text_kv[0][0], buffers.pooled]
    if buffers.image_kv is not None:
        found += [buffers.image_kv.layers[0][0], buffers.image_kv.lengths]
    if buffers.pages is not None:
        found.append(buffers.pages.layers[0][0])
    return found + list(buffers.masks[:1])
