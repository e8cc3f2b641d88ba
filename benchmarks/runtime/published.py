"""StyleAligned as published (arXiv 2312.02133): plain PyTorch around diffusers' UNet. The benchmark's peer.

One batch holds both halves of classifier-free guidance, `[null 0, null 1, ..., full 0, full 1, ...]`, where picture 0
of each half is the reference. In every self-attention the queries and keys of all rows take the reference's token
statistics, the reference's keys and values are expanded to all rows and concatenated to their own, and one
`scaled_dot_product_attention` runs over everything, the reference's own rows included. Nothing is cached.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention


class SharedAttention:
    """Processor for self-attention of diffusers' UNet: AdaIN of queries and keys, expand, concatenate, attend.

    branches: parts of a batch with a reference of their own, 2 under guidance and 1 without.
    """

    def __init__(self, branches: int = 2):
        self.branches = branches

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        # [rows, tokens, channels] -> [rows, heads, tokens, d]
        query, key, value = [
            projection(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        ]
        query, key = adain(query, self.branches), adain(key, self.branches)
        key = torch.cat([key, of_reference(key, self.branches)], -2)
        value = torch.cat([value, of_reference(value, self.branches)], -2)
        out = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def of_reference(states: torch.Tensor, branches: int = 2) -> torch.Tensor:
    """Copy the first row of each branch to all its rows; `states` is [rows, ...]."""
    parts = states.unflatten(0, (branches, -1))
    return parts[:, :1].expand_as(parts).flatten(0, 1)


def adain(states: torch.Tensor, branches: int = 2) -> torch.Tensor:
    """Give `states` [rows, heads, tokens, d] the reference's mean and deviation over tokens."""
    mean = states.mean(-2, keepdim=True)
    deviation = (states.var(-2, keepdim=True) + 1e-5).sqrt()
    return (states - mean) / deviation * of_reference(deviation, branches) + of_reference(mean, branches)


def align(unet) -> SharedAttention:
    """Make every self-attention of diffusers' `unet` a `SharedAttention`, permanently; return it."""
    shared = SharedAttention()
    unet.set_attn_processor(
        {name: shared if ".attn1." in name else kept for name, kept in unet.attn_processors.items()}
    )
    return shared


class Published:
    """The published method on the parts of a diffusers SDXL pipeline.

    `unet` replaces the pipeline's own; `call` and `decode` evaluate UNet and VAE, for example in compiled form. `plain`
    keeps the attention: diffusers' ordinary sampling.
    """

    def __init__(self, pipeline, *, unet=None, call=None, decode=None, plain: bool = False):
        self.pipeline = pipeline
        self.unet = pipeline.unet if unet is None else unet
        # not `call or ...`: a module's truth value may be its length
        self.call = self.unet if call is None else call
        self.decode = pipeline.vae.decode if decode is None else decode
        if not plain:
            align(self.unet)

    @torch.no_grad()
    def latents(
        self, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float, size: tuple[int, int]
    ) -> torch.Tensor:
        """Return latents [pictures, channels, h, w] of all prompts, the reference first; `size` is (width, height)."""
        pipe, device, dtype = self.pipeline, self.unet.device, self.unet.dtype
        full, null, full_pooled, null_pooled = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=True)
        width, height = size
        conditions = {
            "text_embeds": torch.cat([null_pooled, full_pooled]).to(device, dtype),
            "time_ids": torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=dtype).repeat(
                2 * len(prompts), 1
            ),
        }
        text = torch.cat([null, full]).to(device, dtype)

        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps, device=device)
        scale = pipe.vae_scale_factor
        shape = (self.unet.config.in_channels, height // scale, width // scale)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        latents = (torch.stack(noise) * scheduler.init_noise_sigma).to(device, dtype)
        for timestep in scheduler.timesteps:
            batch = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
            null, full = self.call(
                batch, timestep, encoder_hidden_states=text, added_cond_kwargs=conditions, return_dict=False
            )[0].chunk(2)
            prediction = null + guidance * (full - null)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return latents

    @torch.no_grad()
    def images(self, prompts: Sequence[str], seeds: Sequence[int], **options) -> list:
        """Return float arrays [height, width, 3] in 0..1 of all prompts; options as for `latents`."""
        vae = self.pipeline.vae
        latents = self.latents(prompts, seeds, **options).to(vae.dtype) / vae.config.scaling_factor
        images = (self.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
        return list(images.permute(0, 2, 3, 1).float().cpu().numpy())
