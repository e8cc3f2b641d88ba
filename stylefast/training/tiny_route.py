"""Stage 4: teach the style block to carry style, as SDXL's does.

Left to itself, a UNet this small reads style words mostly from the pooled embedding, and nothing that enters
`up_blocks.0.attentions.1` alone moves its style: there would be nothing for InstantStyle to gate. So a last part of the
training gives each half of its steps plain captions, and in the other half one prompt per layer: the style block reads
the full caption, every other layer and the pooled embedding the content only. Text to image in both; no pictures, no
shared attention. The text encoders stay as they are.
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from stylefast.training.captions import content_caption, single_caption
from stylefast.training.muon import Muon
from stylefast.training.pictures import CONTENTS, PALETTES, STYLES
from stylefast.training.tiny_text import load_text_tower
from stylefast.training.tiny_unet import (
    LATE_MIX,
    BatchSource,
    cumulative_alphas,
    lifted_weights,
    noise_errors,
    predict_noise,
    stratified_timesteps,
    unet_optimizers,
    validation_loss,
)

STYLE_BLOCK = "up_blocks.0.attentions.1"


class LayerPrompt:
    """Cross-attention that reads `states` `[rows, tokens, 128]` instead of the common prompt while they are set."""

    states: torch.Tensor | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **_):
        if self.states is not None:
            encoder_hidden_states = self.states
        projected = (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in projected)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def install_layer_prompt(unet) -> LayerPrompt:
    """Give the style block's cross-attention a prompt of its own; returns the switch."""
    prompt = LayerPrompt()
    processors = unet.attn_processors
    for name in processors:
        if name.startswith(STYLE_BLOCK) and name.endswith("attn2.processor"):
            processors[name] = prompt
    unet.set_attn_processor(processors)
    return prompt


def _routed_errors(unet, prompt, tower, rng, latents, labels, timesteps, noise, alphas) -> torch.Tensor:
    names = [(CONTENTS[c], STYLES[s], PALETTES[p]) for c, s, p in labels.tolist()]
    signal = alphas[timesteps][:, None, None, None]
    noisy = (signal.sqrt() * latents + (1 - signal).sqrt() * noise).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            states, pooled = tower([content_caption(rng, name[0]) for name in names])
            prompt.states = tower([single_caption(rng, *name) for name in names])[0]
        predicted = predict_noise(unet, noisy, timesteps, states, pooled).float()
    prompt.states = None
    return (predicted - noise).square().mean((1, 2, 3))


def train_route(work: Path, out: Path, minutes: float, seed: int = 6) -> dict:
    """Train the UNet of `out` further and save its averaged weights there; returns the record."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    train = torch.load(work / "train.pt", weights_only=True)
    held = torch.load(work / "validation.pt", weights_only=True)
    source, alphas = BatchSource(train["latents"], train["labels"], seed), cumulative_alphas()
    tower = load_text_tower(out).requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(out / "unet").float().train().to(memory_format=torch.channels_last)
    prompt = install_layer_prompt(unet)
    parameters = list(unet.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizers = unet_optimizers(unet)
    start, step, plain, routed, budget = time.time(), 0, [], [], 60 * minutes
    while (elapsed := time.time() - start) < budget:
        decay = 0.5 * (1 + math.cos(math.pi * elapsed / budget))
        for optimizer in optimizers:
            rate = 0.008 if isinstance(optimizer, Muon) else 4e-4
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 30) * max(decay, 0.01)
        if step % 5 < 2:
            batch = source.draw_mixed(LATE_MIX)
            timesteps = stratified_timesteps(len(batch.captions))
            errors = noise_errors(unet, tower, batch, timesteps, torch.randn_like(batch.latents), alphas)
            record = plain
        else:
            chosen, timesteps = torch.randint(0, len(train["labels"]), (64,)), stratified_timesteps(64)
            given = (train["latents"][chosen], train["labels"][chosen], timesteps, torch.randn(64, 4, 16, 16))
            errors = _routed_errors(unet, prompt, tower, source.rng, *given, alphas)
            record = routed
        loss = (lifted_weights(alphas[timesteps]) * errors).mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        record.append(loss.item())
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.data for p in parameters], 1 - min(0.99, (1 + step) / (10 + step)))
        if step % 50 == 0:
            tail = [sum(part[-30:]) / len(part[-30:]) for part in (plain, routed)]
            print(f"route {elapsed:.0f}s step {step} plain {tail[0]:.4f} routed {tail[1]:.4f}", flush=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    unet.set_default_attn_processor()
    unet.eval()
    loss = validation_loss(unet, tower, held["latents"], held["labels"], alphas)
    unet.to(memory_format=torch.contiguous_format).half().save_pretrained(out / "unet")
    wall = round((time.time() - start) / 60, 2)
    ends = [round(sum(part[-30:]) / len(part[-30:]), 4) for part in (plain, routed)]
    return dict(minutes=wall, steps=step, validation_loss=round(loss, 4), loss_plain=ends[0], loss_routed=ends[1])
