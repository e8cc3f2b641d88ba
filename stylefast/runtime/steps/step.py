"""One denoising step as a function of tensors with fixed addresses, for capturing and compiling, and its latents."""

import itertools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from stylefast.kernels.guided_step import operation as guided_step
from stylefast.models.row_features import RowFeatures
from stylefast.models.row_loras import RowLoras
from stylefast.models.row_table import ImageKV, KeyValue, StylePages
from stylefast.models.unet import UNet
from stylefast.runtime.steps.step_buffers import StepColumns
from stylefast.slots import Slots

# slot 0 holds no picture: idle rows of a padded batch read and write it
_FIRST_SLOTS = 2
# shared by all instances, so that no two buffers have the same generation
_generations = itertools.count(1)


class LatentSlots:
    """Buffers `latents`, `anchor` [slots, channels, h, w], `history` [slots, 2, channels, h, w]; `finite` [slots].

    All but `finite` are float32. They are replaced when they grow, and `generation` increases.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device):
        self.shape, self.generation, self._device = shape, next(_generations), device
        self.latents = torch.zeros(0, *shape, device=device)
        self.anchor = torch.zeros(0, *shape, device=device)
        self.history = torch.zeros(0, 2, *shape, device=device)
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
        return sum(x.numel() * x.element_size() for x in (self.latents, self.anchor, self.history, self.finite))

    def take(self, latents: torch.Tensor) -> np.ndarray:
        """Put pictures [n, channels, h, w] into free slots; return their numbers [n] int64."""
        while self._slots.free < len(latents):
            self._grow(2 * len(self.latents))
        slots = self._slots.lowest(len(latents))
        index = torch.tensor(slots, device=self._device)
        self.latents[index] = latents.to(self.latents)
        self.anchor[index], self.history[index], self.finite[index] = 0, 0, True
        # taken only after all writes succeeded
        return np.array(self._slots.take(len(slots)), dtype=np.int64)

    def release(self, slots: Iterable[int]) -> None:
        """Release slots."""
        self._slots.release(slots)

    def _grow(self, count: int) -> None:
        before, grown = len(self.latents), {}
        for name in ("latents", "anchor", "history", "finite"):
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


def run_step(
    unet: UNet,
    state: LatentSlots,
    columns: StepColumns,
    buffers: ModelInputs,
    features: RowFeatures | None = None,
) -> None:
    """Advance the pictures in `columns.slot` by one step, in place.

    The model sees every row's picture at its noise level; guidance and the sampler's update combine the rows of a
    picture. Nothing here waits for the device. `features` collects the rows' features as references.
    """
    latents, seen = model_input(state, columns, unet.dtype)
    picture = columns.row_picture
    loras = None if buffers.loras is None else buffers.loras.of_rows(columns.table.lora, columns.table.lora_scale)
    pooled = buffers.pooled[columns.table.text_page]
    embedding = unet.embed(columns.timestep[picture], pooled, columns.time_ids[picture], loras)
    output = unet(
        seen,
        embedding,
        buffers.text_kv,
        buffers.image_kv,
        columns.table,
        buffers.pages,
        buffers.masks,
        features=features,
        loras=loras,
        text_lengths=buffers.text_lengths,
    )
    sampler_update(state, columns, latents, output)


def model_input(state: LatentSlots, columns: StepColumns, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents [pictures, channels, h, w] float32, and the model's input for the rows [rows, channels, h, w]."""
    latents = state.latents[columns.slot]
    return latents, (latents * columns.input_scale[:, None, None, None])[columns.row_picture].to(dtype)


def sampler_update(state: LatentSlots, columns: StepColumns, latents: torch.Tensor, output: torch.Tensor) -> None:
    """Apply guidance and the sampler's update to the model's output [rows, channels, h, w]; store the next latents."""
    slot = columns.slot
    latents, anchor, history = guided_step.run(
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
