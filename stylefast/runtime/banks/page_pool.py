"""Pages of style banks: how one lies in memory (`PageLayout`), and which slots hold which (`PagePool`).

A page holds the features of one (style, step, branch, reference) for its readers. A slot is a place for one in a tier:
the device's buffers, or pinned blocks of the host.

On the device every part of a page is a dense tensor whose first dimension is the slot: keys and values of an attention
level, statistics of a level, group norms. Exported graphs read the parts; the kernels read views of one layer, `[slots,
tokens, heads, d]`, whose token stride equals that of the batch's own keys, as the fastest attention kernel requires. In
host memory a page is one block with all parts in a row, so that it is copied to the device in as many copies as there
are parts.

The pool only keeps track of pages; callers that claim a page copy its bytes. `PagePool` checks arguments and raises the
errors; the bookkeeping is in C++, or in `PageBooksRef` if the extension is not built.
"""

import math
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from stylefast._extension import extension
from stylefast.errors import InvalidRequest, StyleFastError
from stylefast.models.unet import UNet
from stylefast.slots import LruDict
from stylefast.styles.bank import StyleBank
from stylefast.styles.bank_size import BankShapes
from stylefast.values import quoted

NO_SLOT = -1

STATES = ("free", "loading", "resident", "failed")
_FREE, _LOADING, _RESIDENT, _FAILED = range(4)

FP8 = torch.float8_e4m3fn
_ALIGN = 64  # bytes; aligns every part of a block, and exceeds any kernel's vectors


