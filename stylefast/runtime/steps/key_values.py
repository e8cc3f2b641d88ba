"""Keys and values of prompts and pictures, in shared pages with reference counts.

Cross-attention's keys and values don't change between steps, nor between requests with equal prompts. So they are
computed once, kept in pages of buffers with fixed addresses (captured graphs and compiled regions read them by page
number), and dropped when they are unused and the room is needed. All layers of an attention level share one buffer, as
exported graphs require.
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch

from stylefast.models.layout import AttentionLayout
from stylefast.models.row_table import KeyValue
from stylefast.slots import LruDict, Slots

FIRST_PAGES = 8
# unused pages kept for the next request with the same prompt or picture
IDLE_PAGES = 64


class KeyValuePages:
    """Pages of keys and values of all cross-attention layers, each with one row of `extra` numbers.

    `by_level[level]` is [layers of the level, 2, pages, tokens, heads, d], layers in registry order; `layers[i]` its
    contiguous views (k, v) [pages, tokens, heads, d]; `lengths` [pages] int64 the tokens in use; `extra` [pages,
    width]. All are replaced when the buffers grow, and `generation` increases. `uneven`: whether pages of unequal
    lengths have ever been stored.
    """

    def __init__(self, layout: AttentionLayout, tokens: int, extra: int, device: torch.device, dtype: torch.dtype):
        self._layout, self._device, self._dtype = layout, device, dtype
        self.tokens, self.generation, self.uneven = tokens, 0, False
        self._least = tokens  # the buffers are never shorter
        # called with the bytes of larger buffers before they are made; raises OutOfMemory
        self.check_room: Callable[[int], None] = lambda nbytes: None
        self._lengths = np.zeros(0, dtype=np.int64)  # `lengths` on the host
        self._keys: dict[int, Hashable] = {}
        self._page_of: dict[Hashable, int] = {}
        self._users: dict[int, int] = {}
        self._idle: LruDict[int, None] = LruDict()
        self._slots = Slots()
        self.by_level: tuple[torch.Tensor, ...] = ()
        self.layers: tuple[KeyValue, ...] = ()
        self.lengths = torch.zeros(0, dtype=torch.int64, device=device)
        self.extra = torch.zeros(0, extra, device=device, dtype=dtype)
        self._resize(FIRST_PAGES, tokens)

    def __len__(self) -> int:
        """Return the number of pages that fit."""
        return len(self.lengths)

    @property
    def used(self) -> int:
        """Count the pages in use."""
        return len(self._users)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all buffers."""
        buffers = [self.lengths, self.extra, *self.by_level]
        return sum(x.numel() * x.element_size() for x in buffers)

    def nbytes_with(self, tokens: int) -> int:
        """Return the bytes of keys and values if one page had `tokens` tokens."""
        return self._nbytes(len(self), max(tokens, self.tokens))

    def shrink(self) -> bool:
        """Forget unused pages of long texts, and make the buffers as short as those in use; return whether they were.

        No step may be running.
        """
        longest = max([self._least, *(int(self._lengths[page]) for page in self._users)])
        if longest >= self.tokens:
            return False
        for page in [page for page in self._idle if self._lengths[page] > longest]:
            self._forget(page)
        self._resize(len(self), longest)
        return True

    def find(self, key: Hashable) -> int | None:
        """Return the page of a key and add one user to it; None if the key is unknown."""
        page = self._page_of.get(key)
        if page is not None:
            self._idle.pop(page, None)
            self._users[page] = self._users.get(page, 0) + 1
        return page

    def add(
        self, keys: Sequence[Hashable], layers: Sequence[KeyValue | None], extra: torch.Tensor | None = None
    ) -> list[int]:
        """Store new pages, each with one user.

        layers: per layer (k, v) [n, tokens, heads, d], or None for layers that read zeros; extra: [n, width].
        Returns the n page numbers.
        """
        tokens = next(pair for pair in layers if pair is not None)[0].shape[1]
        if tokens != self.tokens:
            self.uneven = True  # longer ones leave those before them shorter than the buffers
        if tokens > self.tokens:
            self._resize(len(self), tokens)
        pages: list[int] = []
        try:
            for _ in keys:
                pages.append(self._take())
            index = torch.tensor(pages, device=self._device)
            for (k, v), pair in zip(self.layers, layers, strict=True):
                for buffer, values in zip((k, v), pair or (0, 0), strict=True):
                    buffer[index, :tokens] = values.to(buffer) if isinstance(values, torch.Tensor) else values
            self.lengths[index] = self._lengths[pages] = tokens
            if extra is not None:
                self.extra[index] = extra.to(self.extra)
        except BaseException:
            self._slots.release(pages)
            raise
        for key, page in zip(keys, pages, strict=True):
            self._keys[page], self._page_of[key], self._users[page] = key, page, 1
        return pages

    def any_shorter(self, pages: np.ndarray) -> bool:
        """Return whether one of these pages has fewer tokens than the buffers. Does not wait for the device."""
        return self.uneven and bool((self._lengths[pages] < self.tokens).any())

    def release(self, pages: Sequence[int]) -> None:
        """Remove one user from each page."""
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                del self._users[page]
                self._idle[page] = None
        for page in self._idle.beyond(IDLE_PAGES):
            self._forget(page)

    def _forget(self, page: int) -> None:
        del self._idle[page]
        del self._page_of[self._keys.pop(page)]
        self._slots.release([page])

    def _take(self) -> int:
        oldest = self._idle.oldest
        if not self._slots.free and oldest is not None:
            self._forget(oldest)
        if not self._slots.free:
            self._resize(2 * len(self), self.tokens)
        return self._slots.take(1)[0]

    def _nbytes(self, pages: int, tokens: int) -> int:
        numbers = sum(2 * layer.channels for layer in self._layout.layers)
        return numbers * pages * tokens * self._dtype.itemsize

    def _resize(self, pages: int, tokens: int) -> None:
        if self.by_level and (pages > len(self) or tokens > self.tokens):
            self.check_room(self._nbytes(pages, tokens))
        before, kept, packed = len(self), min(tokens, self.tokens), []
        layers: dict[int, KeyValue] = {}
        for level in range(self._layout.levels):
            members = self._layout.at_level(level)
            one = self._layout.layers[members[0]]
            shape = (len(members), 2, pages, tokens, one.heads, one.channels // one.heads)
            buffer = torch.zeros(shape, device=self._device, dtype=self._dtype)
            if before:
                buffer[:, :, :before, :kept] = self.by_level[level][:, :, :, :kept]
            packed.append(buffer)
            for place, i in enumerate(members):
                layers[i] = (buffer[place, 0], buffer[place, 1])
        lengths = self.lengths.new_ones(pages)
        extra = self.extra.new_zeros(pages, self.extra.shape[1])
        host = np.ones(pages, dtype=np.int64)
        host[:before] = self._lengths
        lengths[:before], extra[:before] = self.lengths, self.extra
        self.by_level, self.tokens = tuple(packed), tokens
        self.layers = tuple(layers[i] for i in range(len(layers)))
        self.lengths, self._lengths, self.extra = lengths, host, extra
        self._slots.grow(pages)
        self.generation += 1
