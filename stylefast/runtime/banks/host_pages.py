"""Pages of style banks in pinned host memory, between the bank's file and the device.

A device can read pinned memory at the bus's full rate and while it computes, which ordinary memory does not allow.
Background threads load pages from the file (or from ordinary memory) into pinned blocks some steps before they are
used, and keep blocks that the next picture in the same style can reuse.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch

from stylefast.runtime.banks.copies import start_copies
from stylefast.runtime.banks.page_layout import PageLayout
from stylefast.runtime.banks.page_pool import PagePool, PoolFull
from stylefast.styles.bank import StyleBank

logger = logging.getLogger(__name__)

_THREADS = 4
# bytes of a chunk, unless a single block is larger
_MOST_CHUNK = 2**30


def chunk_of(block_bytes: int, room: int, pinned: bool) -> tuple[int, int]:
    """Return (blocks, bytes) of the chunks in which pinned memory is allocated; (0, 0) if none fits into `room` bytes.

    PyTorch rounds pinned allocations up to a power of two, so the number of blocks per chunk is chosen to waste least.
    """
    found, best, count = (0, 0), 0.0, 0
    while True:
        count += 1
        used = count * block_bytes
        held = 1 << (used - 1).bit_length() if pinned else used
        if held > room or count > 1 and held > _MOST_CHUNK:
            return found
        if used / held > best:
            found, best = (count, held), used / held


class HostPages:
    """Blocks of `block_bytes`, as many as fit into `room` bytes, filled in the background. For use by one thread.

    Memory is allocated one chunk at a time, when its first block is needed: page-locking takes a second per few
    gigabytes, and a service whose styles fit on the device needs none. pinned: page-locked, for devices; False for
    tests on machines without one.
    """

    def __init__(self, room: int, block_bytes: int, pinned: bool):
        self._block_bytes, self._pinned = block_bytes, pinned
        self._in_chunk, self._chunk_bytes = chunk_of(block_bytes, room, pinned)
        count = room // self._chunk_bytes if self._in_chunk else 0
        self._chunks: list[torch.Tensor | None] = [None] * count
        self._refused = False  # the system refused to pin more
        self.blocks = count * self._in_chunk
        self._pool, self._executor = PagePool(self.blocks), ThreadPoolExecutor(_THREADS, "stylefast-pages")
        self._loads: dict[int, list[Future[None]]] = {}  # by the slot that they fill

    @property
    def nbytes(self) -> int:
        """Return the bytes of the chunks allocated so far."""
        return self._chunk_bytes * sum(chunk is not None for chunk in self._chunks)

    def stats(self):
        """Return the statistics of the block pool."""
        return self._pool.stats()

    def stage(self, keys: np.ndarray, banks: Sequence[StyleBank], places: Sequence[tuple], layout: PageLayout) -> None:
        """Start loading pages that will be needed, if there is room: keys [n, 4], their banks and places."""
        self._settle()
        claim = self._pool.prefetch(keys)
        for i in np.flatnonzero(claim.claimed).tolist():
            slot = int(claim.slots[i])
            if self._taken(slot):
                self._start(slot, banks[i], places[i], layout)
            else:
                self._pool.failed(np.array([slot]))

    def hold(self, key: np.ndarray, bank: StyleBank, place: tuple, layout: PageLayout) -> torch.Tensor | None:
        """Pin a page, wait for it, and return its block [nbytes of the layout]; None if there is no room.

        Call `release` when the device has read it. Raises StyleError if the bank's file can't be read or was modified
        meanwhile.
        """
        self._settle()
        try:
            claim = self._pool.acquire(key[None])
        except PoolFull:
            return None
        slot = int(claim.slots[0])
        if claim.claimed[0] and not self._taken(slot):
            self._pool.failed(np.array([slot]))
            self._pool.release(key[None])
            return None
        if claim.claimed[0]:
            self._start(slot, bank, place, layout)
        if slot in self._loads:
            wait(self._loads[slot])
            error = self._end(slot)
            if error is not None:
                self._pool.release(key[None])
                raise error
        return self._of(slot, layout)[0]

    def release(self, key: np.ndarray) -> None:
        """Unpin a page."""
        self._pool.release(key[None])

    def drop(self, style: int) -> None:
        """Forget the pages of a bank."""
        self._settle()
        self._pool.drop(style)

    def close(self) -> None:
        """Finish the loads that were started, and end the threads."""
        self._executor.shutdown()

    def _start(self, slot: int, bank: StyleBank, place: tuple, layout: PageLayout) -> None:
        try:
            parts = layout.split(self._of(slot, layout))
            self._loads[slot] = start_copies(self._executor, *layout.copies(bank, place, parts, 0))
        except BaseException:
            self._pool.failed(np.array([slot]))
            raise

    def _of(self, slot: int, layout: PageLayout) -> torch.Tensor:
        """Return a block [1, nbytes of the layout]."""
        chunk, place = divmod(slot, self._in_chunk)
        memory = self._chunks[chunk]
        assert memory is not None
        return memory[place : place + 1, : layout.nbytes]

    def _taken(self, slot: int) -> bool:
        """Return whether a block has memory; allocate its chunk if this is the first block of it."""
        chunk = slot // self._in_chunk
        if self._chunks[chunk] is None and not self._refused:
            try:
                self._chunks[chunk] = torch.empty(
                    self._in_chunk, self._block_bytes, dtype=torch.uint8, pin_memory=self._pinned
                )
            except RuntimeError as error:
                self._refused = True
                logger.warning(
                    "only %.1f GiB of host memory could be pinned for style banks, of the %.1f GiB allowed; "
                    "further pages are read directly from their banks, which is slower (%s)",
                    self.nbytes / 2**30,
                    self._chunk_bytes * len(self._chunks) / 2**30,
                    str(error).splitlines()[0],
                )
        return self._chunks[chunk] is not None

    def _settle(self) -> None:
        """Record finished loads in the pool; the next `hold` of a page that failed reads it again and raises."""
        for slot in [slot for slot, loads in self._loads.items() if all(load.done() for load in loads)]:
            self._end(slot)

    def _end(self, slot: int) -> BaseException | None:
        """Record a finished load in the pool, and return its error."""
        errors = [error for load in self._loads.pop(slot) if (error := load.exception()) is not None]
        (self._pool.failed if errors else self._pool.filled)(np.array([slot]))
        return errors[0] if errors else None
