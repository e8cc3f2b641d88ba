"""The latents of all pictures of one size that are in progress, in slots of buffers with fixed addresses."""

import itertools
from collections.abc import Iterable

import numpy as np
import torch

# slot 0 holds no picture: idle rows of a padded batch read and write it
_FIRST_SLOTS = 2
# shared by all instances, so that no two buffers have the same generation
_generations = itertools.count(1)


class LatentSlots:
    """Buffers `latents`, `anchor` [slots, channels, h, w], `history` [slots, 2, channels, h, w]; `finite` [slots].

    All but `finite` are float32. They are replaced when they grow, and `generation` increases.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device):
        self.shape, self.generation, self._device = shape, next(_generations), device
        self.latents = torch.zeros(0, *shape, device=device)
        self.anchor = torch.zeros(0, *shape, device=device)
        self.history = torch.zeros(0, 2, *shape, device=device)
        self.finite = torch.ones(0, dtype=torch.bool, device=device)
        self._free: list[int] = []
        self._grow(_FIRST_SLOTS)

    @property
    def used(self) -> int:
        """Count the slots that hold a picture."""
        return len(self.latents) - 1 - len(self._free)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all buffers."""
        return sum(x.numel() * x.element_size() for x in (self.latents, self.anchor, self.history, self.finite))

    def take(self, latents: torch.Tensor) -> np.ndarray:
        """Put pictures [n, channels, h, w] into free slots; return their numbers [n] int64."""
        while len(self._free) < len(latents):
            self._grow(2 * len(self.latents))
        slots = self._free[: -len(latents) - 1 : -1]  # from the end, where the lowest are
        index = torch.tensor(slots, device=self._device)
        self.latents[index] = latents.to(self.latents)
        self.anchor[index], self.history[index], self.finite[index] = 0, 0, True
        # taken only after all writes succeeded
        del self._free[-len(latents) :]
        return np.array(slots, dtype=np.int64)

    def release(self, slots: Iterable[int]) -> None:
        """Release slots."""
        self._free += [int(slot) for slot in slots]
        self._free.sort(reverse=True)

    def _grow(self, count: int) -> None:
        before, grown = len(self.latents), {}
        for name in ("latents", "anchor", "history", "finite"):
            old = getattr(self, name)
            grown[name] = old.new_zeros(count, *old.shape[1:])
            grown[name][:before] = old
        # replace all or none, in case memory runs out
        for name, new in grown.items():
            setattr(self, name, new)
        self._free = sorted([*self._free, *range(max(before, 1), count)], reverse=True)
        self.generation = next(_generations)
