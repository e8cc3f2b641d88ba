"""Stage 1: the autoencoder, 64x64 pictures to 4x16x16 latents, each channel of zero mean and unit deviation."""

import math
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.tiny_model.data import load_pool

VAE_CONFIG = dict(
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(24, 48, 64),
    layers_per_block=1,
    norm_num_groups=8,
    latent_channels=4,
    sample_size=64,
    scaling_factor=1.0,
)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 `[n, height, width, 3]` to floats in -1..1, `[n, 3, height, width]`."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(vae, pictures: np.ndarray, batch: int = 200) -> torch.Tensor:
    """Posterior means `[n, 4, height / 4, width / 4]`."""
    latents = []
    for start in range(0, len(pictures), batch):
        x = to_tensor(pictures[start : start + batch]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(x).latent_dist.mean.float().contiguous())
    return torch.cat(latents)


@torch.no_grad()
def reconstruction_psnr(vae, pictures: np.ndarray) -> float:
    """Mean over pictures, in dB."""
    x = to_tensor(pictures)
    decoded = torch.cat([vae.decode(z).sample.clamp(-1, 1) for z in encode(vae, pictures).split(100)])
    error = ((decoded - x) / 2).pow(2).mean((1, 2, 3))
    return (-10 * torch.log10(error)).mean().item()


@torch.no_grad()
def standardise(vae, pictures: np.ndarray) -> None:
    """Fold the latents' channel means and deviations into `quant_conv` and `post_quant_conv`; pictures stay equal."""
    latents = encode(vae, pictures)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= deviation[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / deviation
    quant.bias[channels:] -= 2 * deviation.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= deviation[None, :, None, None]


def train_vae(work: Path, out: Path, minutes: float, seed: int = 1) -> dict:
    """Train, standardise, save to `out/vae` in fp16, and cache the pools' latents in `work`; returns the record."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pictures, validation = load_pool(work, "train").pictures, load_pool(work, "validation").pictures[:300]
    vae = AutoencoderKL(**VAE_CONFIG).to(memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    start, step, seen, reported, budget = time.time(), 0, 0.0, 0.0, minutes * 60
    while (elapsed := time.time() - start) < budget:
        share = elapsed / budget
        decay = 1.0 if share < 0.4 else 0.5 * (1 + math.cos(math.pi * (share - 0.4) / 0.6)) + 0.005
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 150) * decay
        # crops are cheap and teach texture; whole pictures at the end teach the middle block's attention its range
        crop, batch = (64, 12) if share > 0.85 else (32, 32)
        rows, columns = rng.integers(0, 65 - crop, 2)
        chosen = pictures[rng.integers(0, len(pictures), batch), rows : rows + crop, columns : columns + crop]
        x = to_tensor(chosen).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - x
        divergence = posterior.kl().float().mean() / (4 * crop * crop / 16)
        loss = error.abs().mean() + error.square().mean() + 1e-4 * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step, seen = step + 1, seen + batch * crop * crop / 4096
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(0.998, (1 + step) / (10 + step)))
        if elapsed - reported > 60:
            reported = elapsed
            print(f"vae {elapsed:.0f}s step {step} loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    vae.eval()
    standardise(vae, pictures[:4000])
    record = dict(minutes=(time.time() - start) / 60, steps=step, pictures=round(seen))
    vae = vae.to(memory_format=torch.contiguous_format).half()
    vae.save_pretrained(out / "vae")
    # the cached latents and the figure are those of the weights as shipped
    vae = vae.float().to(memory_format=torch.channels_last)
    record["validation_psnr"] = round(reconstruction_psnr(vae, validation), 2)
    for name in ("train", "validation", "unseen"):
        pool = load_pool(work, name)
        torch.save(dict(latents=encode(vae, pool.pictures), labels=torch.from_numpy(pool.labels)), work / f"{name}.pt")
    return record
