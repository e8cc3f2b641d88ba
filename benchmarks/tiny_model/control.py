"""Stage 9: a T2I-Adapter that follows edges, trained with everything else frozen.

The task is the published one (arXiv 2302.08453): reconstruct a picture from its edges and a caption. A third of the
pictures have no caption, so that the edges alone must say what is there. The adapter has no resnets: its maps are
linear in the picture, which keeps it at 0.1 MB, and the UNet makes of them what it can.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.tiny_model.captions import single_caption
from benchmarks.tiny_model.pictures import CONTENTS, PALETTES, STYLES, outlines, render
from benchmarks.tiny_model.text import load_text_tower
from benchmarks.tiny_model.unet import cumulative_alphas, lifted_weights, stratified_timesteps, time_ids
from stylefast.models.preprocessors import canny

PICTURES = 16_000
BATCH = 32
WITHOUT_CAPTION = 1 / 3
TEXTURED = 0.2  # share of the pictures with the edges of their texture


def training_pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, int]]]:
    """Draw pictures uint8 `[n, 3, 64, 64]`, their edges `[n, 1, 64, 64]` in 0 to 1, and (content, style, palette).

    Most edges are those of the objects alone, as a person would draw them; the others are the picture's own, with all
    of its style's texture.
    """
    rng = np.random.default_rng(seed)
    pictures, edges, labels = [], [], []
    for i in range(count):
        content, style, palette = i % len(CONTENTS), int(rng.integers(len(STYLES))), int(rng.integers(len(PALETTES)))
        own, shown = (np.random.default_rng([seed, i]) for _ in range(2))
        picture = render(own, CONTENTS[content], STYLES[style], PALETTES[palette])
        plain = outlines(shown, CONTENTS[content], PALETTES[palette])
        pictures.append(picture)
        edges.append(np.asarray(canny(picture if rng.random() < TEXTURED else plain).convert("L")))
        labels.append((content, style, palette))
    seen = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return seen, torch.from_numpy(np.stack(edges))[:, None].float() / 255, labels


def make_adapter(unet: torch.nn.Module) -> torch.nn.Module:
    """Return a diffusers `T2IAdapter` for the tiny model's UNet, whose maps begin small."""
    from diffusers import T2IAdapter

    wide = list(unet.config.block_out_channels)
    adapter = T2IAdapter(
        in_channels=1, channels=[*wide, wide[-1]], num_res_blocks=0, downscale_factor=8, adapter_type="full_adapter_xl"
    )
    with torch.no_grad():
        adapter.adapter.conv_in.weight.mul_(0.1)
    return adapter


def train_control(out: Path, minutes: float, seed: int = 9) -> dict:
    """Train `out/control/edges`; returns the record."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 1)
    pictures, edges, labels = training_pictures(PICTURES, seed)
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        clean = [vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in pictures.split(256)]
    latents = torch.cat(clean) * vae.config.scaling_factor
    unet = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float32)
    unet = unet.to(memory_format=torch.channels_last).requires_grad_(False)
    tower, alphas = load_text_tower(out).requires_grad_(False), cumulative_alphas()
    adapter = make_adapter(unet)
    parameters = list(adapter.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
    start, step, recent, budget = time.time(), 0, [], 60 * minutes
    while (elapsed := time.time() - start) < budget:
        for group in optimizer.param_groups:
            group["lr"] = 8e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * elapsed / budget)) + 1e-6
        chosen = torch.randint(0, len(latents), (BATCH,))
        timesteps, noise = stratified_timesteps(BATCH), torch.randn(BATCH, *latents.shape[1:])
        signal = alphas[timesteps][:, None, None, None]
        noisy = signal.sqrt() * latents[chosen] + (1 - signal).sqrt() * noise
        captions = [_caption(rng, labels[i]) for i in chosen.tolist()]
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                states, pooled = tower(captions)
            maps = adapter(edges[chosen])
            predicted = unet(
                noisy.contiguous(memory_format=torch.channels_last),
                timesteps,
                encoder_hidden_states=states,
                added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids(noisy)},
                down_intrablock_additional_residuals=list(maps),
            ).sample.float()
        loss = (lifted_weights(alphas[timesteps]) * (predicted - noise).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step, recent = step + 1, [*recent[-199:], loss.item()]
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.data for p in parameters], 1 - min(0.995, (1 + step) / (10 + step)))
        if step % 50 == 0:
            print(f"control {elapsed:.0f}s step {step} loss {sum(recent) / len(recent):.4f}", flush=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    adapter.half().save_pretrained(out / "control" / "edges")
    wall = round((time.time() - start) / 60, 2)
    return dict(minutes=wall, steps=step, pictures=step * BATCH, loss=round(sum(recent) / len(recent), 4))


def _caption(rng: np.random.Generator, label: tuple[int, int, int]) -> str | None:
    content, style, palette = label
    if rng.random() < WITHOUT_CAPTION:
        return None
    return single_caption(rng, CONTENTS[content], STYLES[style], PALETTES[palette])