class Part(NamedTuple):
    """One part of a page: its start in a block, and its shape for one page."""

    name: str
    start: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class PageLayout:
    """The parts of a page, and the place of every layer and norm in them; a block has `nbytes`.

    For every attention level, layers in registry order: "page_kv_<level>" [layers, 2, tokens, heads, d] in `dtype`, or
    for store="hidden" the hidden states [layers, tokens, channels]; with fp8 their "page_scale_<level>" [layers, 2,
    heads, d] or [layers, channels]; "page_stats_<level>" [layers, 2, 3, heads, d], the means and variances of queries,
    keys, values. For all group norms in module order: "page_norms" [norms, 2, groups], means and variances. All but the
    keys and values (or hidden states) are float32.
    """

    def __init__(self, unet: UNet, latent_size: tuple[int, int], dtype: torch.dtype, store: str = "kv"):
        self.dtype, self.store, self.nbytes = dtype, store, 0
        height, width = latent_size
        shapes = BankShapes.from_config(unet.config, (width, height), pixels_per_latent=1)
        self.norm_elements = shapes.norm_elements
        self.parts: list[Part] = []
        self._places: dict[tuple[str, int], tuple[int, int]] = {}  # (part, index in it)
        for level in range(unet.layout.levels):
            layers = unet.layout.at_level(level)
            tokens, heads, d = shapes.layers[layers[0]]
            hidden = store == "hidden"
            values = (tokens, heads * d) if hidden else (2, tokens, heads, d)
            self._add("values", layers, f"page_kv_{level}", values, dtype)
            if dtype == FP8:
                self._add("scale", layers, f"page_scale_{level}", (heads * d,) if hidden else (2, heads, d))
            self._add("stats", layers, f"page_stats_{level}", (2, 3, heads, d))
        self._add("norm", range(len(shapes.groups)), "page_norms", (2, shapes.groups[0]))

    def _add(
        self, what: str, indices: Sequence[int], name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> None:
        self._places |= {(what, index): (len(self.parts), place) for place, index in enumerate(indices)}
        self.parts.append(Part(name, self.nbytes, (len(indices), *shape), dtype))
        self.nbytes += -(-self.parts[-1].nbytes // _ALIGN) * _ALIGN

    def allocate(self, pages: int, device: torch.device) -> list[torch.Tensor]:
        """Return zeros for `pages` pages: one tensor [pages, ...] per part."""
        return [torch.zeros(pages, *part.shape, dtype=part.dtype, device=device) for part in self.parts]

    def split(self, blocks: torch.Tensor) -> list[torch.Tensor]:
        """Split blocks [pages, nbytes] uint8 into their parts, as views [pages, ...]."""
        return [
            blocks[:, part.start : part.start + part.nbytes].view(part.dtype).unflatten(1, part.shape)
            for part in self.parts
        ]

    def view(self, parts: Sequence[torch.Tensor], what: str, index: int) -> torch.Tensor:
        """Return a view of one layer ("values", "scale", "stats") or "norm" in all pages: [pages, ...]."""
        part, place = self._places[what, index]
        return parts[part][:, place]

    def copies(self, bank: StyleBank, place: tuple[int, int, int], parts: Sequence[torch.Tensor], slot: int):
        """Return (sources, destinations) that copy the page at `place` (step, branch, reference) into page `slot`.

        Sources are tensors, or spans of the bank's file.
        """
        sources, destinations = [], []
        values = "hidden" if self.store == "hidden" else "kv"
        for i in bank.info.layers:
            sources.append(bank.source(f"{values}.{i}", place))
            destinations.append(self.view(parts, "values", i)[slot])
            if self.dtype == FP8:
                sources.append(bank.source(f"scale.{i}", place))
                destinations.append(self.view(parts, "scale", i)[slot])
            for side, name in enumerate(("mean", "variance")):
                sources.append(bank.source(f"{name}.{i}", place))
                destinations.append(self.view(parts, "stats", i)[slot, side])
        for i in range(len(self.norm_elements)):
            for side, name in enumerate(("norm_mean", "norm_variance")):
                sources.append(bank.source(f"{name}.{i}", place))
                destinations.append(self.view(parts, "norm", i)[slot, side])
        return sources, destinations


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
        InvalidRequest: `slots` below 0, keys of another shape or type.
        IndexError: a slot that the pool does not have.
    """

    def __init__(self, slots: int):
        if slots < 0:
            raise InvalidRequest(f"slots is {slots}, but must be 0 or more")
        module = extension()
        self._slots, self._books = slots, PageBooksRef(slots) if module is None else module.PagePool(slots)

    def acquire(self, keys: Sequence | np.ndarray) -> Claim:
        """Pin every page, or none.

        An absent page gets a free slot or that of the least recently used unpinned page. A key given twice is pinned
        twice and claimed once.

        Raises:
            PoolFull: pinned pages leave too few slots; nothing is changed.
        """
        keys = _keys(keys)
        slots, claimed, absent = self._books.acquire(keys)
        if absent:
            now = self.stats()
            raise PoolFull(
                f"{len(keys)} pages were asked for, {absent} of them absent, but of {now.slots} slots {now.pinned} are "
                f"pinned and {now.loading} are being loaded; use fewer styles at once or give the pool more slots"
            )
        return Claim(slots, claimed)

    def prefetch(self, keys: Sequence | np.ndarray) -> Claim:
        """Claim like `acquire`, but without pins and without failing: slot -1 if none is available.

        Give the keys in the order in which they are needed: no page is evicted for a later key of the call, and of the
        call's own pages the last is evicted first. A claimed page keeps its slot until `filled`.
        """
        return Claim(*self._books.prefetch(_keys(keys)))

    def filled(self, slots: Sequence | np.ndarray) -> None:
        """Report these slots' pages as loaded. Raises RuntimeError if one is not loading; nothing changes."""
        self._end_load(slots, self._books.filled)

    def failed(self, slots: Sequence | np.ndarray) -> None:
        """Report that loading these slots failed: wakes waiters, and the pages are removed with their last pin."""
        self._end_load(slots, self._books.failed)

    def wait(self, slots: Sequence | np.ndarray) -> bool:
        """Block until none of these pages is being loaded, without the GIL; return False if a load failed.

        Raises RuntimeError for an unpinned slot, whose page could be evicted at any moment.
        """
        slots = self._checked(slots)
        wrong = self._books.unpinned(slots)
        if wrong >= 0:
            raise RuntimeError(f"slot {slots[wrong]} is not pinned; acquire a page to wait for it")
        return self._books.wait(slots)

    def release(self, keys: Sequence | np.ndarray) -> None:
        """Return pins; the last key counts as used last. Raises RuntimeError if a page has fewer; nothing changes."""
        keys = _keys(keys)
        wrong = self._books.release(keys)
        if wrong >= 0:
            style, step, branch, reference = keys[wrong].tolist()
            raise RuntimeError(
                f"the page of style {style}, step {step}, branch {branch}, reference {reference} is released more "
                "often than it was acquired"
            )

    def drop(self, style: int) -> int:
        """Forget the pages of a style; return how many keep their slots for now, being pinned or loading."""
        return self._books.drop(style)

    def clear(self) -> int:
        """Forget all pages; return how many keep their slots for now."""
        return self._books.clear()

    def stats(self) -> PoolStats:
        """Return counts of pages and events."""
        return PoolStats(*self._books.stats())

    def pages(self) -> list[Page]:
        """Return all pages: first the evictable ones, least recently used first, then the rest by slot."""
        return [
            Page(style, step, branch, reference, slot, STATES[state], pins, bool(stale))
            for style, step, branch, reference, slot, state, pins, stale in np.asarray(self._books.pages()).tolist()
        ]

    def _end_load(self, slots: Sequence | np.ndarray, report: Callable[[np.ndarray], int]) -> None:
        slots = self._checked(slots)
        wrong = report(slots)
        if wrong >= 0:
            raise RuntimeError(f"slot {slots[wrong]} is not being loaded")

    def _checked(self, slots: Sequence | np.ndarray) -> np.ndarray:
        array = _int64("slots", slots).reshape(-1)
        for slot in array.tolist():
            if not 0 <= slot < self._slots:
                raise IndexError(f"slot {slot} is not one of the pool's {self._slots}")
        return array


def _keys(keys) -> np.ndarray:
    array = _int64("keys", keys).reshape(-1, 4) if len(keys) == 0 else _int64("keys", keys)
    if array.ndim != 2 or array.shape[1] != 4:
        raise InvalidRequest(f"keys have shape {array.shape}, but a key is (style, step, branch, reference)")
    return array


def _int64(name: str, values) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        array = np.empty(1, object)
    if array.size and not (np.issubdtype(array.dtype, np.integer) and np.can_cast(array.dtype, np.int64)):
        raise InvalidRequest(f"{name} must be int64 numbers, all rows of one length, but are {quoted(values)}")
    return np.ascontiguousarray(array, dtype=np.int64)


class _Page:
    __slots__ = ("key", "older", "pins", "slot", "stale", "state")

    def __init__(self, key: tuple[int, ...], slot: int):
        self.key, self.slot, self.state, self.stale, self.pins = key, slot, _LOADING, False, 0
        self.older: _Page | None = None


class PageBooksRef:
    """The books of a pool in plain Python, with the methods of csrc/page_pool.h: they trust their arguments."""

    def __init__(self, slots: int):
        self.slots: list[_Page | None] = [None] * slots
        self.table: dict[tuple[int, ...], _Page] = {}
        self.evictable: LruDict[int, _Page] = LruDict()  # by slot
        self.free = list(reversed(range(slots)))
        self.changed = threading.Condition()
        self.hits = self.misses = self.evictions = 0

    def acquire(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        named = [tuple(key) for key in keys.tolist()]
        slots, claimed = np.empty(len(named), np.int64), np.zeros(len(named), bool)
        with self.changed:
            here = {key: page for key in named if (page := self._fresh(key)) is not None}
            absent = len(set(named) - set(here))
            kept = sum(page.slot in self.evictable for page in here.values())
            if absent > len(self.free) + len(self.evictable) - kept:
                return slots, claimed, absent
            # pin resident pages first, so that no claim evicts them
            for page in here.values():
                self.evictable.pop(page.slot, None)
            for i, key in enumerate(named):
                claimed[i] = key not in here
                page = here[key] = here.get(key) or self._make(key)
                page.pins += 1
                slots[i] = page.slot
            self.misses += int(claimed.sum())
            self.hits += len(named) - int(claimed.sum())
        return slots, claimed, 0

    def prefetch(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        named = [tuple(key) for key in keys.tolist()]
        slots, claimed = np.full(len(named), NO_SLOT), np.zeros(len(named), bool)
        with self.changed:
            place = {}  # slot of a resident page -> its first key's index
            for i in reversed(range(len(named))):
                page = self._fresh(named[i])
                if page is not None:
                    place[page.slot] = i
                    self.evictable.use(page.slot)
            for i, key in enumerate(named):
                page = self._fresh(key)
                oldest = self.evictable.oldest
                if page is None and (self.free or oldest is not None and place.get(oldest, len(named)) > i):
                    page, claimed[i] = self._make(key), True
                if page is not None:
                    slots[i] = page.slot
        return slots, claimed

    def filled(self, slots: np.ndarray) -> int:
        return self._end_load(slots, _RESIDENT)

    def failed(self, slots: np.ndarray) -> int:
        return self._end_load(slots, _FAILED)

    def unpinned(self, slots: np.ndarray) -> int:
        with self.changed:
            pages = [self.slots[slot] for slot in slots.tolist()]
            return next((i for i, page in enumerate(pages) if page is None or page.pins == 0), -1)

    def wait(self, slots: np.ndarray) -> bool:
        with self.changed:
            pages = [page for slot in slots.tolist() if (page := self.slots[slot]) is not None]
            self.changed.wait_for(lambda: all(page.state != _LOADING for page in pages))
            return len(pages) == len(slots) and all(page.state == _RESIDENT and page.pins > 0 for page in pages)

    def release(self, keys: np.ndarray) -> int:
        named = [tuple(key) for key in keys.tolist()]
        with self.changed:
            left = {key: page.pins for key in named if (page := self.table.get(key)) is not None}
            for i, key in enumerate(named):
                left[key] = left.get(key, 0) - 1
                if left[key] < 0:
                    return i
            for key in named:
                page = self.table[key]
                page.pins -= 1
                self._settle(page)
        return -1

    def drop(self, style: int) -> int:
        return self._forget(lambda page: page.key[0] == style)

    def clear(self) -> int:
        return self._forget(lambda page: True)

    def stats(self) -> tuple[int, ...]:
        with self.changed:
            pages = [page for page in self.slots if page is not None]
            states = [page.state for page in pages]
            pinned = sum(page.pins > 0 for page in pages)
            counts = len(self.slots), states.count(_RESIDENT), states.count(_LOADING), pinned
            return *counts, self.hits, self.misses, self.evictions

    def pages(self) -> list[list[int]]:
        with self.changed:
            held = [page for page in self.slots if page is not None and page.slot not in self.evictable]
            return [
                [*page.key, page.slot, page.state, page.pins, page.stale] for page in [*self.evictable.values(), *held]
            ]

    def _fresh(self, key: tuple[int, ...]) -> _Page | None:
        page = self.table.get(key)
        return None if page is None or page.stale else page

    def _make(self, key: tuple[int, ...]) -> _Page:
        if not self.free:
            self._vanish(self.evictable.popitem(last=False)[1])
            self.evictions += 1
        page = _Page(key, self.free.pop())
        older = self.table.get(key)
        if older is not None and older.pins > 0:
            page.older, page.pins = older, older.pins
        self.table[key] = self.slots[page.slot] = page
        return page

    def _vanish(self, page: _Page) -> None:
        if self.table.get(page.key) is page:
            del self.table[page.key]
        page.state = _FREE
        self.slots[page.slot] = None
        self.free.append(page.slot)

    def _settle(self, page: _Page | None) -> None:
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

    def _end_load(self, slots: np.ndarray, state: int) -> int:
        with self.changed:
            pages: list[_Page] = []
            for i, slot in enumerate(slots.tolist()):
                page = self.slots[slot]
                if page is None or page.state != _LOADING or page in pages:
                    return i
                pages.append(page)
            for page in pages:
                page.state = state
                page.stale |= state == _FAILED
                self._settle(page)
            self.changed.notify_all()
        return -1

    def _forget(self, concerns: Callable[[_Page], bool]) -> int:
        with self.changed:
            for page in self.slots:
                if page is not None and concerns(page) and not page.stale:
                    self.evictable.pop(page.slot, None)
                    page.stale = True
                    self._settle(page)
            return sum(page is not None and concerns(page) for page in self.slots)
