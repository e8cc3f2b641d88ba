"""Bookkeeping of style bank pages in the slots of a tier: the device's buffers or pinned blocks of the host.

A page holds the features of one (style, step, branch, reference) for its readers. The pool only keeps records; callers
that claim a page copy its bytes. The work is done in C++ if the extension is built, else by the Python twin below; both
give the same results and messages.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stylefast._extension import extension, extension_error
from stylefast.errors import InvalidRequest, MissingDependency, StyleFastError
from stylefast.runtime.steps.planner import BACKENDS

NO_SLOT = -1

STATES = ("free", "loading", "resident", "failed")
_FREE, _LOADING, _RESIDENT, _FAILED = range(4)


class PoolFull(StyleFastError, RuntimeError):
    """More pages are pinned at once than the pool has slots."""


class Claim(NamedTuple):
    """Slots of pages, in the order of the keys."""

    slots: np.ndarray  # [pages] int64; -1: none
    claimed: np.ndarray  # [pages] bool: absent before, so the caller fills the slot and reports `filled` or `failed`


class PoolStats(NamedTuple):
    """Counts of pages by state, and of events since the pool was made."""

    slots: int
    resident: int
    loading: int
    pinned: int  # included in resident or loading
    hits: int  # of `acquire`; a page being loaded counts as a hit
    misses: int
    evictions: int  # pages evicted to make room


class Page(NamedTuple):
    """Snapshot of one page of the pool."""

    style: int
    step: int
    branch: int
    reference: int
    slot: int
    state: str  # one of `STATES` except "free"
    pins: int
    stale: bool  # dropped or failed: removed with its last pin, and the next `acquire` makes a new page


class PagePool:
    """The pages of one tier: at most `slots` at a time, the least recently used ones evicted first. Thread-safe.

    Keys are [pages, 4] numbers (style, step, branch, reference). A page is *loading* from the claim until its caller
    reports it, then *resident*. A pinned page keeps its slot. Releases, claims and drops name keys, so if a page is
    dropped while pinned and its key acquired again, old and new pins can't be told apart: both pages stay until all
    pins are returned.

    Raises:
        InvalidRequest: `slots` below 0, keys of another shape or type, an unknown backend.
        MissingDependency: backend "cpp" without the extension.
    """

    def __init__(self, slots: int, *, backend: str = "auto"):
        if backend not in BACKENDS:
            raise InvalidRequest(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        if backend == "cpp" and extension() is None:
            raise MissingDependency(extension_error())
        if slots < 0:
            raise InvalidRequest(f"slots is {slots}, but must be 0 or more")
        if backend == "python" or extension() is None:
            self.backend, self._pool, self._full = "python", _Pool(slots), ()
        else:
            self.backend, self._pool, self._full = "cpp", extension().PagePool(slots), extension().PoolFull

    def acquire(self, keys: Sequence | np.ndarray) -> Claim:
        """Pin every page, or none.

        An absent page gets a free slot or that of the least recently used unpinned page. A key given twice is pinned
        twice and claimed once.

        Raises:
            PoolFull: pinned pages leave too few slots; nothing is changed.
        """
        try:
            return Claim(*self._pool.acquire(_keys(keys)))
        except self._full as error:
            raise PoolFull(str(error)) from None

    def prefetch(self, keys: Sequence | np.ndarray) -> Claim:
        """Claim like `acquire`, but without pins and without failing: slot -1 if none is available.

        Give the keys in the order in which they are needed: no page is evicted for a later key of the call, and of the
        call's own pages the last is evicted first. A claimed page keeps its slot until `filled`.
        """
        return Claim(*self._pool.prefetch(_keys(keys)))

    def filled(self, slots: Sequence | np.ndarray) -> None:
        """Report these slots' pages as loaded. Raises RuntimeError if one is not loading; nothing changes."""
        self._pool.filled(_slots(slots))

    def failed(self, slots: Sequence | np.ndarray) -> None:
        """Report that loading these slots failed: wakes waiters, and the pages are removed with their last pin."""
        self._pool.failed(_slots(slots))

    def wait(self, slots: Sequence | np.ndarray) -> bool:
        """Block until none of these pages is being loaded, without the GIL; return False if a load failed.

        Raises RuntimeError for an unpinned slot, whose page could be evicted at any moment.
        """
        return self._pool.wait(_slots(slots))

    def release(self, keys: Sequence | np.ndarray) -> None:
        """Return pins; the last key counts as used last. Raises RuntimeError if a page has fewer; nothing changes."""
        self._pool.release(_keys(keys))

    def drop(self, style: int) -> int:
        """Forget the pages of a style; return how many keep their slots for now, being pinned or loading."""
        return self._pool.drop(style)

    def clear(self) -> int:
        """Forget all pages; return how many keep their slots for now."""
        return self._pool.clear()

    def stats(self) -> PoolStats:
        """Return counts of pages and events."""
        return PoolStats(*self._pool.stats())

    def pages(self) -> list[Page]:
        """Return all pages: first the evictable ones, least recently used first, then the rest by slot."""
        rows = self._pool.pages()
        return [Page(*row[:5], STATES[row[5]], row[6], bool(row[7])) for row in np.asarray(rows).tolist()]


