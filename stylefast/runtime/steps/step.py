"""One denoising step as a function of tensors with fixed addresses, for capturing and compiling."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from stylefast.kernels.guided_step import operation as guided_step
from stylefast.models.layer_inputs import ImageKV, KeyValue, RowFeatures, StylePages
from stylefast.models.unet import UNet
from stylefast.runtime.steps.latents import LatentSlots
from stylefast.runtime.steps.step_buffers import StepColumns


class ModelInputs(NamedTuple):
    """Everything that a step reads besides its columns.

    `pages` is set if a row reads a bank, `image_kv` if one may have a picture. `graph_inputs` has all pages and
    masks, whether or not a row reads them, by the input names of exported graphs.
    """

    text_kv: tuple[KeyValue, ...]
    pooled: torch.Tensor  # [text pages, pooled_dim]
    image_kv: ImageKV | None
    pages: StylePages | None
    masks: tuple[torch.Tensor, ...]
    graph_inputs: Mapping[str, torch.Tensor] = MappingProxyType({})


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
