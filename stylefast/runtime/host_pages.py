"""Pages of style banks in pinned host memory: between the bank's file and the device.

A device reads pinned memory at the full rate of the bus and while it computes; ordinary memory it can't. Background
threads bring pages from the file (or from ordinary memory) into pinned blocks some steps before they are wanted, and
blocks that are wanted again, by the next picture in the same style, are still there.
"""

from collections.abc import Sequence

import numpy as np
import torch

from stylefast.errors import StyleError
from stylefast.runtime.copy_engine import CopyEngine, Ticket
from stylefast.runtime.page_layout import PageLayout
from stylefast.runtime.page_pool import PagePool, PoolFull
from stylefast.styles.bank import StyleBank

_THREADS = 4


class HostPages:
    """`blocks` blocks of `block_bytes`, filled in the background. Not thread-safe: one thread asks.

    pinned: page-locked, as devices want them; False for tests on machines without one.
    """

    def __init__(self, blocks: int, block_bytes: int, pinned: bool):
        self._blocks = torch.empty(blocks, block_bytes, dtype=torch.uint8, pin_memory=pinned)
        self._pool, self._engine = PagePool(blocks), CopyEngine(threads=_THREADS)
        self._tickets: dict[int, Ticket] = {}  # of blocks that are being filled

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self._blocks.numel()

    def stats(self):
        """What the pool of blocks holds."""
        return self._pool.stats()

    def stage(self, keys: np.ndarray, banks: Sequence[StyleBank], places: Sequence[tuple], layout: PageLayout) -> None:
        """Start to bring pages that will be wanted, as far as there is room: keys [n, 4], their banks and places."""
        self._settle()
        claim = self._pool.prefetch(keys)
        for i in np.flatnonzero(claim.claimed):
            self._start(int(claim.slots[i]), banks[i], places[i], layout)

    def hold(self, key: np.ndarray, bank: StyleBank, place: tuple, layout: PageLayout) -> torch.Tensor | None:
        """Pin a page and return its block [nbytes of the layout], waiting for it; None where there is no room.

        `release` it when the device has read it. Raises StyleError for a bank whose file can't be read or was written
        to meanwhile.
        """
        self._settle()
        try:
            claim = self._pool.acquire(key[None])
        except PoolFull:
            return None
        slot = int(claim.slots[0])
        if claim.claimed[0]:
            self._start(slot, bank, place, layout)
        ticket = self._tickets.pop(slot, None)
        if ticket is not None:
            ticket.wait()
            try:
                ticket.check()
            except BaseException:
                self._pool.failed(np.array([slot]))
                self._pool.release(key[None])
                raise
            self._pool.filled(np.array([slot]))
        return self._blocks[slot, : layout.nbytes]

    def release(self, key: np.ndarray) -> None:
        """Unpin a page."""
        self._pool.release(key[None])

    def drop(self, style: int) -> None:
        """Forget the pages of a bank."""
        self._settle()
        self._pool.drop(style)

    def close(self) -> None:
        """Stop the threads."""
        self._engine.close()

    def _start(self, slot: int, bank: StyleBank, place: tuple, layout: PageLayout) -> None:
        try:
            parts = layout.split(self._blocks[:, : layout.nbytes])
            self._tickets[slot] = self._engine.copy(*layout.copies(bank, place, parts, slot))
        except BaseException:
            self._pool.failed(np.array([slot]))
            raise

    def _settle(self) -> None:
        """Report what the threads have finished."""
        for slot in [slot for slot, ticket in self._tickets.items() if ticket.done]:
            ticket = self._tickets.pop(slot)
            try:
                ticket.check()
            except StyleError:
                self._pool.failed(np.array([slot]))  # whoever wants the page reads it again, and gets the error
            else:
                self._pool.filled(np.array([slot]))
