"""Stage 3: a small network that names the content, style and palette of a picture, and scores the embedded model.

It is trained on rendered pictures only, never on generated ones, so that generated pictures are judged by the
standard of the drawings.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.tiny_model.data import ALL_STYLES
from benchmarks.tiny_model.pictures import CONTENTS, PALETTES, render
from benchmarks.tiny_model.vae import to_tensor
from stylefast import values
from stylefast.errors import ImageError, ModelFormatError, ModelNotFound
from stylefast.models.stored_tensors import StoredTensors

SIZE = 64
SHIPPED = Path(__file__).parent / "classifier.safetensors"
_WIDTHS = (24, 40, 72, 88)


class PictureClassifier(nn.Module):
    """Four strided stages, then one linear head over mean, maximum and a 4x4 map of the features."""

    def __init__(self, contents: tuple[str, ...], styles: tuple[str, ...], palettes: tuple[str, ...]):
        super().__init__()
        self.contents, self.styles, self.palettes = contents, styles, palettes
        stages, before = [], 3
        for index, width in enumerate(_WIDTHS):
            kernel = 5 if index == 0 else 3
            stages += [nn.Conv2d(before, width, kernel, 2, kernel // 2), nn.BatchNorm2d(width), nn.SiLU()]
            if index:
                stages += [nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.SiLU()]
            before = width
        self.features = nn.Sequential(*stages)
        self.summary = nn.Linear(2 * before, 96)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(96 + 16 * before, len(contents) + len(styles) + len(palettes))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits over contents, styles and palettes for pictures in -1..1, `[n, 3, 64, 64]`."""
        features = self.features(pictures)
        summary = F.silu(self.summary(torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)))
        logits = self.head(self.dropout(torch.cat([summary, features.flatten(1)], 1)))
        return logits.split([len(self.contents), len(self.styles), len(self.palettes)], 1)


@dataclass(frozen=True)
class Verdict:
    """Probabilities of the names in the order of the classifier's lists, each `[n, names]`."""

    content: torch.Tensor
    style: torch.Tensor
    palette: torch.Tensor


def save_classifier(classifier: PictureClassifier, path: str | Path) -> None:
    """Write weights in fp16 and the three lists of names as metadata."""
    from safetensors.torch import save_file

    names = {kind: json.dumps(getattr(classifier, kind)) for kind in ("contents", "styles", "palettes")}
    state = {name: value.detach().contiguous() for name, value in classifier.state_dict().items()}
    state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file(state, str(path), metadata=names)


def load_classifier(path: str | Path = SHIPPED) -> PictureClassifier:
    """Load the classifier in `path`, by default that of the repository, in fp32 and evaluation mode.

    Raises `ModelNotFound` where no file is and `ModelFormatError` where it is another kind of file.
    """
    if not Path(path).is_file():
        raise ModelNotFound(f"no classifier at {path}; make it: `python -m benchmarks tiny_model --stage classifier`")
    try:
        stored = StoredTensors(path)
        names = {
            kind: tuple(values.load_json(value, kind, kind=list))
            for kind, value in stored.header.metadata.items()
            if kind != "format"
        }
        classifier = PictureClassifier(**names)
        classifier.load_state_dict(dict(stored))
    except (ModelFormatError, TypeError, ValueError, RuntimeError) as error:
        raise ModelFormatError(f"{path} does not hold a picture classifier: {error}") from error
    return classifier.float().eval()


def _as_tensor(images) -> torch.Tensor:
    if not isinstance(images, np.ndarray | torch.Tensor):
        images = np.stack([np.asarray(image.convert("RGB")) for image in images])
    pictures = torch.as_tensor(np.ascontiguousarray(images) if isinstance(images, np.ndarray) else images)
    if pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise ImageError(f"pictures of shape {tuple(pictures.shape)}; expected [n, height, width, 3]")
    scale = 1.0 if pictures.is_floating_point() else 255.0
    pictures = pictures.float().permute(0, 3, 1, 2) / scale * 2 - 1
    if pictures.shape[2:] != (SIZE, SIZE):
        pictures = F.interpolate(pictures, (SIZE, SIZE), mode="area")
    return pictures


@torch.no_grad()
def classify(classifier: PictureClassifier, images) -> Verdict:
    """Judge pictures: a list of PIL images, or `[n, height, width, 3]` as uint8 or as floats in 0..1.

    Other sizes than 64 are resized by area. Raises `ImageError` on another shape.
    """
    logits = [classifier(part) for part in _as_tensor(images).split(128)]
    return Verdict(*(torch.cat(parts).softmax(1) for parts in zip(*logits, strict=True)))


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


def train_classifier(work: Path, minutes: float, seed: int = 3) -> dict:
    """Train, write `work/classifier.safetensors`, and return the record with accuracies on unseen drawings."""
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
    save_classifier(classifier, work / "classifier.safetensors")
    scores = accuracy(load_classifier(work / "classifier.safetensors"), *rendered(seed + 1000, 1500))
    return dict(minutes=wall, steps=step, pictures=64 * step, accuracy={k: round(v, 4) for k, v in scores.items()})
