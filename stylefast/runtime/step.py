"""One denoising step as a function of tensors that stay where they are: what is captured and compiled."""

from typing import NamedTuple

import torch

from stylefast.kernels.guided_step import guided_step
from stylefast.kernels.registry import trusting
from stylefast.models.conditioning import ImageKV, KeyValue, RowFeatures, StylePages
from stylefast.models.unet import UNet
from stylefast.runtime.latents import LatentSlots
from stylefast.runtime.step_table import StepColumns


class StepBuffers(NamedTuple):
    """Everything that a step reads beside its columns."""

    text_kv: tuple[KeyValue, ...]
    pooled: torch.Tensor  # [text pages, pooled_dim]
    image_kv: ImageKV | None
    pages: StylePages | None
    masks: tuple[torch.Tensor, ...]


def run_step(
    unet: UNet,
    state: LatentSlots,
    columns: StepColumns,
    buffers: StepBuffers,
    features: RowFeatures | None = None,
) -> None:
    """Advance the pictures in `columns.slot` by one step, in place.

    The model sees every row's picture at its noise level; guidance and the sampler's update combine the rows of a
    picture. Nothing here waits for the device. `features` takes what the rows offer as references.
    """
    # every argument is made by the runtime, and checked when it is made
    with trusting():
        slot, picture = columns.slot, columns.row_picture
        latents = state.latents[slot]  # [pictures, channels, h, w]
        embedding = unet.embed(
            columns.timestep[picture], buffers.pooled[columns.table.text_page], columns.time_ids[picture]
        )
        seen = (latents * columns.input_scale[:, None, None, None])[picture].to(unet.dtype)  # [rows, channels, h, w]
        output = unet(
            seen, embedding, buffers.text_kv, buffers.image_kv, columns.table, buffers.pages, buffers.masks,
            features=features,
        )  # fmt: skip
        latents, anchor, history = guided_step(
            latents, state.anchor[slot], state.history[slot], output, columns.branch_rows, columns.branch_weights,
            columns.rescale, columns.denoised, columns.update, columns.noise,
        )  # fmt: skip
        finite = torch.isfinite(latents).flatten(1).all(1)
        # all writes last: where memory runs out before, the step can be run again
        state.latents[slot], state.anchor[slot], state.history[slot] = latents, anchor, history
        state.finite[slot] = finite


class TorchBackend:
    """Runs a step as it is written."""

    name = "torch"
    # a table takes the shape of its batch
    buckets: tuple[int, ...] = ()

    def __init__(self, unet: UNet):
        self._unet = unet

    def run(self, key: tuple, state: LatentSlots, columns: StepColumns, buffers: StepBuffers) -> None:
        """One step; `key` tells shapes and buffers from others, for backends that prepare something for each."""
        run_step(self._unet, state, columns, buffers)

    def forget(self) -> None:
        """Drop what was prepared."""

    @property
    def nbytes(self) -> int:
        """Bytes that preparations hold."""
        return 0
