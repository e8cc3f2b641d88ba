"""LoRAs that requests use by name: registered in host memory, on the device while rows use them.

Three tiers: the file, factors in host memory, and units in pools on the device. `Loras` is the registry and the host
tier, `LoraPool` the device tier. In both the least recently used LoRAs give way when a byte budget is reached; those in
use stay. A LoRA that was removed, or whose name was taken again, stays as it was for the requests that have it.
"""

import itertools
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from stylefast import values
from stylefast.errors import AdapterError, InvalidRequest, OutOfMemory
from stylefast.kernels.row_lora import RANK
from stylefast.models.lora import LoraSet
from stylefast.models.lora_factors import BLORA_BLOCKS, blora_part
from stylefast.models.lora_file import read_lora
from stylefast.models.lora_units import lora_factors, unit_table
from stylefast.models.row_loras import LEAST_WIDTH, NO_UNIT, LoraFactors, RowLoras, table_width
from stylefast.models.unet import UNet
from stylefast.runtime.banks.page_pool import Page, PagePool, PoolFull
from stylefast.runtime.memory import going_on, is_out_of_memory
from stylefast.runtime.plan.request import LoraScale
from stylefast.slots import LruDict, Slots

# max LoRAs on the device at once, each with a row in the table of units
MOST_RESIDENT = 256
# members of `LoraSet` that `Loras` does not have
_OF_MERGED = ("touched", "scales", "set_scale", "clear")
# units of each kind
_LEAST = LEAST_WIDTH
_numbers = itertools.count(1)


class Lora:
    """A registered LoRA. `digest`: SHA-256 of its files; `nbytes`: of its factors; `rank`: the largest of a layer."""

    def __init__(self, name: str, path: Path, part: str | None, digest: str, factors: LoraFactors):
        self.name, self.path, self.part, self.digest = name, path, part, digest
        self.number = next(_numbers)
        self.nbytes, self.rank = factors.nbytes, factors.rank
        self.changes_unet = any(factors.units())
        self.changes_text = tuple(bool(found) for found in factors.text)
        self._factors: LoraFactors | None = factors  # None: only in the file
        self.registered = True  # False once it was removed

    def recorded(self) -> dict[str, str]:
        """Return what a picture's record says of it: path and digest, and the part of a B-LoRA."""
        part = {} if self.part is None else {"part": self.part}
        return {"path": str(self.path), "sha256": self.digest, **part}

    @property
    def on_host(self) -> bool:
        """Return whether its factors are in host memory."""
        return self._factors is not None


class LoraUse(NamedTuple):
    """A LoRA of a request, with its strengths."""

    lora: Lora
    unet: float
    text: float

    @property
    def key(self) -> tuple[str, float, float]:
        """Return what is equal for uses with equal effects."""
        return self.lora.digest, self.unet, self.text

    def __str__(self) -> str:
        """Return name and strengths as messages give them."""
        own = f" (text encoders: {self.text:g})" if self.text != self.unet and any(self.lora.changes_text) else ""
        return f"{values.shown(self.lora.name)} at {self.unet:g}{own}"


def described(used: Sequence[LoraUse]) -> str:
    """Return contents and strengths of LoRAs as text, equal for equal effects; "" for none."""
    return ", ".join(f"{use.lora.digest[:16]} at {use.unet:g} (text encoders: {use.text:g})" for use in used)


def named(used: Sequence[LoraUse]) -> tuple[str, ...]:
    """Return names, strengths and the first digits of the contents of LoRAs, for messages."""
    return tuple(f"{use}, sha256 {use.lora.digest[:8]}" for use in used)


