"""Pictures larger than the model draws well, made of windows that overlap: MultiDiffusion.

Bar-Tal, Yariv, Lipman, Dekel, "MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation", 2023 (arXiv
2302.08113): every window of the large picture makes a step of its own, and then the windows agree on the mean of what
they made wherever they overlap.

Here each window is a sample of the model's own size in one group, so windows are rows of the batch like any others,
read references, and share UNet calls with other requests. The sampler's memory of earlier steps is averaged as well.
Its updates are sums, so this is the mean of the windows' predictions, for samplers of any order.
"""

from typing import Any

import torch
from torch import Tensor

from stylefast.errors import InvalidRequest

MAX_WINDOWS = 256
_STATES = ("latents", "anchor", "history")  # of `LatentSlots`


def window_stride(window: tuple[int, int], stride: int | None) -> int:
    """Return the distance between windows of (width, height): by default a quarter of the smaller side."""
    return max(8, min(window) // 4 // 8 * 8) if stride is None else stride


def starts(length: int, window: int, stride: int, wrap: bool) -> list[int]:
    """Return where windows begin along a side of `length`, so that they cover it; with `wrap`, around its end."""
    if wrap:
        return list(range(0, length, stride))
    found = list(range(0, length - window + 1, stride))
    return found if found[-1] == length - window else [*found, length - window]


def window_count(size: tuple[int, int], window: tuple[int, int], stride: int, wrap: bool) -> int:
    """Return the number of windows of a picture. Raises InvalidRequest if there are too many."""
    count = len(starts(size[0], window[0], stride, wrap)) * len(starts(size[1], window[1], stride, False))
    if count > MAX_WINDOWS:
        raise InvalidRequest(
            f"a picture of {size[0]}x{size[1]} pixels has {count} windows of {window[0]}x{window[1]} at a stride of "
            f"{stride}; at most {MAX_WINDOWS} are allowed, so give a larger window_stride or window"
        )
    return count


class Windows:
    """The windows of one picture's latents.

    shape: (channels, height, width) of the whole; window: (height, width) of each; wrap: whether the left and right
    edge are neighbours.
    """

    def __init__(self, shape: tuple[int, int, int], window: tuple[int, int], stride: int, wrap: bool):
        self.shape, self._window = shape, window
        _, height, width = shape
        y = torch.tensor(starts(height, window[0], stride, False))[:, None] + torch.arange(window[0])
        x = torch.tensor(starts(width, window[1], stride, wrap))[:, None] + torch.arange(window[1])
        places = y[:, None, :, None] * width + (x % width)[None, :, None, :]
        self._places = places.flatten(0, 1).flatten(1)  # [windows, pixels of one]: places in the whole
        self._count = torch.bincount(self._places.flatten(), minlength=height * width)

    def __len__(self) -> int:
        return len(self._places)

    def cut(self, whole: Tensor) -> Tensor:
        """Return the windows [windows, ..., h, w] of latents [..., height, width]."""
        found = whole.flatten(-2)[..., self._places.to(whole.device)]
        return found.movedim(-2, 0).unflatten(-1, self._window)

    def join(self, windows: Tensor) -> Tensor:
        """Return latents [..., height, width]: windows [windows, ..., h, w], averaged where they overlap."""
        parts = windows.flatten(-2).movedim(0, -2).flatten(-2)
        whole = parts.new_zeros(*parts.shape[:-1], self.shape[1] * self.shape[2])
        whole.index_add_(-1, self._places.flatten().to(parts.device), parts)
        return (whole / self._count.to(parts.device)).unflatten(-1, self.shape[1:])

    def agree(self, state: Any, slots: Tensor) -> None:
        """Make the windows in these slots of a `LatentSlots` equal wherever they overlap."""
        for name in _STATES:
            buffer = getattr(state, name)
            buffer[slots] = self.cut(self.join(buffer[slots]))
