"""Pictures that others begin with, and masks of what to repaint in them: scaled alike, to pixels and to latents."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from stylefast import values
from stylefast.errors import InvalidRequest
from stylefast.models.masks import load_mask, open_mask
from stylefast.models.pictures import PictureSource, open_picture, say_once

# pixels around a mask over which a repainted picture passes into the one that it began with
MARGIN = 8


def fit_picture(source: PictureSource, size: tuple[int, int]) -> torch.Tensor:
    """Open a picture, scaled to cover `size` (width, height) and cropped around its centre: [3, height, width] uint8.

    Raises ImageError.
    """
    return _bytes(ImageOps.fit(open_picture(source), size))


def fit_mask(mask: PictureSource | torch.Tensor, image: PictureSource, size: tuple[int, int]) -> torch.Tensor:
    """Return how much of each pixel is repainted, [height, width] in [0, 1]: white all, black and transparent nothing.

    A mask of another size is first scaled to its picture, then both are fitted to `size` alike; a tensor is used as it
    is. Raises ImageError.
    """
    if isinstance(mask, torch.Tensor):
        found = load_mask(mask, (size[1], size[0]))
    else:
        grey, full = open_mask(mask).convert("L"), open_picture(image).size
        if grey.size != full:
            grey = grey.resize(full, Image.Resampling.BILINEAR)
        found = _bytes(ImageOps.fit(grey, size))[0].float() / 255
    if not found.any():
        say_once("a mask is dark or transparent everywhere, so nothing is repainted; white is what changes")
    return found


def outpaint(
    picture: PictureSource, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """Put a picture on a larger canvas; return it and the mask of what is new, a request's `image` and `mask`.

    The new parts continue the picture's edges, mirrored, for the first steps to begin with.

    Args:
        left, top, right, bottom: pixels to add on each side, 0 to 8192; the sum of a side's should keep it divisible
            by 8.

    Raises InvalidRequest for other numbers, and if none is added; ImageError for a picture that can't be read.

    Examples:
        >>> canvas, mask = sf.outpaint(engine.references()["neon"], right=32)
        >>> canvas.size == mask.size
        True
    """
    added = {"left": left, "top": top, "right": right, "bottom": bottom}
    added = {name: values.whole_number(name, value, 0, 8192) for name, value in added.items()}
    if not any(added.values()):
        raise InvalidRequest("outpaint adds nothing; give left, top, right or bottom, in pixels")
    found, sides = open_picture(picture), list(added.values())
    pixels = np.pad(np.asarray(found), ((sides[1], sides[3]), (sides[0], sides[2]), (0, 0)), mode="symmetric")
    mask = Image.new("L", (pixels.shape[1], pixels.shape[0]), 255)
    mask.paste(0, (sides[0], sides[1], sides[0] + found.width, sides[1] + found.height))
    return Image.fromarray(pixels), mask


def resized(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return a picture [3, height, width] in [0, 1] scaled to `size` (width, height) by Lanczos' filter."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return _bytes(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)).float() / 255


class Kept(NamedTuple):
    """What a mask keeps of a picture."""

    picture: torch.Tensor  # [3, height, width] uint8
    mask: torch.Tensor  # [height, width] in [0, 1]: how much of a pixel is repainted

    def latents(self, latent_size: tuple[int, int]) -> torch.Tensor:
        """Return how much of each latent is repainted, [h, w]: the mean of its pixels."""
        return F.interpolate(self.mask[None, None], size=latent_size, mode="area")[0, 0]

    def put_back(self, made: torch.Tensor) -> torch.Tensor:
        """Return a made picture [3, height, width] in [0, 1] with what is kept of the first one's pixels.

        Further than `MARGIN` pixels from what is repainted, pixels are exactly those of the first picture.
        """
        half = MARGIN // 2
        # wider, then smoothed by as much, so that what is repainted stays whole
        wide = F.max_pool2d(self.mask[None, None], 2 * half + 1, stride=1, padding=half)
        smooth = F.avg_pool2d(F.pad(wide, [half] * 4, mode="replicate"), 2 * half + 1, stride=1)[0, 0]
        made = made.float().cpu()
        return torch.lerp(self.picture.float() / 255, made, torch.maximum(smooth, self.mask))


def _bytes(picture: Image.Image) -> torch.Tensor:
    found = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return found.view(picture.height, picture.width, -1).permute(2, 0, 1)
