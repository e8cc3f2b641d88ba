"""Stage 3: the UNet and both text encoders, trained together as plain text to image.

A little over half of the work goes into single pictures, the rest into wide pictures of two or three panels that share
style and palette and whose captions mostly name contents only: self-attention is then the one way to learn of the
style, as it is between the objects of a photograph.
"""

import copy
import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.tiny_model.captions import full_caption, panel_caption, single_caption
from benchmarks.tiny_model.muon import Muon
from benchmarks.tiny_model.pictures import CONTENTS, PALETTES, STYLES
from benchmarks.tiny_model.text import HIDDEN, TextTower, build_text_encoders, build_tokenizer, load_text_tower

TRAIN_STEPS = 1000
UNET_CONFIG = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(64, 96, 128),
    layers_per_block=2,
    transformer_layers_per_block=(1, 1, 2),
    # diffusers reads this as the number of heads: 32 channels each
    attention_head_dim=(2, 3, 4),
    cross_attention_dim=2 * HIDDEN,
    use_linear_projection=True,
    norm_num_groups=16,
    addition_embed_type="text_time",
    addition_time_embed_dim=16,
    projection_class_embeddings_input_dim=HIDDEN + 6 * 16,
)
SCHEDULER_CONFIG = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="epsilon",
    timestep_spacing="leading",
    steps_offset=1,
)
# from this share of the budget on, high noise counts more: styles are decided there, by brightness and layout
_LIFT_FROM = 0.55
# (panels, pictures in a batch, share of the steps); a step costs about the same in each row
_MIX = ((1, 64, 0.55), (2, 32, 0.33), (3, 20, 0.12))
# from the same share of the budget on: among many noisy panels the others say more of the style than the own one does,
# so attention is worth listening to even at high noise
LATE_MIX = ((1, 64, 0.45), (2, 32, 0.15), (3, 20, 0.15), (5, 12, 0.25))
# share of the wide pictures that are described by the size of one panel, so that what attention learns between panels
# is not tied to wide pictures
_PANEL_SIZED = 0.5


def cumulative_alphas() -> torch.Tensor:
    """Signal power of each timestep, `[1000]`, as SDXL's schedule has it."""
    betas = torch.linspace(SCHEDULER_CONFIG["beta_start"] ** 0.5, SCHEDULER_CONFIG["beta_end"] ** 0.5, TRAIN_STEPS)
    return torch.cumprod(1 - betas.double() ** 2, 0).float()


def stratified_timesteps(count: int) -> torch.Tensor:
    """One uniform draw in each of `count` equal parts of the schedule, `[count]`."""
    return ((torch.arange(count) + torch.rand(count)) / count * TRAIN_STEPS).long().clamp(0, TRAIN_STEPS - 1)


def snr_weights(alphas: torch.Tensor, limit: float = 5.0) -> torch.Tensor:
    """Min-SNR weights of the epsilon loss: min(snr, limit) / snr."""
    snr = alphas / (1 - alphas)
    return snr.clamp(max=limit) / snr


def lifted_weights(alphas: torch.Tensor, limit: float = 8.0) -> torch.Tensor:
    """Min-SNR weights times 1 / sqrt(snr) where noise prevails (at most `limit`), towards a loss on the picture."""
    snr = alphas / (1 - alphas)
    return snr_weights(alphas) * snr.rsqrt().clamp(1.0, limit)


def time_ids(latents: torch.Tensor, panel_sized: torch.Tensor | None = None) -> torch.Tensor:
    """SDXL's micro-conditioning of uncropped pictures, `[rows, 6]`: (height, width, 0, 0, height, width) in pixels.

    Where `panel_sized` `[rows]` is true, the width is that of one square panel.
    """
    height = torch.full((len(latents),), 4.0 * latents.shape[2])
    width = torch.full((len(latents),), 4.0 * latents.shape[3])
    if panel_sized is not None:
        width = torch.where(panel_sized, height, width)
    zero = torch.zeros_like(height)
    return torch.stack([height, width, zero, zero, height, width], 1)


def predict_noise(unet, noisy, timesteps, states, pooled, panel_sized=None) -> torch.Tensor:
    """Return the UNet's output for noisy latents `[rows, 4, h, w]` under text states and pooled states of the rows."""
    added = dict(text_embeds=pooled, time_ids=time_ids(noisy, panel_sized))
    return unet(noisy, timesteps, encoder_hidden_states=states, added_cond_kwargs=added).sample


