"""A small network that says what a picture of the embedded model's world shows: content, style and palette.

It is trained on rendered pictures only, never on generated ones, so that generated pictures are judged by the
standard of the drawings.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stylefast import values
from stylefast.errors import ImageError, ModelFormatError, ModelNotFound
from stylefast.models.stored_tensors import StoredTensors

SIZE = 64
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


def load_classifier(path: str | Path | None = None) -> PictureClassifier:
    """Load the classifier in `path`, by default the embedded model's, in fp32 and evaluation mode.

    Raises `ModelNotFound` where no file is and `ModelFormatError` where it is another kind of file.
    """
    if path is None:
        path = Path(__file__).resolve().parent.parent / "models" / "tiny" / "classifier.safetensors"
    if not Path(path).is_file():
        raise ModelNotFound(f"no classifier at {path}; make it: `python -m stylefast.training.tiny --stage classifier`")
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