def _keys(keys) -> np.ndarray:
    array = _int64("keys", keys).reshape(-1, 4) if len(keys) == 0 else _int64("keys", keys)
    if array.ndim != 2 or array.shape[1] != 4:
        raise InvalidRequest(f"keys have shape {array.shape}, but a key is (style, step, branch, reference)")
    return array


def _slots(slots) -> np.ndarray:
    return _int64("slots", slots).reshape(-1)


def _int64(name: str, values) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        array = np.empty(1, object)
    if array.size and not (np.issubdtype(array.dtype, np.integer) and np.can_cast(array.dtype, np.int64)):
        raise InvalidRequest(f"{name} must be int64 numbers, all rows of one length, but are {values!r}")
    return np.ascontiguousarray(array, dtype=np.int64)


class _Page:
    __slots__ = ("key", "older", "pins", "slot", "stale", "state")

    def __init__(self, key: tuple[int, ...], slot: int):
        self.key, self.slot, self.state, self.stale, self.pins, self.older = key, slot, _LOADING, False, 0, None


class _Pool:
    """Python twin of csrc/page_pool.cpp: same arguments, results and messages."""

    def __init__(self, slots: int):
        self.slots = [None] * slots
        self.table = {}
        self.evictable = OrderedDict()  # slot -> page, least recently used first
        self.free = list(reversed(range(slots)))
        self.changed = threading.Condition()
        self.hits = self.misses = self.evictions = 0

    def acquire(self, keys):
        keys = [tuple(key) for key in keys.tolist()]
        with self.changed:
            here = {key: page for key in keys if (page := self._fresh(key)) is not None}
            absent = len(set(keys) - set(here))
            kept = sum(page.slot in self.evictable for page in here.values())
            if absent > len(self.free) + len(self.evictable) - kept:
                slots, _, loading, pinned, *_ = self._stats()
                raise PoolFull(
                    f"{len(keys)} pages were asked for, {absent} of them absent, but of {slots} slots {pinned} are "
                    f"pinned and {loading} are being loaded; use fewer styles at once or give the pool more slots"
                )
            # pin resident pages first, so that no claim evicts them
            for page in here.values():
                self.evictable.pop(page.slot, None)
            slots, claimed = [], []
            for key in keys:
                claimed.append(key not in here)
                page = here[key] = here.get(key) or self._make(key)
                page.pins += 1
                slots.append(page.slot)
            self.misses += sum(claimed)
            self.hits += len(keys) - sum(claimed)
        return np.array(slots, np.int64), np.array(claimed, bool)

    def prefetch(self, keys):
        keys = [tuple(key) for key in keys.tolist()]
        with self.changed:
            place = {}  # slot of a resident page -> its first key's index
            for i in reversed(range(len(keys))):
                page = self._fresh(keys[i])
                if page is not None:
                    place[page.slot] = i
                    if page.slot in self.evictable:
                        self.evictable.move_to_end(page.slot)
            slots, claimed = [], []
            for i, key in enumerate(keys):
                page = self._fresh(key)
                claimed.append(False)
                if page is None:
                    oldest = next(iter(self.evictable), NO_SLOT)
                    if self.free or (oldest != NO_SLOT and place.get(oldest, len(keys)) > i):
                        page = self._make(key)
                        claimed[-1] = True
                slots.append(NO_SLOT if page is None else page.slot)
        return np.array(slots, np.int64), np.array(claimed, bool)

    def filled(self, slots):
        self._end_load(slots, _RESIDENT)

    def failed(self, slots):
        self._end_load(slots, _FAILED)

    def wait(self, slots):
        with self.changed:
            pages = self._pages_of(slots)
            for slot, page in zip(slots.tolist(), pages):
                if page is None or page.pins == 0:
                    raise RuntimeError(f"slot {slot} is not pinned; acquire a page to wait for it")
            self.changed.wait_for(lambda: all(page.state != _LOADING for page in pages))
            return all(page.state == _RESIDENT and page.pins > 0 for page in pages)

    def release(self, keys):
        keys = [tuple(key) for key in keys.tolist()]
        with self.changed:
            left = {key: page.pins for key in keys if (page := self.table.get(key)) is not None}
            for key in keys:
                left[key] = left.get(key, 0) - 1
                if left[key] < 0:
                    style, step, branch, reference = key
                    raise RuntimeError(
                        f"the page of style {style}, step {step}, branch {branch}, reference {reference} is released "
                        "more often than it was acquired"
                    )
            for key in keys:
                page = self.table[key]
                page.pins -= 1
                self._settle(page)

    def drop(self, style):
        return self._forget(lambda page: page.key[0] == style)

    def clear(self):
        return self._forget(lambda page: True)

    def stats(self):
        with self.changed:
            return self._stats()

    def pages(self):
        with self.changed:
            held = [page for page in self.slots if page is not None and page.slot not in self.evictable]
            return [
                [*page.key, page.slot, page.state, page.pins, page.stale] for page in [*self.evictable.values(), *held]
            ]

    def _fresh(self, key):
        page = self.table.get(key)
        return None if page is None or page.stale else page

    def _make(self, key):
        if not self.free:
            self._vanish(self.evictable.popitem(last=False)[1])
            self.evictions += 1
        page = _Page(key, self.free.pop())
        older = self.table.get(key)
        if older is not None and older.pins > 0:
            page.older, page.pins = older, older.pins
        self.table[key] = self.slots[page.slot] = page
        return page

    def _vanish(self, page):
        if self.table.get(page.key) is page:
            del self.table[page.key]
        page.state = _FREE
        self.slots[page.slot] = None
        self.free.append(page.slot)

    def _settle(self, page):
        """Update a page whose last pin or load may have ended."""
        while page is not None and page.pins == 0:
            older, page.older = page.older, None
            if page.state != _LOADING:
                if page.stale:
                    self._vanish(page)
                else:
                    self.evictable[page.slot] = page
            if older is not None:
                older.pins = 0
            page = older

    def _pages_of(self, slots):
        for slot in slots.tolist():
            if not 0 <= slot < len(self.slots):
                raise IndexError(f"slot {slot} is not one of the pool's {len(self.slots)}")
        return [self.slots[slot] for slot in slots.tolist()]

    def _end_load(self, slots, state):
        with self.changed:
            pages = self._pages_of(slots)
            for i, (slot, page) in enumerate(zip(slots.tolist(), pages)):
                if page is None or page.state != _LOADING or page in pages[:i]:
                    raise RuntimeError(f"slot {slot} is not being loaded")
            for page in pages:
                page.state = state
                page.stale |= state == _FAILED
                self._settle(page)
            self.changed.notify_all()

    def _forget(self, concerns):
        with self.changed:
            for page in self.slots:
                if page is not None and concerns(page) and not page.stale:
                    self.evictable.pop(page.slot, None)
                    page.stale = True
                    self._settle(page)
            return sum(page is not None and concerns(page) for page in self.slots)

    def _stats(self):
        pages = [page for page in self.slots if page is not None]
        states = [page.state for page in pages]
        pinned = sum(page.pins > 0 for page in pages)
        counts = len(self.slots), states.count(_RESIDENT), states.count(_LOADING), pinned
        return *counts, self.hits, self.misses, self.evictions