@dataclass(frozen=True)
class Batch:
    latents: torch.Tensor
    captions: list[str | None]


class BatchSource:
    """Source of captioned batches of latents, `[rows, 4, 16, 16 * panels]`."""

    def __init__(self, latents: torch.Tensor, labels: torch.Tensor, seed: int):
        self.latents, self.labels = latents, labels.tolist()
        self.rng = np.random.default_rng(seed)
        self.groups: dict[tuple[int, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, (content, style, palette) in enumerate(self.labels):
            self.groups[style, palette][content].append(index)

    def draw(self, panels: int, rows: int) -> Batch:
        if panels == 1:
            chosen = self.rng.integers(0, len(self.labels), rows)
            names = [self._names(index) for index in chosen]
            captions = [single_caption(self.rng, *name) for name in names]
            return Batch(self.latents[torch.from_numpy(chosen)], captions)
        latents, captions = [], []
        keys = list(self.groups)
        for _ in range(rows):
            style, palette = keys[self.rng.integers(len(keys))]
            group = self.groups[style, palette]
            contents = self.rng.choice(list(group), panels, replace=False)
            chosen = [group[content][self.rng.integers(len(group[content]))] for content in contents]
            latents.append(torch.cat([self.latents[index] for index in chosen], -1))
            names = [CONTENTS[content] for content in contents]
            captions.append(panel_caption(self.rng, names, STYLES[style], PALETTES[palette]))
        return Batch(torch.stack(latents), captions)

    def draw_mixed(self, mix=_MIX) -> Batch:
        panels, rows, _ = mix[self.rng.choice(len(mix), p=[share for _, _, share in mix])]
        return self.draw(panels, rows)

    def _names(self, index: int) -> tuple[str, str, str]:
        content, style, palette = self.labels[index]
        return CONTENTS[content], STYLES[style], PALETTES[palette]


def noise_errors(unet, tower, batch: Batch, timesteps, noise, alphas) -> torch.Tensor:
    """Squared error of the predicted noise for each picture of a batch, `[rows]`."""
    signal = alphas[timesteps][:, None, None, None]
    noisy = signal.sqrt() * batch.latents + (1 - signal).sqrt() * noise
    with torch.autocast("cpu", torch.bfloat16):
        states, pooled = tower(batch.captions)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        panel_sized = torch.rand(len(noisy)) < _PANEL_SIZED
        predicted = predict_noise(unet, noisy, timesteps, states, pooled, panel_sized).float()
    return (predicted - noise).square().mean((1, 2, 3))


@torch.no_grad()
def validation_loss(unet, tower, latents, labels, alphas, rows: int = 256) -> float:
    """Plain epsilon error on fully captioned validation pictures, at evenly spread timesteps and fixed noise."""
    noise = torch.randn(rows, *latents.shape[1:], generator=torch.Generator().manual_seed(5))
    timesteps = torch.arange(rows) * TRAIN_STEPS // rows
    names = [(CONTENTS[c], STYLES[s], PALETTES[p]) for c, s, p in labels[:rows].tolist()]
    batch = Batch(latents[:rows], [full_caption(*name) for name in names])
    parts = []
    for start in range(0, rows, 64):
        part = slice(start, start + 64)
        piece = Batch(batch.latents[part], batch.captions[part])
        parts.append(noise_errors(unet, tower, piece, timesteps[part], noise[part], alphas))
    return torch.cat(parts).mean().item()


def unet_optimizers(unet: nn.Module, tower: nn.Module | None = None) -> list[torch.optim.Optimizer]:
    """Muon for the UNet's matrices and convolutions, AdamW for its other parameters and the text encoders."""
    edges = ("conv_in", "conv_out", "embedding")
    matrices = [p for n, p in unet.named_parameters() if p.ndim >= 2 and not any(edge in n for edge in edges)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in (*unet.parameters(), *(tower.parameters() if tower else ())) if id(p) not in chosen]
    return [Muon(matrices, 0.02), torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]


def save_parts(out: Path, unet: nn.Module, tower: TextTower) -> None:
    """Write UNet, encoders and tokenizers into the model folder, in fp16."""
    parts = (("unet", unet), ("text_encoder", tower.first), ("text_encoder_2", tower.second))
    for name, module in parts:
        copy.deepcopy(module).to(memory_format=torch.contiguous_format).half().save_pretrained(out / name)
    # a fresh tokenizer, because a used one would also write down the padding of its last call
    for name in ("tokenizer", "tokenizer_2"):
        build_tokenizer().save_pretrained(out / name)


def train_unet(work: Path, out: Path, minutes: float, seed: int = 2, save_minutes: float = 10) -> dict:
    """Train on cached latents; save the averaged weights to `out`, also every `save_minutes`; returns the record.

    An interrupted training goes on from the last saved weights and `work/unet_progress.json`.
    """
    from diffusers import UNet2DConditionModel

    progress_path = work / "unet_progress.json"
    done = dict(minutes=0.0, step=0, pictures=0, panels=0, curve=[])
    if progress_path.exists():
        done = json.loads(progress_path.read_text())
    step, pictures, panels, curve = (done[name] for name in ("step", "pictures", "panels", "curve"))
    seed += step
    torch.manual_seed(seed)
    train = torch.load(work / "train.pt", weights_only=True)
    held = torch.load(work / "validation.pt", weights_only=True)
    source, alphas = BatchSource(train["latents"], train["labels"], seed), cumulative_alphas()
    tokenizer = build_tokenizer()
    if step:
        unet, tower = UNet2DConditionModel.from_pretrained(out / "unet").float().train(), load_text_tower(out).train()
    else:
        unet, tower = UNet2DConditionModel(**UNET_CONFIG), TextTower(tokenizer, *build_text_encoders(tokenizer))
    unet = unet.to(memory_format=torch.channels_last)
    parameters = [*unet.parameters(), *tower.parameters()]
    average = [p.detach().clone() for p in parameters]
    optimizers = unet_optimizers(unet, tower)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    @torch.no_grad()
    def swap() -> None:
        for parameter, value in zip(parameters, average, strict=True):
            kept = parameter.clone()
            parameter.copy_(value)
            value.copy_(kept)

    def report() -> float:
        swap()
        loss = validation_loss(unet, tower, held["latents"], held["labels"], alphas)
        swap()
        return round(loss, 4)

    start, first, recent, budget = time.time() - 60 * done["minutes"], step, [], 60 * minutes
    next_report, next_save = 60 * done["minutes"] + 120.0, 60 * (done["minutes"] + save_minutes)
    while (elapsed := time.time() - start) < budget:
        share = elapsed / budget
        decay = 1.0 if share < 0.35 else 0.5 * (1 + math.cos(math.pi * (share - 0.35) / 0.65))
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step - first + 1) / (50 if first else 150)) * max(decay, 0.002)
        late = share >= _LIFT_FROM
        batch = source.draw_mixed(LATE_MIX if late else _MIX)
        timesteps = stratified_timesteps(len(batch.captions))
        errors = noise_errors(unet, tower, batch, timesteps, torch.randn_like(batch.latents), alphas)
        weigh = lifted_weights if late else snr_weights
        loss = (weigh(alphas[timesteps]) * errors).mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step, pictures = step + 1, pictures + len(batch.captions)
        panels += batch.latents.shape[0] * batch.latents.shape[3] // 16
        recent = [*recent[-99:], errors.detach().mean().item()]
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.data for p in parameters], 1 - min(0.999, (1 + step) / (10 + step)))
        if elapsed > next_report:
            next_report = elapsed + (120 if elapsed < 600 else 300)
            curve.append(dict(minutes=round(elapsed / 60, 1), panels=panels, validation=report()))
            print(f"unet {elapsed:.0f}s step {step} train {np.mean(recent):.4f} {curve[-1]}", flush=True)
        if elapsed > next_save:
            next_save += 60 * save_minutes
            swap()
            save_parts(out, unet, tower)
            swap()
            done = dict(minutes=elapsed / 60, step=step, pictures=pictures, panels=panels, curve=curve)
            progress_path.write_text(json.dumps(done))
    swap()
    save_parts(out, unet, tower)
    progress_path.unlink(missing_ok=True)
    loss = round(validation_loss(unet, tower, held["latents"], held["labels"], alphas), 4)
    wall = round((time.time() - start) / 60, 2)
    return dict(minutes=wall, steps=step, pictures=pictures, panels=panels, validation_loss=loss, curve=curve)
