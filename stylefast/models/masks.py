"""Masks that limit an image prompt to parts of the picture, converted to one weight per attention query."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from stylefast import values
from stylefast.errors import ImageError, InvalidRequest
from stylefast.models.pictures import BLACK, PictureSource, open_picture, say_once
from stylefast.slots import Slots


def load_mask(mask: PictureSource | torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Load a mask as zeros and ones `[height, width]`: white is active, black and transparent are not.

    The threshold is mid grey. `size` is (height, width) of the picture to make; a mask of another size is scaled to it
    (Lanczos, as in diffusers' `IPAdapterMaskProcessor`). Arrays may hold bools, uint8, uint16 or floats in [0, 1].
    A tensor `[height, width]` in [0, 1] is used unchanged, soft edges included; it must already have the right size.
    Warns if the mask is inactive everywhere. Raises ImageError.
    """
    if isinstance(mask, torch.Tensor):
        return _check_tensor(mask, size)
    grey = open_mask(mask).convert("L")
    if size is not None and grey.size != (size[1], size[0]):
        grey = grey.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    shades = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(grey.height, grey.width)
    acting = (shades.float() / 255 >= 0.5).float()
    if not acting.any():
        say_once(f"a mask of {grey.width}x{grey.height} is dark or transparent everywhere; its picture has no effect")
    return acting


def open_mask(mask: PictureSource) -> Image.Image:
    """Open a mask other than a tensor as an RGB picture, with transparent parts black. Raises ImageError."""
    picture = open_picture(mask, BLACK)
    if isinstance(mask, np.ndarray) and mask.dtype.kind == "u" and mask.max() == 1:
        raise ImageError(
            f"the mask is an array of {mask.dtype} with only 0 and 1, but white is {np.iinfo(mask.dtype).max}; pass "
            "mask.astype(bool)"
        )
    return picture


def mask_vectors(mask: PictureSource | torch.Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """Return the mask's weight at every attention query: a float32 vector `[h * w]` per feature map (h, w) in `sizes`.

    `mask` is anything `load_mask` accepts, at the resolution and aspect of the picture to make. Equal to diffusers'
    `IPAdapterMaskProcessor.downsample`: bicubic without antialiasing, which reads 4 x 4 pixels per query, so hard
    edges overshoot to about -0.1 and 1.1 and regions thinner than a query can vanish. Unlike in diffusers, h and w are
    given, not guessed from the mask's aspect. Raises ImageError and InvalidRequest.
    """
    grid = load_mask(mask)[None, None]
    for size in sizes:
        if len(size) != 2 or min(size) < 1:
            raise InvalidRequest(f"a feature map needs a height and a width of at least 1, not {tuple(size)}")
    return tuple(F.interpolate(grid, size=tuple(size), mode="bicubic", align_corners=False).flatten() for size in sizes)


def check_mask_shape(mask: PictureSource | torch.Tensor, size: Sequence[int]) -> None:
    """Raise ImageError for a tensor that is not (height, width) in size; other masks are scaled to it."""
    if not isinstance(mask, torch.Tensor):
        return
    if mask.ndim != 2 or mask.numel() == 0:
        raise ImageError(f"a mask tensor must have the shape [height, width], not {list(mask.shape)}")
    if tuple(mask.shape) != tuple(size):
        raise ImageError(
            f"the mask is {mask.shape[0]} x {mask.shape[1]}, the picture {size[0]} x {size[1]} (height x width); "
            "make them equal, or pass the mask as a picture, which is scaled"
        )


class MaskTable:
    """Masks of one latent size, per attention level [masks, tokens], in reusable places."""

    def __init__(self, sizes: Sequence[tuple[int, int]], device: torch.device):
        self.sizes, self.generation, self._slots = list(sizes), 0, Slots()
        self.levels = tuple(torch.zeros(0, h * w, device=device) for h, w in sizes)

    def add(self, vectors: Sequence[torch.Tensor]) -> int:
        """Store a mask, per level [tokens]; return its number."""
        if not self._slots.free:
            before = len(self.levels[0])
            count = max(4, 2 * before)
            self.levels = tuple(torch.cat([x, x.new_zeros(count - before, x.shape[1])]) for x in self.levels)
            self._slots.grow(count)
            self.generation += 1
        (place,) = self._slots.take(1)
        for level, vector in zip(self.levels, vectors, strict=True):
            level[place] = vector.to(level)
        return place

    def release(self, places: Sequence[int]) -> None:
        """Release masks."""
        self._slots.release(places)


def _check_tensor(mask: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    # checked first, since nested tensors don't have a shape
    values.dense_tensor("a mask", mask, error=ImageError)
    check_mask_shape(mask, mask.shape if size is None else size)
    if mask.is_complex():
        raise ImageError(f"a mask must have real numbers, not {mask.dtype}")
    mask = mask.detach().float().cpu()
    low, high = mask.min().item(), mask.max().item()
    # phrased so that NaN fails too
    if not (low >= 0 and high <= 1):
        raise ImageError(f"a mask must have values in [0, 1]; this one has {low:g} to {high:g}")
    return mask