class Loras:
    """The LoRAs that requests may use, by name: `Request(loras={"pixel": 0.8})`.

    Registering and removing is allowed while pictures are in progress; no weights change.

    Examples:
        >>> sorted(engine.loras)
        []
        >>> engine.generate(sf.Request("a fish", loras={"pixel": 0.8}, steps=2))
        Traceback (most recent call last):
        stylefast.errors.InvalidRequest: no LoRA named 'pixel' is registered; registered are: none. Add it with \
engine.loras.add(file, 'pixel')
    """

    def __init__(
        self,
        unet: UNet,
        weights: Mapping[str, Mapping[str, torch.Tensor]],
        host_memory: int | None = None,
        merged: LoraSet | None = None,
        check_open: Callable[[], None] = lambda: None,
    ):
        self._unet, self._weights, self._budget, self._merged = unet, weights, host_memory, merged
        # raises once the engine is closed, and in a forked process, where the lock may be held forever
        self._check_open = check_open
        self._lock = threading.RLock()
        self._named: dict[str, Lora] = {}
        self._host: LruDict[Lora, None] = LruDict()  # with factors in memory
        # called with every LoRA that was removed
        self.on_remove: Callable[[Lora], None] = lambda lora: None

    def __getattr__(self, name: str) -> Any:
        """Return a member of the merged LoRAs, which `engine.loras` was before there were LoRAs per request."""
        if name not in _OF_MERGED or self._merged is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {values.quoted(name)}")
        warnings.warn(
            f"engine.loras.{name} is now engine.merged_loras.{name}; engine.loras holds LoRAs that differ by request",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(self._merged, name)

    def add(self, source: str | Path, name: str | None = None, part: str | None = None) -> str:
        """Register a LoRA (a file, or a folder with one) and return its name, by default the file's.

        part: "content" or "style" of a B-LoRA (arXiv 2403.14572), which holds each in a block of its own; None: all.

        Raises ModelNotFound and ModelFormatError for files that can't be read, AdapterError for files that are not a
        LoRA, don't fit the model, or can't differ by row (NotLowRank; `Engine.load_lora` takes those), and
        InvalidRequest for a name that is taken; like `remove` and `[name]`, EngineClosed once the engine is closed, or
        in a forked process.
        """
        self._check_open()
        path = values.path("a LoRA", source)
        if part is not None:
            values.one_of("part", part, BLORA_BLOCKS)
        if name is not None:
            self._check_name(name)
            self._check_free(name)
        name, digest, factors = self._read(path, name, part)
        self._check_name(name)
        with self._lock:
            self._check_free(name)
            lora = self._named[name] = Lora(name, path.resolve(), part, digest, factors)
            self._keep(lora, factors)
        return name

    def remove(self, name: str) -> None:
        """Unregister a LoRA; requests that use it keep it until they are done. Raises InvalidRequest if unknown."""
        self._check_open()
        with self._lock:
            self._find(name)
            lora = self._named.pop(name)
            self._host.pop(lora, None)
            lora.registered = False
        self.on_remove(lora)

    def __contains__(self, name: object) -> bool:
        return name in self._named

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._named))

    def __len__(self) -> int:
        return len(self._named)

    def __getitem__(self, name: str) -> Lora:
        """Return a registered LoRA. Raises InvalidRequest, listing the names there are."""
        self._check_open()
        with self._lock:
            return self._find(name)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all factors in host memory."""
        # a copy, made in one step, in place of the lock: memory reports must also work in a forked process
        return sum(lora.nbytes for lora in list(self._host))

    def uses(self, wanted: Mapping[str, LoraScale], named: Mapping[str, Lora] | None = None) -> tuple[LoraUse, ...]:
        """Return the LoRAs that a request names, without those of strength 0, in the order of their contents.

        named: those that the names mean, whatever is registered now. Raises InvalidRequest for other names that are not
        registered.
        """
        named = named or {}
        with self._lock:
            found = [LoraUse(named.get(name) or self._find(name), *scale) for name, scale in wanted.items()]
        used = [use._replace(text=use.text if any(use.lora.changes_text) else 0.0) for use in found]
        used = [use._replace(unet=use.unet if use.lora.changes_unet else 0.0) for use in used]
        return tuple(sorted((use for use in used if use.unet or use.text), key=lambda use: use.key))

    def factors(self, lora: Lora) -> LoraFactors:
        """Return the factors of a LoRA, read again from its file if they have left host memory.

        Raises AdapterError if the file has changed since it was registered, and what `add` raises.
        """
        with self._lock:
            found = lora._factors
            if found is not None:
                self._host.use(lora)
                return found
        _, digest, found = self._read(lora.path, lora.name, lora.part)
        if digest != lora.digest:
            raise AdapterError(
                f"{lora.path.name} has changed since it was registered as {values.quoted(lora.name)}; remove it and "
                "add it again"
            )
        with self._lock:
            self._keep(lora, found)
        return found

    def _read(self, path: Path, name: str | None, part: str | None) -> tuple[str, str, LoraFactors]:
        lora = read_lora(path, self._weights)
        lora = lora if part is None else blora_part(lora, part)
        return name or lora.name, lora.digest, lora_factors(lora, self._unet.loras, self._unet.dtype)

    def _keep(self, lora: Lora, factors: LoraFactors) -> None:
        """Keep factors in host memory, and drop those of the least recently used beyond the budget."""
        lora._factors = factors
        if not lora.registered:
            return  # removed meanwhile; its requests keep it alive
        self._host[lora] = None
        self._host.use(lora)
        total = sum(other.nbytes for other in self._host)
        while self._budget is not None and total > self._budget and len(self._host) > 1:
            oldest, _ = self._host.popitem(last=False)
            oldest._factors, total = None, total - oldest.nbytes

    def _find(self, name: object) -> Lora:
        if not isinstance(name, str) or name not in self._named:
            raise InvalidRequest(
                f"no LoRA named {values.quoted(name)} is registered; registered are: {values.listed(self._named)}"
                f"{values.did_you_mean(name, self._named)}. Add it with engine.loras.add(file, {values.quoted(name)})"
            )
        return self._named[name]

    @staticmethod
    def _check_name(name: str) -> None:
        """Refuse what a line of text, such as A1111's parameters, could not give back."""
        name = values.text("the name of a LoRA", name, longest=values.QUOTED, empty=False)
        if not name.isprintable() or name != name.strip():
            raise InvalidRequest(
                f"the name of a LoRA is {values.quoted(name)}; it must be printable, without blanks at its ends: "
                "engine.loras.add(file, 'name')"
            )

    def _check_free(self, name: str) -> None:
        if name in self._named:
            raise InvalidRequest(
                f"a LoRA named {values.quoted(name)} is already registered; remove it first, or give another name: "
                "engine.loras.add(file, 'name')"
            )


