"""Pages of style banks on the device: which are resident, which are in use, and how missing ones are loaded.

A page holds one reference's features for one step and branch. `PagePool` does the bookkeeping (pins, least recently
used evicted first); this module copies the bytes. On a GPU pages are copied from pinned host memory on a separate
stream, a step ahead of their use, and from the bank's file into pinned memory a step before that; on a CPU they are
copied when they are held. The first pages of a request are brought before it joins. The bank's type may differ from the
model's, and hidden states are projected to keys and values while loading, so the kernels always read the same format.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from stylefast.errors import OutOfMemory
from stylefast.kernels.dequantise import dequantise
from stylefast.models.row_loras import LoraProducts
from stylefast.models.row_table import StylePages
from stylefast.models.stored_tensors import Span
from stylefast.models.unet import UNet
from stylefast.runtime.banks.host_pages import HostPages
from stylefast.runtime.banks.page_pool import Claim, PageLayout, PagePool, PoolFull, PoolStats
from stylefast.sampling.guidance import BRANCHES
from stylefast.styles.bank import StyleBank


class PageKey(NamedTuple):
    """A page of a bank: which one, and the LoRAs of its readers, under which hidden states are projected."""

    bank: StyleBank
    step: int
    branch: int  # index in BRANCHES
    reference: int  # number of the bank's reference
    loras: LoraProducts | None = None


class BankPages:
    """Slots for pages of one latent size.

    The UNet reads `pages`, views of the tensors in `by_name`; exported graphs read `by_name`, by the names of
    `PageLayout`. All keep their addresses until the pool grows. The device holds `slots` pages, and the tier between
    file and device as many as fit into `host_room` bytes; 0: pages come straight from the bank's tensors.
    """

    def __init__(self, unet: UNet, latent_size: tuple[int, int], slots: int, host_room: int = 0):
        self._unet, self.latent_size = unet, latent_size
        self.layout = PageLayout(unet, latent_size, unet.dtype)
        self._layouts = {("kv", unet.dtype): self.layout}
        self._attentions = [unet.block(layer.name).attn1 for layer in unet.layout.layers]
        on_gpu = unet.device.type == "cuda"
        self._stream = torch.cuda.Stream(unet.device) if on_gpu else None
        self._stage = torch.zeros(0, dtype=torch.uint8, device=unet.device)
        self._banks: weakref.WeakValueDictionary[int, StyleBank] = weakref.WeakValueDictionary()  # by id
        # pins to return once the device has passed an event: pages read by a step, blocks read by a copy
        self._leaving: deque[tuple[torch.cuda.Event, np.ndarray]] = deque()
        self._copying: deque[tuple[torch.cuda.Event, np.ndarray]] = deque()
        self._loading = threading.Lock()  # held while `stage` loads a page alongside steps, and while slots change
        self.loads = 0  # pages brought to the device so far
        self._make(slots)
        host = HostPages(host_room, self.layout.nbytes, pinned=on_gpu) if host_room else None
        self._host = host if host is not None and host.blocks else None

    def _make(self, slots: int) -> None:
        parts, self._pool, self.slots = self.layout.allocate(slots, self._unet.device), PagePool(slots), slots
        self._parts = parts
        self.by_name = {part.name: held for part, held in zip(self.layout.parts, parts, strict=True)}
        self._kv = [self.layout.view(parts, "values", i) for i in range(len(self._unet.layout.layers))]
        self.pages = _style_pages(self._unet, self.layout, parts)
        if self._stream is not None:
            # zeroing the slots runs on the current stream and must finish before the first page is copied
            self._stream.wait_stream(torch.cuda.current_stream(self._unet.device))

    def expected(self, banks: Iterable[StyleBank]) -> int:
        """Count the pages of these banks and of all live banks read here before; 0 if none is new."""
        new = {bank.id: bank for bank in banks if bank.id not in self._banks}
        self._banks.update(new)
        return pages_of(self._banks.values()) if new else 0

    def grow(self, slots: int) -> None:
        """Replace the pool by one of `slots` slots; its pages must be loaded again.

        This replaces the tensors in `pages` and `by_name`. The old ones are freed first, so that both need not fit at
        once. Call it between steps. Raises PyTorch's error if memory runs out; the pool is then as large as before, or
        has 0 slots and is unusable if even that no longer fits.
        """
        with self._loading:
            before = self.slots
            if self._stream is not None:
                # copies in progress write to memory that the current stream may soon reuse
                torch.cuda.current_stream(self._unet.device).wait_stream(self._stream)
            self._leaving.clear()
            self._parts, self.by_name, self._kv, self.pages, self.slots = [], {}, [], None, 0
            try:
                self._make(slots)
            except BaseException:
                self._make(before)
                raise

    @property
    def nbytes(self) -> int:
        """Return the bytes of all slots."""
        return sum(part.nbytes for part in self._parts)

    @property
    def host_bytes(self) -> int:
        """Return the bytes that the pinned host tier has allocated so far."""
        return 0 if self._host is None else self._host.nbytes

    @property
    def reads_ahead(self) -> bool:
        """Return whether `prefetch` has an effect; not on a CPU, where there is no computation to overlap with."""
        return self._stream is not None or self._host is not None

    def stats(self) -> PoolStats:
        """Return the pool's counts: slots, resident, pinned pages, hits, misses, evictions."""
        self._reap()
        return self._pool.stats()

    def counts(self) -> PoolStats:
        """Return the same for any thread, before what the device has finished reading is counted as unpinned."""
        return self._pool.stats()

    def hold(self, keys: Sequence[PageKey]) -> np.ndarray:
        """Pin pages, load missing ones, and return their slots [n] int64, in the order of `keys`.

        A key may occur several times. Raises OutOfMemory, holding none, if there are more distinct pages than slots.
        """
        if not keys:
            return np.zeros(0, dtype=np.int64)
        numbers = _numbers(keys)
        for _ in range(2):  # a page that `stage` could not load is tried again here, which says why
            claim = self._claim(numbers)
            try:
                self._bring(keys, claim)
            except BaseException:
                self._pool.release(numbers)
                raise
            if self._pool.wait(claim.slots):
                return claim.slots
            self._pool.release(numbers)
        raise OutOfMemory("a page that another thread was loading could not be loaded; try again")

    def stage(self, keys: Sequence[PageKey], later: Sequence[PageKey] = ()) -> Iterator[Callable[[], object]]:
        """Load the first pages of a request before it joins, as far as unpinned slots allow.

        To be advanced between steps: yields calls that may run alongside steps. `later` are the pages of the step after
        it, which are loaded into pinned memory only. Nothing stays pinned, so it can be dropped at any time. The calls
        raise StyleError if the bank's file can't be read or was modified.
        """
        if self._host is not None and self._absent(keys):
            self._stage_on_host([*keys, *later])
            loads = self._host.loading(_numbers([*keys, *later]))
            if loads:
                yield partial(wait, loads)
            if self._stream is not None:
                self.prefetch([key for key in keys if self._host.holds(_numbers([key])[0])])
        if self._absent(keys):
            yield partial(self._load_beside, keys)

    def prefetch(self, keys: Sequence[PageKey], later: Sequence[PageKey] = ()) -> None:
        """Start loading pages that will be held soon, as far as unpinned slots allow.

        `keys` are those of the next step, `later` of the one after it, which are loaded into pinned memory only. Pages
        that are still being read there are left to the step. Does nothing unless `reads_ahead`.
        """
        if self._stream is not None:
            self._reap()
            here = [key for key in keys if self._host is None or not self._host.loading(_numbers([key]))]
            if here:
                self._bring(here, self._pool.prefetch(_numbers(here)))
        if self._host is not None:
            self._stage_on_host(later)

    def awaited(self, keys: Sequence[PageKey]) -> bool:
        """Return whether a step would wait for pages that are being read into pinned memory."""
        return bool(self._host and keys and self._host.loading(_numbers(keys)) and self._absent(keys))

    def release(self, keys: Sequence[PageKey]) -> None:
        """Unpin pages once the step that reads them was launched; on a GPU they stay pinned until it has run."""
        if not keys:
            return
        if self._stream is None:
            self._pool.release(_numbers(keys))
            return
        self._leaving.append((_event(torch.cuda.current_stream(self._unet.device)), _numbers(keys)))
        self._reap()

    def drop(self, bank: StyleBank) -> None:
        """Forget the pages of a bank; those in use are removed when they are released."""
        self._pool.drop(bank.id)
        if self._host is not None:
            self._host.drop(bank.id)

    def clear(self) -> None:
        """Forget all unused pages."""
        self._reap()
        self._pool.clear()

    def close(self) -> None:
        """Stop background threads."""
        if self._host is not None:
            self._host.close()

    def _claim(self, numbers: np.ndarray) -> Claim:
        try:
            return self._acquire(numbers)
        except PoolFull as error:
            raise OutOfMemory(
                f"{len(set(map(tuple, numbers.tolist())))} pages of style banks are needed in one step at "
                f"{self.latent_size[1]}x{self.latent_size[0]} latents, but only {self.slots} fit ({error}); raise "
                "bank_memory, or ask for fewer styles at once"
            ) from None

    def _acquire(self, numbers: np.ndarray) -> Claim:
        self._reap()
        while True:
            try:
                return self._pool.acquire(numbers)
            except PoolFull:
                if not self._leaving:
                    raise
                self._leaving[0][0].synchronize()
                self._reap()

    def _reap(self) -> None:
        """Unpin pages and blocks that the device has finished reading."""
        while self._leaving and self._leaving[0][0].query():
            self._pool.release(self._leaving.popleft()[1])
        while self._host is not None and self._copying and self._copying[0][0].query():
            self._host.release(self._copying.popleft()[1])

    def _absent(self, keys: Sequence[PageKey]) -> bool:
        """Return whether any of these pages has no slot."""
        here = {page[:4] for page in self._pool.pages() if not page.stale}
        return any(tuple(number) not in here for number in _numbers(keys).tolist())

    def _stage_on_host(self, keys: Sequence[PageKey]) -> None:
        """Start loading pages into pinned memory, as far as there is room."""
        assert self._host is not None
        for layout in {id(self._layout_of(bank)): self._layout_of(bank) for bank, *_ in keys}.values():
            fitting = [key for key in keys if self._layout_of(key[0]) is layout and self._staged(layout)]
            if fitting:
                places = [_place(key) for key in fitting]
                self._host.stage(_numbers(fitting), [bank for bank, *_ in fitting], places, layout)

    @torch.inference_mode()
    def _load_beside(self, keys: Sequence[PageKey]) -> None:
        """Load absent pages straight from their bank's tensors; may run alongside steps."""
        for key in keys:
            with self._loading:
                claim = self._pool.prefetch(_numbers([key]))
                if not claim.claimed[0]:
                    continue
                try:
                    self._fill(key, int(claim.slots[0]), None, beside=True)
                    if self._stream is not None:
                        self._stream.synchronize()
                except BaseException:
                    self._pool.failed(claim.slots)
                    raise
                self._pool.filled(claim.slots)

    @torch.inference_mode()
    def _bring(self, keys: Sequence[PageKey], claim: Claim) -> None:
        """Fill the claimed slots, and make the current stream wait for them."""
        claimed = [int(i) for i in np.flatnonzero(claim.claimed)]
        pending = [int(claim.slots[i]) for i in claimed]
        try:
            for i, slot in zip(claimed, list(pending)):
                self._fetch(keys[i], slot)
                self._pool.filled(np.array([slot]))
                pending.remove(slot)
        except BaseException:
            if pending:
                self._pool.failed(np.array(pending))
            raise
        if claimed and self._stream is not None:
            torch.cuda.current_stream(self._unet.device).wait_stream(self._stream)

    def _fetch(self, key: PageKey, slot: int) -> None:
        """Load one page into a slot, through pinned memory if available."""
        bank, number = key[0], _numbers([key])[0]
        layout = self._layout_of(bank)
        block = None
        host = self._host if self._staged(layout) else None
        if host is not None:
            block = host.hold(number, bank, _place(key), layout)
        try:
            self._fill(key, slot, block)
        except BaseException:
            if host is not None and block is not None:
                host.release(number)
            raise
        if host is None or block is None:
            return
        if self._stream is None:
            host.release(number)
        else:
            self._copying.append((_event(self._stream), number))

    def _fill(self, key: PageKey, slot: int, block: torch.Tensor | None, beside: bool = False) -> None:
        """Copy one page into a slot from its host block, or without one from its bank.

        beside: not in the thread of the steps, whose staging buffer may be in use.
        """
        bank, layout = key.bank, self._layout_of(key.bank)
        own = layout is self.layout
        with torch.cuda.stream(self._stream):
            if own:
                target, page = self._parts, slot
            else:
                target, page = layout.allocate(1, self._unet.device) if beside else self._staging(layout), 0
            if block is not None:
                for part, source in zip(target, layout.split(block[None])):
                    part[page].copy_(source[0], non_blocking=True)
            else:
                _copy_all(*layout.copies(bank, _place(key), target, page))
            if not own:
                self._unpack(key, layout, target, slot)
        self.loads += 1

    def _unpack(self, key: PageKey, layout: PageLayout, parts: Sequence[torch.Tensor], slot: int) -> None:
        """Convert a page on the device from another layout to the model's own, in a slot."""
        # copy whole parts: copying per layer would take hundreds of small launches per page
        there = {part.name: stored[0] for part, stored in zip(layout.parts, parts, strict=True)}
        states: dict[int, torch.Tensor] = {}  # hidden states by level
        for name, held in self.by_name.items():
            scale = there.get(name.replace("page_kv_", "page_scale_"))
            if not name.startswith("page_kv_"):
                held[slot].copy_(there[name])
            elif layout.store == "hidden":
                states[int(name.removeprefix("page_kv_"))] = _restored(there[name], scale, self._unet.dtype)
            elif scale is not None:
                # [layers, 2, tokens, heads, d] scaled by [layers, 2, heads, d]
                stored, out = (x.flatten(3).flatten(0, 1) for x in (there[name], held[slot]))
                dequantise(stored, scale.flatten(2).flatten(0, 1), out)
            else:
                held[slot].copy_(there[name])
        for level, hidden in states.items():
            for place, layer in enumerate(self._unet.layout.at_level(level)):
                if layer in key.bank.info.layers:
                    k, v = self._attentions[layer].key_values(hidden[place][None], key.loras)
                    self._kv[layer][slot, 0], self._kv[layer][slot, 1] = k[0], v[0]

    def _staging(self, layout: PageLayout) -> list[torch.Tensor]:
        """Return a device buffer for one page of another layout, split into its parts."""
        if self._stage.numel() < layout.nbytes:
            # allocated on the stream that fills it: the caller has made it current
            self._stage = torch.zeros(layout.nbytes, dtype=torch.uint8, device=self._unet.device)
        return layout.split(self._stage[None, : layout.nbytes])

    def _layout_of(self, bank: StyleBank) -> PageLayout:
        kind = (bank.info.store, getattr(torch, bank.info.dtype))
        if kind not in self._layouts:
            self._layouts[kind] = PageLayout(self._unet, self.latent_size, kind[1], kind[0])
        return self._layouts[kind]

    def _staged(self, layout: PageLayout) -> bool:
        """Return whether pages of a layout fit into host blocks, which have the size of the model's own layout."""
        return layout.nbytes <= self.layout.nbytes


