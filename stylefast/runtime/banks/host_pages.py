"""Pages of style banks in pinned host memory, between the bank's file and the device.

A device can read pinned memory at the bus's full rate and while it computes, which ordinary memory does not allow.
Background threads load pages from the file (or from ordinary memory) into pinned blocks some steps before they are
used, and keep blocks that the next picture in the same style can reuse.
"""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch

from stylefast.runtime.banks.copies import copy_blocks, start_copies
from stylefast.runtime.banks.page_pool import PageLayout, PagePool, PoolFull
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


class _NotPinned(RuntimeError):
    """The system refused the memory of a block."""


class HostPages:
    """Blocks of `block_bytes`, as many as fit into `room` bytes, filled in the background. For use by one thread.

    Memory is allocated one chunk at a time, when its first block is needed, and in the background too: page-locking
    takes a second per few gigabytes, and a service whose styles fit on the device needs none. pinned: page-locked, for
    devices; False for tests on machines without one.
    """

    def __init__(self, room: int, block_bytes: int, pinned: bool):
        self._block_bytes, self._pinned = block_bytes, pinned
        self._in_chunk, self._chunk_bytes = chunk_of(block_bytes, room, pinned)
        count = room // self._chunk_bytes if self._in_chunk else 0
        self._chunks: list[torch.Tensor | None] = [None] * count
        self._refused = False  # the system refused to pin more
        self._allocating = threading.Lock()  # guards the two above
        self.blocks = count * self._in_chunk
        self._pool, self._executor = PagePool(self.blocks), ThreadPoolExecutor(_THREADS, "stylefast-pages")
        self._loads: dict[int, list[Future[None]]] = {}  # by the slot that they fill
        self._keys: dict[int, tuple[int, ...]] = {}  # of the pages that are being loaded, by slot

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
            self._start(int(claim.slots[i]), keys[i], banks[i], places[i], layout)

    def loading(self, keys: np.ndarray) -> list[Future[None]]:
        """Return the loads of pages [n, 4] that have not ended."""
        self._settle()
        wanted = set(map(tuple, keys.tolist()))
        return [load for slot, loads in self._loads.items() if self._keys[slot] in wanted for load in loads]

    def holds(self, key: np.ndarray) -> bool:
        """Return whether a page is here and loaded."""
        self._settle()
        wanted = tuple(key.tolist())
        return any(page[:4] == wanted and page.state == "resident" and not page.stale for page in self._pool.pages())

    def hold(self, key: np.ndarray, bank: StyleBank, place: tuple, layout: PageLayout) -> torch.Tensor | None:
        """Pin a page, wait for it, and return its block [nbytes of the layout].

        Returns None if there is no room, or no memory for the block yet, which is then allocated for later pages. Call
        `release` when the device has read it. Raises StyleError if the bank's file can't be read or was modified
        meanwhile.
        """
        self._settle()
        try:
            claim = self._pool.acquire(key[None])
        except PoolFull:
            return None
        slot = int(claim.slots[0])
        if claim.claimed[0] and self._chunks[slot // self._in_chunk] is None:
            self._pool.failed(np.array([slot]))
            self._pool.release(key[None])
            self._executor.submit(self._allocate, slot // self._in_chunk)
            return None
        if claim.claimed[0]:
            self._start(slot, key, bank, place, layout)
        if slot in self._loads:
            wait(self._loads[slot])
            error = self._end(slot)
            if error is not None:
                self._pool.release(key[None])
                if isinstance(error, _NotPinned):
                    return None
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
        """Begin no more loads, and end the threads after those in progress, without waiting for them."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _start(self, slot: int, key: np.ndarray, bank: StyleBank, place: tuple, layout: PageLayout) -> None:
        """Load a page into a slot, after allocating its chunk if this is the first block of it."""
        try:
            if self._chunks[slot // self._in_chunk] is None:
                loads = [self._executor.submit(self._allocate_and_load, slot, bank, place, layout)]
            else:
                loads = start_copies(self._executor, *self._copies(slot, bank, place, layout))
            self._loads[slot], self._keys[slot] = loads, tuple(key.tolist())
        except BaseException:
            self._pool.failed(np.array([slot]))
            raise

    def _allocate_and_load(self, slot: int, bank: StyleBank, place: tuple, layout: PageLayout) -> None:
        if not self._allocate(slot // self._in_chunk):
            raise _NotPinned("there is no memory for this block")
        copy_blocks(*self._copies(slot, bank, place, layout))

    def _copies(self, slot: int, bank: StyleBank, place: tuple, layout: PageLayout):
        return layout.copies(bank, place, layout.split(self._of(slot, layout)), 0)

    def _of(self, slot: int, layout: PageLayout) -> torch.Tensor:
        """Return a block [1, nbytes of the layout]."""
        chunk, place = divmod(slot, self._in_chunk)
        memory = self._chunks[chunk]
        assert memory is not None
        return memory[place : place + 1, : layout.nbytes]

    def _allocate(self, chunk: int) -> bool:
        """Allocate a chunk unless it was; return whether it has memory. In a thread of the executor."""
        with self._allocating:
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
        del self._keys[slot]
        errors = [error for load in self._loads.pop(slot) if (error := load.exception()) is not None]
        (self._pool.failed if errors else self._pool.filled)(np.array([slot]))
        return errors[0] if errors else None
