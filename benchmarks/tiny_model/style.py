"""Stage 7: the learned multi-stage style, six pictures of a style that the tiny model has never seen or read of."""

import time
from pathlib import Path

import torch

from benchmarks.tiny_model.pictures import CONTENTS, PALETTES, UNSEEN_STYLE
from benchmarks.tiny_model.text import build_tokenizer, load_text_tower
from benchmarks.tiny_model.unet import cumulative_alphas, lifted_weights, predict_noise
from stylefast.models.text import TextEncoder
from stylefast.styles.embeddings import StageEmbedding, save_embedding
from stylefast.styles.textual_inversion import InversionSettings, invert_style

PICTURES = 6
TEMPLATE = "a painting of a {content} in the style of <{name}>"


def train_style(work: Path, out: Path, settings: InversionSettings) -> dict:
    """Learn `out/styles/chalk.safetensors`; returns the record."""
    from diffusers import UNet2DConditionModel

    pool = torch.load(work / "unseen.pt", weights_only=True)
    # one picture of each of six contents, so that the caption can tell the content from the style
    chosen = [(pool["labels"][:, 0] == 2 * i).nonzero()[0].item() for i in range(PICTURES)]
    latents, labels = pool["latents"][chosen], pool["labels"][chosen]
    captions = [TEMPLATE.format(content=CONTENTS[content], name=UNSEEN_STYLE) for content in labels[:, 0].tolist()]
    unet = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float32)
    unet = unet.to(memory_format=torch.channels_last).requires_grad_(False).eval()
    tower = load_text_tower(out).requires_grad_(False)
    tokenizers = (build_tokenizer(), build_tokenizer())
    encoder = TextEncoder(tokenizers, (tower.first, tower.second), force_zeros=True)

    def predict(noisy, timesteps, hidden, pooled) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return predict_noise(unet, noisy.contiguous(memory_format=torch.channels_last), timesteps, hidden, pooled)

    start = time.time()
    alphas = cumulative_alphas()
    weights = lifted_weights(alphas)
    style, losses = invert_style(predict, encoder, latents, captions, alphas, UNSEEN_STYLE, settings, weights)
    wall = round((time.time() - start) / 60, 2)
    metadata = dict(style.metadata) | {
        "licence": "Apache-2.0",
        "base_model": "stylefast tiny",
        "resolution": "64x64",
        "palettes": ", ".join(PALETTES[palette] for palette in labels[:, 2].tolist()),
    }
    path = out / "styles" / f"{UNSEEN_STYLE}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_embedding(StageEmbedding(style.name, style.clip_l, style.clip_g, "eos", metadata), path)
    first, last = (sum(part) / len(part) for part in (losses[:25], losses[-25:]))
    return dict(minutes=wall, steps=settings.steps, loss_first=round(first, 4), loss_last=round(last, 4))
