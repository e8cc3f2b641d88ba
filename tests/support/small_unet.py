"""A small random UNet with SDXL's block layout, drawn so that every operation in it matters."""

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

from tests.support.small_sdxl import small_unet_config

CROSS_DIM, POOLED_DIM, TEXT_TOKENS = 48, 24, 7
# the least width of a head that our C++ attention takes; where attention is, one head and two
SMALL = {"widths": (32, 32, 64), "head_width": 32, "norm_num_groups": 16}
CONFIG = small_unet_config(**SMALL, cross_dim=CROSS_DIM, pooled_dim=POOLED_DIM)


def random_unet(seed: int = 0, config=CONFIG) -> UNet2DConditionModel:
    """diffusers' UNet with random weights: sharp attention, and norms whose affine part is not the identity."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
    sharpen(unet, seed)
    return unet


def sharpen(unet, seed: int) -> None:
    """Move a freshly initialised UNet away from flat softmaxes and identity norms, where mistakes would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            elif name.endswith(("to_q.weight", "to_k.weight")):
                parameter *= 3.0


@dataclass(frozen=True)
class Inputs:
    """What one UNet call takes, one entry a row."""

    latents: torch.Tensor  # [rows, 4, height, width]
    timesteps: torch.Tensor  # [rows]
    text: torch.Tensor  # [rows, tokens, cross_dim]
    pooled: torch.Tensor  # [rows, pooled_dim]
    time_ids: torch.Tensor  # [rows, 6]

    def rows(self, index) -> "Inputs":
        """The same call with some of the rows, in the order of `index`."""
        return Inputs(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def random_inputs(rows: int, seed: int = 0, height: int = 8, width: int = 8, timestep: float | None = 601.0) -> Inputs:
    """Random rows at one timestep, or each at its own if `timestep` is None."""
    generator = torch.Generator().manual_seed(1000 + seed)
    latents = torch.randn(rows, 4, height, width, generator=generator)
    # rows differ in mean and deviation, else AdaIN and shared norms would hardly move them
    latents = latents * torch.linspace(0.5, 1.5, rows).view(-1, 1, 1, 1)
    latents = latents + torch.linspace(-0.5, 0.5, rows).view(-1, 1, 1, 1)
    times = torch.full((rows,), timestep) if timestep is not None else torch.linspace(981.0, 41.0, rows)
    size = torch.tensor([8.0 * height, 8.0 * width])
    return Inputs(
        latents,
        times,
        torch.randn(rows, TEXT_TOKENS, CROSS_DIM, generator=generator),
        torch.randn(rows, POOLED_DIM, generator=generator),
        torch.cat([size, torch.zeros(2), size]).repeat(rows, 1),
    )


def forward(unet, inputs: Inputs, image_embeds=None, masks=None) -> torch.Tensor:
    """diffusers' own forward; `image_embeds` is a list, one [rows, images, embed_dim] for each adapter."""
    conditions = {"text_embeds": inputs.pooled, "time_ids": inputs.time_ids}
    if image_embeds is not None:
        conditions["image_embeds"] = image_embeds
    options = {} if masks is None else {"ip_adapter_masks": masks}
    with torch.no_grad():
        return unet(
            inputs.latents,
            inputs.timesteps,
            inputs.text,
            added_cond_kwargs=conditions,
            cross_attention_kwargs=options or None,
        ).sample
