"""ComfyUI's pictures, tensors [B, H, W, C] from 0 to 1, as files and as PIL images, and back."""

import io
from collections.abc import Iterable

import numpy
import torch
from PIL import Image


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Return the pictures of a tensor; an alpha channel is left out."""
    pixels = (images[..., :3].detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(one) for one in pixels]


def to_png(images: torch.Tensor) -> list[bytes]:
    """Return the pictures of a tensor as PNG files."""
    found = []
    for image in to_pil(images):
        content = io.BytesIO()
        image.save(content, "png")
        found.append(content.getvalue())
    return found


def from_pil(images: Iterable[Image.Image]) -> torch.Tensor:
    """Return pictures of one size as a tensor."""
    pixels = numpy.stack([numpy.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).float() / 255


def from_files(contents: Iterable[bytes]) -> torch.Tensor:
    """Return picture files of one size as a tensor."""
    return from_pil(Image.open(io.BytesIO(content)) for content in contents)
