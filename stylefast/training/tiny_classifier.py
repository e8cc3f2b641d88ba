"""Stage 2: the classifier that scores the tiny model, trained on freshly rendered pictures of every combination."""

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from stylefast.evaluation.classifier import PictureClassifier, classify, load_classifier, save_classifier
from stylefast.training.pictures import CONTENTS, PALETTES, render
from stylefast.training.tiny_data import ALL_STYLES
from stylefast.training.tiny_vae import to_tensor


def rendered(seed: int, count: int) -> tuple[np.ndarray, torch.Tensor]:
    """`count` pictures uint8 `[n, 64, 64, 3]` over all contents, 13 styles and palettes, with labels `[n, 3]`."""
    rng = np.random.default_rng(seed)
    sizes = (len(CONTENTS), len(ALL_STYLES), len(PALETTES))
    labels = np.stack([rng.integers(0, size, count) for size in sizes], 1)
    pictures = np.stack([render(rng, CONTENTS[c], ALL_STYLES[s], PALETTES[p]) for c, s, p in labels])
    return pictures, torch.from_numpy(labels)


def _augment(pictures: torch.Tensor) -> torch.Tensor:
    """Blur some, shift all by up to 3 pixels, and add grain, so that autoencoder artefacts don't decide."""
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = torch.rand(len(pictures), 1, 1, 1) * (torch.rand(len(pictures), 1, 1, 1) < 0.5)
    pictures = torch.lerp(pictures, blurred, amount)
    shift = torch.randint(0, 7, (2,)).tolist()
    padded = F.pad(pictures, (3, 3, 3, 3), mode="replicate")
    pictures = padded[:, :, shift[0] : shift[0] + 64, shift[1] : shift[1] + 64]
    return pictures + torch.randn_like(pictures) * 0.15 * torch.rand(len(pictures), 1, 1, 1)


def accuracy(classifier: PictureClassifier, pictures: np.ndarray, labels: torch.Tensor) -> dict[str, float]:
    """Share of pictures whose content, style and palette are named right."""
    verdict = classify(classifier, pictures)
    kinds = ("content", "style", "palette")
    hits = {kind: getattr(verdict, kind).argmax(1) == labels[:, i] for i, kind in enumerate(kinds)}
    return {kind: right.float().mean().item() for kind, right in hits.items()}


def train_classifier(out: Path, minutes: float, seed: int = 3) -> dict:
    """Train, write `out/classifier.safetensors`, and return the record with accuracies on unseen drawings."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pictures, labels = rendered(seed, 16_000)
    classifier = PictureClassifier(CONTENTS, ALL_STYLES, PALETTES).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.02)
    start, step, budget = time.time(), 0, 60 * minutes
    while (elapsed := time.time() - start) < budget:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * elapsed / budget)) + 1e-6
        chosen = rng.integers(0, len(pictures), 64)
        x = _augment(to_tensor(pictures[chosen])).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = classifier(x)
        loss = sum(F.cross_entropy(part.float(), labels[chosen, i]) for i, part in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"classifier {elapsed:.0f}s step {step} loss {loss.item():.4f}", flush=True)
    wall = round((time.time() - start) / 60, 2)
    save_classifier(classifier, out / "classifier.safetensors")
    scores = accuracy(load_classifier(out / "classifier.safetensors"), *rendered(seed + 1000, 1500))
    return dict(minutes=wall, steps=step, pictures=64 * step, accuracy={k: round(v, 4) for k, v in scores.items()})