class LoraPool:
    """Units of the LoRAs in use on the device, and of those used last.

    `rows` is what the UNet reads, None until the first LoRA. Its tensors are replaced when they grow or shrink, and
    `generation` increases. memory: bytes for all units; None: what `free` leaves. Thread-safe, but `hold` and `shrink`
    change what steps read, so they are called between steps.
    """

    def __init__(self, unet: UNet, memory: int | None = None):
        self._unet, self._memory, self._lock = unet, math.inf if memory is None else memory, threading.RLock()
        # returns the bytes that are free on the device, None if unknown
        self.free: Callable[[], int | None] = lambda: None
        self._layout, self._books = unet.loras, PagePool(MOST_RESIDENT)
        self._unit_bytes = np.array([self._layout.unit_bytes(kind, unet.dtype) for kind in self._kinds])
        self._at: dict[int, _Resident] = {}  # by place
        self._down = [torch.zeros(0, kind.taps, kind.channels_in, RANK) for kind in self._layout.kinds]
        self._up = [torch.zeros(0, RANK, kind.channels_out) for kind in self._layout.kinds]
        self._slots = [Slots() for _ in self._kinds]
        self.rows: RowLoras | None = None
        self._narrow: dict[int, RowLoras] = {}  # by width of the table
        self.generation = 0

    @property
    def nbytes(self) -> int:
        """Return the bytes of all units, used or not, and of the table."""
        return sum(x.nbytes for x in (*self._down, *self._up)) + (0 if self.rows is None else self.rows.units.nbytes)

    @property
    def resident(self) -> list[str]:
        """Return the names of the LoRAs on the device."""
        return [one.lora.name for one in list(self._at.values())]

    @property
    def held(self) -> int:
        """Count the LoRAs in use."""
        return self._books.stats().pinned

    def absent(self, loras: Sequence[Lora]) -> list[Lora]:
        """Return those that are not on the device."""
        here = {one.lora for one in self._at.values()}
        return [lora for lora in loras if lora not in here]

    def copies(self, factors: LoraFactors) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Return factors of all kinds on the device, down and up, for `hold`; may run alongside steps."""
        device, dtype = self._unet.device, self._unet.dtype
        return tuple(x.to(device, dtype) for x in factors.down), tuple(x.to(device, dtype) for x in factors.up)

    def rows_for(self, loras: Iterable[Lora]) -> RowLoras:
        """Return `rows` with as narrow a table as a batch with these LoRAs needs; a power of two."""
        return self._narrow[table_width(max((lora.rank // RANK for lora in loras), default=0))]

    @torch.inference_mode()
    def hold(self, used: Sequence[tuple[Lora, LoraFactors]]) -> list[int]:
        """Bring LoRAs to the device, keep them there until `release`, and return their places.

        Factors may be in host memory; with those of `copies` no transfer takes place between two steps. Raises
        OutOfMemory, holding none, if they don't fit together with those in use.
        """
        if not used:
            return []
        keys = _keys([lora for lora, _ in used])
        with self._lock:
            try:
                claim = self._books.acquire(keys)
            except PoolFull as error:
                raise OutOfMemory(f"{len(used)} more LoRAs don't fit on the device: {error}") from None
            new = {int(claim.slots[i]): used[i] for i in np.flatnonzero(claim.claimed).tolist()}
            try:
                for place in new:
                    self._evict(place)  # of the LoRA that the books gave up for it
                if new:
                    self._make_room([factors for _, factors in new.values()])
                for place, (lora, factors) in new.items():
                    self._put(place, lora, factors)
            except BaseException:
                for place in new:
                    self._evict(place)
                self._books.failed(np.array(list(new), dtype=np.int64))
                self._books.release(keys)
                raise
            self._books.filled(np.array(list(new), dtype=np.int64))
            return [int(place) for place in claim.slots]

    def release(self, loras: Sequence[Lora]) -> None:
        """Release LoRAs that were held; they stay on the device until they are removed or others need the room."""
        if loras:
            self._books.release(_keys(loras))
            self.forget([lora for lora in loras if not lora.registered])

    def forget(self, loras: Sequence[Lora]) -> None:
        """Drop those of some LoRAs that are unused. Their memory is for the next ones; steps may be running."""
        numbers = {lora.number for lora in loras}
        with self._lock:
            for page in self._idle() if numbers else ():
                if page.style in numbers:
                    self._drop(page)

    @torch.inference_mode()
    def shrink(self) -> bool:
        """Drop unused LoRAs and free their memory; return whether there was any to free."""
        with self._lock:
            before = self.nbytes
            for page in self._idle():
                self._drop(page)
            counts = np.maximum(self._used(), _LEAST)
            if self.rows is None or (counts == self._sizes()).all():
                return False
            with going_on():  # what was freed before is free
                self._rebuild(counts, self._width())
            return self.nbytes < before

    @property
    def _kinds(self) -> range:
        return range(len(self._layout.kinds))

    def _idle(self) -> list[Page]:
        """Return the unused LoRAs, least recently used first."""
        return [page for page in self._books.pages() if page.pins == 0 and page.state == "resident"]

    def _drop(self, page: Page) -> None:
        self._books.drop(page.style)
        self._evict(page.slot)

    def _evict(self, place: int) -> None:
        gone = self._at.pop(place, None)
        if gone is not None:
            for slots, units in zip(self._slots, gone.units, strict=True):
                slots.release(units)

    def _make_room(self, new: Sequence[LoraFactors]) -> None:
        """Grow the pools for new LoRAs; where that does not fit, unused ones leave and the pools become smaller."""
        more, width = np.sum([factors.units() for factors in new], axis=0), self._width(new)
        pools = self._sizes()
        if self.rows is not None and (pools - self._used() >= more).all():
            if width > self.rows.units.shape[2]:
                self._rebuild(pools, width)
            return
        while not self._fits(self._used() + more):
            self._drop_oldest(len(new), self._used() + more)
        wanted = self._used() + more
        # half as many again, so that the next few compile and copy nothing
        grown = np.maximum(pools, np.where(more > 0, wanted + wanted // 2, wanted))
        try:
            self._rebuild(grown if self._fits(grown) else wanted, width)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # outside the handler, so that the error no longer keeps tensors
        for page in self._idle():
            self._drop(page)
        self._rebuild(self._used() + more, self._width(new))

    def _sizes(self) -> np.ndarray:
        """Return the number of units of each kind, used or not."""
        return np.array([len(up) for up in self._up], dtype=np.int64)

    def _used(self) -> np.ndarray:
        """Return how many units of each kind the LoRAs on the device take."""
        return np.array([slots.used for slots in self._slots], dtype=np.int64)

    def _width(self, new: Sequence[LoraFactors] = ()) -> int:
        """Return the width of a table for the LoRAs on the device and new ones."""
        return table_width(max((int(one.counts.max(initial=0)) for one in (*self._at.values(), *new)), default=0))

    def _bytes(self, units: np.ndarray) -> int:
        return int(np.dot(np.maximum(units, _LEAST), self._unit_bytes))

    def _fits(self, units: np.ndarray) -> bool:
        """Return whether pools of these sizes fit into `memory` and into what is free.

        While unused LoRAs are kept, they may take no more than they leave.
        """
        needed, copying = self._bytes(units), self._copying(units)
        beside = max(needed, copying) if self._idle() else copying
        return needed <= self._memory and needed + beside <= self._room()

    def _copying(self, units: np.ndarray) -> int:
        """Return the bytes of the largest pool that is there twice while the pools get these sizes."""
        sizes = self._sizes()
        return int(np.max(sizes * self._unit_bytes, where=np.maximum(units, _LEAST) != sizes, initial=0))

    def _room(self) -> float:
        """Return the bytes of the pools and of free memory."""
        free = self.free()
        return math.inf if free is None else free + int(np.dot(self._sizes(), self._unit_bytes))

    def _drop_oldest(self, count: int, wanted: np.ndarray) -> None:
        """Drop the LoRA that has been out of use for longest. Raises OutOfMemory if all are in use."""
        idle, needed = self._idle(), self._bytes(wanted)
        if not idle:
            limit, way_out = f"lora_memory is {self._memory / 2**20:.1f} MiB", "raise it"
            if needed <= self._memory:
                needed += self._copying(wanted)
                limit = f"{self._room() / 2**20:.1f} MiB are free for them"
                way_out = "raise memory_limit if there is one"
            raise OutOfMemory(
                f"the LoRAs in use and {count} more take {needed / 2**20:.1f} MiB on the device, but {limit}; "
                f"{way_out}, or use fewer LoRAs at once"
            )
        self._drop(idle[0])

    def _rebuild(self, counts: np.ndarray, width: int) -> None:
        """Give the pools other sizes and the table another width; the LoRAs on the device stay.

        If memory runs out, each pool is either the old one or the new one, and the table fits them.
        """
        counts, table = np.maximum(counts, _LEAST), None if self.rows is None else self.rows.units
        if table is None or table.shape[2] != width:
            table = torch.full((MOST_RESIDENT, len(self._layout.names), width), NO_UNIT, device=self._unet.device)
        try:
            # one after the other, those that become smaller first: only one is there twice
            more = (counts - self._sizes()) * self._unit_bytes
            for kind in np.argsort(more, kind="stable").tolist():
                if more[kind]:
                    self._resize(kind, int(counts[kind]))
        finally:
            if all(map(len, self._up)):
                self.rows, self.generation = RowLoras(tuple(self._down), tuple(self._up), table), self.generation + 1
                widths = [2**n for n in range(width.bit_length()) if 2**n >= LEAST_WIDTH]
                # made here, since a captured step knows its tensors by identity
                self._narrow = {n: self.rows._replace(units=table[:, :, :n]) for n in widths}
                for place in self._at:
                    self._enter(place)

    def _resize(self, kind: int, count: int) -> None:
        """Replace the pool of a kind, with the units in use at its start."""
        place, dtype = self._unet.device, self._unet.dtype
        old = np.concatenate([np.zeros(0, np.int64), *(one.units[kind] for one in self._at.values())])
        fresh = []
        for pool in (self._down[kind], self._up[kind]):
            made = torch.zeros(count, *pool.shape[1:], dtype=dtype, device=place)
            if len(old):
                torch.index_select(pool, 0, torch.from_numpy(old).to(place), out=made[: len(old)])
            fresh.append(made)
        # nothing below fails: the pool is either the old one or the new one
        self._down[kind], self._up[kind] = fresh
        start = 0
        for one in self._at.values():
            one.units[kind] = np.arange(start, start + len(one.units[kind]))
            start += len(one.units[kind])
        self._slots[kind] = Slots(count, used=start)

    def _put(self, place: int, lora: Lora, factors: LoraFactors) -> None:
        """Copy a LoRA's factors into free units."""
        units = []
        for kind, count in enumerate(factors.units()):
            units.append(np.array(self._slots[kind].take(count), dtype=np.int64))
        self._at[place] = _Resident(lora, factors.starts, factors.counts, units)
        for kind, own in enumerate(units):
            if len(own):
                index = torch.from_numpy(own).to(self._unet.device)
                self._down[kind][index] = factors.down[kind].to(self._down[kind])
                self._up[kind][index] = factors.up[kind].to(self._up[kind])
        self._enter(place)

    def _enter(self, place: int) -> None:
        """Write a LoRA's units into the table."""
        assert self.rows is not None
        one = self._at[place]
        table = unit_table(self._layout, one.starts, one.counts, one.units, self.rows.units.shape[2])
        self.rows.units[place].copy_(torch.from_numpy(table))


@dataclass(eq=False)
class _Resident:
    """A LoRA on the device: where its units are."""

    lora: Lora
    starts: np.ndarray  # [layers]
    counts: np.ndarray  # [layers]
    units: list[np.ndarray]  # per kind: places in the pool


def _keys(loras: Sequence[Lora]) -> np.ndarray:
    return np.array([(lora.number, 0, 0, 0) for lora in loras], dtype=np.int64)