def _copy_all(sources: Sequence[torch.Tensor | Span], targets: Sequence[torch.Tensor]) -> None:
    """Copy tensors and file spans. Raises StyleError if a bank's file can't be read or was modified."""
    files = {}
    for source, target in zip(sources, targets):
        if isinstance(source, Span):
            files[id(source.file)] = source.file
            # files can be read only into host memory
            content = target if target.device.type == "cpu" else torch.empty(target.shape, dtype=target.dtype)
            source.file.read_into(source, content)
            source = content
        if source is not target:
            target.copy_(source, non_blocking=True)
    for file in files.values():
        file.check()


def idle_pages(unet: UNet, latent_size: tuple[int, int]) -> StylePages:
    """Return two dummy pages, never read or written, with the shapes and strides of real ones.

    They overlap in zeros of about one page's size. Compiled code that has seen them does not recompile for the first
    bank.
    """
    layout = PageLayout(unet, latent_size, unet.dtype)
    real = _style_pages(unet, layout, layout.allocate(2, torch.device("meta")))

    def reach(x: torch.Tensor) -> int:
        return x.element_size() * (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())))

    views = [*(x for pair in real.layers for x in pair), *real.means, *real.variances, *real.norm_means]
    held = torch.zeros(max(map(reach, views)), dtype=torch.uint8, device=unet.device).untyped_storage()

    def laid(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(0, dtype=x.dtype, device=unet.device).set_(held, 0, x.shape, x.stride())

    means, variances, norm_means, norm_variances = (tuple(map(laid, field)) for field in real[1:5])
    layers = tuple((laid(k), laid(v)) for k, v in real.layers)
    return StylePages(layers, means, variances, norm_means, norm_variances, real.norm_elements)


def _style_pages(unet: UNet, layout: PageLayout, parts: Sequence[torch.Tensor]) -> StylePages:
    """Return views of a layout's parts in the form that the UNet reads."""
    layers, norms = range(len(unet.layout.layers)), range(len(layout.norm_elements))
    kv, stats = ([layout.view(parts, what, i) for i in layers] for what in ("values", "stats"))
    norm = [layout.view(parts, "norm", i) for i in norms]
    return StylePages(
        layers=tuple((x[:, 0], x[:, 1]) for x in kv),
        # [slots, 3, heads, d] -> [3, slots, heads, d]
        means=tuple(x[:, 0].transpose(0, 1) for x in stats),
        variances=tuple(x[:, 1].transpose(0, 1) for x in stats),
        norm_means=tuple(x[:, 0] for x in norm),
        norm_variances=tuple(x[:, 1] for x in norm),
        norm_elements=layout.norm_elements,
    )


def pages_of(banks: Iterable[StyleBank]) -> int:
    """Count the pages of banks, over all steps, branches and references."""
    return sum(bank.info.steps * len(bank.info.branches) * bank.info.references for bank in banks)


def _restored(stored: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return hidden states [layers, tokens, channels] in the model's type; scale [layers, channels] for fp8."""
    if scale is None:
        return stored.to(dtype)
    return dequantise(stored, scale, torch.empty(stored.shape, dtype=dtype, device=stored.device))


def _event(stream) -> "torch.cuda.Event":
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _place(key: PageKey) -> tuple[int, int, int]:
    """Return a page's indices in its bank's tensors: (step, branch, reference)."""
    return key.step, key.bank.info.branches.index(BRANCHES[key.branch]), key.reference


def _numbers(keys: Sequence[PageKey]) -> np.ndarray:
    return np.array([(key.bank.id, key.step, key.branch, key.reference) for key in keys], dtype=np.int64)
