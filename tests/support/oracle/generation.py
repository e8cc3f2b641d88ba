"""Whole pictures, literally: diffusers' encoders, UNet and schedulers in a plain loop with the oracle's styles."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from tests.support.oracle.instant_style import Segment, diffusers_adapters, row_adapters
from tests.support.oracle.sampler import make_scheduler, rescaled, sample
from tests.support.oracle.style_aligned import Sharing, guidance_layout, shared

Text = tuple[torch.Tensor, torch.Tensor]  # states [pictures, 77, cross_dim], pooled [pictures, d]


@dataclass(frozen=True)
class Pictures:
    """diffusers' own adapters in a run: one entry an adapter."""

    adapters: Sequence[dict]
    scales: Sequence
    embeds: Sequence[torch.Tensor]  # [1, images, embed_dim], of the conditional rows
    masks: Sequence[torch.Tensor] | None = None  # [1, images, height, width]


def encode(pipe, prompts: Sequence[str], negative: str | None) -> tuple[Text, Text]:
    """diffusers' own encodings (null, full) of all prompts; a `negative` of None is what the pipeline makes of it."""
    with torch.no_grad():
        full, null, full_pooled, null_pooled = pipe.encode_prompt(
            list(prompts), negative_prompt=negative, do_classifier_free_guidance=True
        )
    return (null, null_pooled), (full, full_pooled)


def classifier_free(guidance: float, rescale: float = 0.0) -> Callable:
    """null, full -> null + guidance (full - null), its deviation pulled back by `rescale`."""

    def combine(null, full):
        guided = null + guidance * (full - null)
        return rescaled(guided, full, rescale) if rescale else guided

    return combine


def generate(
    pipe,
    branches: Callable[[float], Sequence[Text]],
    combine: Callable,
    *,
    scheduler: str,
    steps: int,
    seeds: Sequence[int],
    size: tuple[int, int],
    sharing: dict | None = None,
    pinned=None,
    pictures: Pictures | None = None,
    segments: Sequence[Segment] = (),
    null_branches=(0,),
) -> torch.Tensor:
    """Latents [pictures, 4, h, w] after `steps` steps, for pixels `size` (height, width).

    `branches(timestep)` gives the text of every guidance branch, one entry a row; rows are branch-major. `combine`
    takes the branches' predictions. `sharing` holds options of `Sharing`; the first row of every branch is the
    reference. `pinned` is (clean latents, noise) of a reference picture in front of the pictures. Branches in
    `null_branches` get zero embeddings instead of those of `pictures`. `segments` give full control over rows.
    """
    shape = (4, size[0] // pipe.vae_scale_factor, size[1] // pipe.vae_scale_factor)
    noise_schedule = make_scheduler(scheduler, pipe.scheduler.config)
    rows_per_branch = len(seeds) + (pinned is not None)

    def predict(latents, timestep, step):
        texts = branches(float(timestep))
        states, pooled = (torch.cat(parts).to(pipe.unet.dtype) for parts in zip(*texts))
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).repeat(len(states), 1)
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        options = {}
        if pictures is not None:
            conditions["image_embeds"] = [
                torch.cat(
                    [
                        embeds.repeat(rows_per_branch, 1, 1) * (branch not in null_branches)
                        for branch in range(len(texts))
                    ]
                )
                for embeds in pictures.embeds
            ]
            if pictures.masks is not None:
                options["ip_adapter_masks"] = list(pictures.masks)
        batch = latents.repeat(len(texts), 1, 1, 1)
        with torch.no_grad():
            output = pipe.unet(
                batch, timestep, states, added_cond_kwargs=conditions, cross_attention_kwargs=options or None
            ).sample
        return combine(*output.chunk(len(texts)))

    with ExitStack() as stack:
        if pictures is not None:
            stack.enter_context(diffusers_adapters(pipe.unet, list(pictures.adapters), list(pictures.scales)))
        if segments:
            stack.enter_context(row_adapters(pipe.unet, list(segments)))
        if sharing is not None:
            references = guidance_layout(rows_per_branch, len(branches(0.0)))
            stack.enter_context(shared(pipe.unet, Sharing(references, **sharing)))
        return sample(predict, noise_schedule, steps, shape, seeds, pinned, pipe.unet.dtype)
