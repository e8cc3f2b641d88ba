"""Pages of style banks on the device: which are there, who uses them, and how the others come.

A page is what one reference offers in one step and branch. `PagePool` keeps the books (pins, least recently used first
out); this module moves the bytes. On a GPU pages come from pinned host memory on a stream of their own, a step ahead of
their use, and into pinned memory from the bank's file a step before that; on a CPU they are copied when they are held.
The bank's type may differ from the model's, and hidden states are projected to keys and values on the way in, so what
the kernels read is always the same.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from stylefast.errors import OutOfMemory
from stylefast.models.conditioning import StylePages
from stylefast.models.stored_tensors import Span
from stylefast.models.unet import UNet
from stylefast.runtime.host_pages import HostPages
from stylefast.runtime.page_layout import FP8, PageLayout
from stylefast.runtime.page_pool import PagePool, PoolFull, PoolStats
from stylefast.sampling.guidance import BRANCHES
from stylefast.styles.bank import StyleBank

# (bank, step, place in BRANCHES, which of the bank's references)
PageKey = tuple[StyleBank, int, int, int]


class BankPages:
    """Slots for pages of one latent size.

    `pages` is what the UNet reads, views of the tensors in `packed`, which exported graphs read, by the names of
    `PageLayout`; all stay where they are. `slots` pages fit, and `host_blocks` pages of the model's own type in the
    tier between file and device; 0: pages come straight from the bank's tensors.
    """

    def __init__(self, unet: UNet, latent_size: tuple[int, int], slots: int, host_blocks: int = 0):
        self._unet, self.latent_size, self.slots = unet, latent_size, slots
        self.layout, self._pool = PageLayout(unet, latent_size, unet.dtype), PagePool(slots)
        self._layouts = {("kv", unet.dtype): self.layout}
        self._parts = self.layout.allocate(slots, unet.device)
        self.packed = {part.name: held for part, held in zip(self.layout.parts, self._parts, strict=True)}
        layers, norms = range(len(unet.layout.layers)), range(len(self.layout.norm_elements))
        self._kv = [self.layout.view(self._parts, "values", i) for i in layers]
        self._stats = [self.layout.view(self._parts, "stats", i) for i in layers]
        self._norms = [self.layout.view(self._parts, "norm", i) for i in norms]
        self.pages = StylePages(
            layers=tuple((kv[:, 0], kv[:, 1]) for kv in self._kv),
            # [slots, 3, heads, d] -> [3, slots, heads, d]
            means=tuple(stats[:, 0].transpose(0, 1) for stats in self._stats),
            variances=tuple(stats[:, 1].transpose(0, 1) for stats in self._stats),
            norm_means=tuple(norm[:, 0] for norm in self._norms),
            norm_variances=tuple(norm[:, 1] for norm in self._norms),
            norm_elements=self.layout.norm_elements,
        )
        self._attentions = [unet.get_submodule(layer.name).attn1 for layer in unet.layout.layers]
        on_gpu = unet.device.type == "cuda"
        self._stream = torch.cuda.Stream(unet.device) if on_gpu else None
        self._stage = torch.zeros(0, dtype=torch.uint8, device=unet.device)
        if on_gpu:
            # what zeroes the slots runs on the present stream, and must not come after the first page
            self._stream.wait_stream(torch.cuda.current_stream(unet.device))
        self._host = HostPages(host_blocks, self.layout.nbytes, pinned=on_gpu) if host_blocks else None
        # pins to be returned when the device has passed an event: pages read by a step, blocks read by a copy
        self._leaving: deque[tuple[torch.cuda.Event, np.ndarray]] = deque()
        self._copying: deque[tuple[torch.cuda.Event, np.ndarray]] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(part.nbytes for part in self._parts)

    @property
    def host_bytes(self) -> int:
        """Bytes of the tier in pinned host memory."""
        return 0 if self._host is None else self._host.nbytes

    def stats(self) -> PoolStats:
        """What the pool holds: slots, resident, pinned pages, hits, misses, evictions."""
        self._reap()
        return self._pool.stats()

    def hold(self, keys: Sequence[PageKey]) -> np.ndarray:
        """Pin pages, bring those that are absent, and return their slots [n] int64, in the order of `keys`.

        A key may occur several times. Raises OutOfMemory if there are more different pages than slots, holding none.
        """
        if not keys:
            return np.zeros(0, dtype=np.int64)
        numbers = _numbers(keys)
        try:
            claim = self._acquire(numbers)
        except PoolFull as error:
            raise OutOfMemory(
                f"{len(set(map(tuple, numbers.tolist())))} pages of style banks are wanted in one step at "
                f"{self.latent_size[1]}x{self.latent_size[0]} latents and {self.slots} fit ({error}); raise "
                "bank_memory, or ask for fewer styles at once"
            ) from None
        try:
            self._bring(keys, claim)
        except BaseException:
            self._pool.release(numbers)
            raise
        if not self._pool.wait(claim.slots):
            self._pool.release(numbers)
            raise OutOfMemory("a page that another thread was loading could not be loaded; try again")
        return claim.slots

    def prefetch(self, keys: Sequence[PageKey], later: Sequence[PageKey] = ()) -> None:
        """Start to bring pages that will be held soon, as far as there is room that nobody uses.

        `keys` are those of the next step, `later` of the one after it, which come into pinned memory only. Without a
        tier in host memory and a device to overlap with, there is nothing to gain and nothing is done.
        """
        if self._stream is not None and keys:
            self._reap()
            self._bring(keys, self._pool.prefetch(_numbers(keys)))
        if self._host is not None:
            for layout in {id(self._layout_of(bank)): self._layout_of(bank) for bank, *_ in later}.values():
                fitting = [key for key in later if self._layout_of(key[0]) is layout and self._staged(layout)]
                if fitting:
                    places = [_place(key) for key in fitting]
                    self._host.stage(_numbers(fitting), [bank for bank, *_ in fitting], places, layout)

    def release(self, keys: Sequence[PageKey]) -> None:
        """Unpin pages once the step that reads them was launched; on a GPU they stay until it has run."""
        if not keys:
            return
        if self._stream is None:
            self._pool.release(_numbers(keys))
            return
        self._leaving.append((_event(torch.cuda.current_stream(self._unet.device)), _numbers(keys)))
        self._reap()

    def drop(self, bank: StyleBank) -> None:
        """Forget the pages of a bank; those in use go when they are released."""
        self._pool.drop(bank.id)
        if self._host is not None:
            self._host.drop(bank.id)

    def clear(self) -> None:
        """Forget all pages that nobody uses."""
        self._reap()
        self._pool.clear()

    def close(self) -> None:
        """Stop what runs in the background."""
        if self._host is not None:
            self._host.close()

    def _acquire(self, numbers: np.ndarray):
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
        """Unpin what the device has finished reading."""
        while self._leaving and self._leaving[0][0].query():
            self._pool.release(self._leaving.popleft()[1])
        while self._copying and self._copying[0][0].query():
            self._host.release(self._copying.popleft()[1])

    @torch.inference_mode()
    def _bring(self, keys: Sequence[PageKey], claim) -> None:
        """Fill the slots that were claimed, and make the present stream wait for them."""
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
        """Bring one page into a slot, through pinned memory where there is some."""
        bank, number = key[0], _numbers([key])[0]
        layout = self._layout_of(bank)
        block = None
        if self._host is not None and self._staged(layout):
            block = self._host.hold(number, bank, _place(key), layout)
        own = layout is self.layout
        with torch.cuda.stream(self._stream):
            target, page = (self._parts, slot) if own else (self._staging(layout), 0)
            if block is not None:
                for part, source in zip(target, layout.split(block[None])):
                    part[page].copy_(source[0], non_blocking=True)
            else:
                _copy_all(*layout.copies(bank, _place(key), target, page))
            if not own:
                self._unpack(bank, layout, target, slot)
        if block is None:
            return
        if self._stream is None:
            self._host.release(number)
        else:
            self._copying.append((_event(self._stream), number))

    def _unpack(self, bank: StyleBank, layout: PageLayout, parts: Sequence[torch.Tensor], slot: int) -> None:
        """From the one page of another layout on the device to a slot of the model's own."""
        for i in bank.info.layers:
            values = layout.view(parts, "values", i)[0]
            if layout.dtype == FP8:
                scale = layout.view(parts, "scale", i)[0]
                # keys and values [2, tokens, heads, d] by [2, heads, d]; hidden states [tokens, channels] by [channels]
                values = values.float() * (scale if layout.store == "hidden" else scale[:, None])
            if layout.store == "hidden":
                k, v = self._attentions[i].key_values(values.to(self._unet.dtype)[None])
                self._kv[i][slot, 0], self._kv[i][slot, 1] = k[0], v[0]
            else:
                self._kv[i][slot].copy_(values)
            self._stats[i][slot].copy_(layout.view(parts, "stats", i)[0])
        for i, norm in enumerate(self._norms):
            norm[slot].copy_(layout.view(parts, "norm", i)[0])

    def _staging(self, layout: PageLayout) -> list[torch.Tensor]:
        """Parts of one page of another layout on the device, for one page at a time."""
        if self._stage.numel() < layout.nbytes:
            # on the stream that fills it, within whose context this is called
            self._stage = torch.zeros(layout.nbytes, dtype=torch.uint8, device=self._unet.device)
        return layout.split(self._stage[None, : layout.nbytes])

    def _layout_of(self, bank: StyleBank) -> PageLayout:
        kind = (bank.info.store, getattr(torch, bank.info.dtype))
        if kind not in self._layouts:
            self._layouts[kind] = PageLayout(self._unet, self.latent_size, kind[1], kind[0])
        return self._layouts[kind]

    def _staged(self, layout: PageLayout) -> bool:
        """Whether pages of a layout fit into the blocks of the host tier; wider ones than the model's own don't."""
        return layout.nbytes <= self.layout.nbytes


def _copy_all(sources: Sequence[torch.Tensor | Span], targets: Sequence[torch.Tensor]) -> None:
    """Copy tensors and parts of files. Raises StyleError for a bank whose file can't be read or was written to."""
    files = {}
    for source, target in zip(sources, targets):
        if isinstance(source, Span):
            files[id(source.file)] = source.file
            # a device can't be read into
            content = target if target.device.type == "cpu" else torch.empty(target.shape, dtype=target.dtype)
            source.file.read_into(source, content)
            source = content
        if source is not target:
            target.copy_(source, non_blocking=True)
    for file in files.values():
        file.check()


def _event(stream) -> "torch.cuda.Event":
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _place(key: PageKey) -> tuple[int, int, int]:
    """Where a page stands in its bank's tensors: (step, branch, reference)."""
    bank, step, branch, number = key
    return step, bank.info.branches.index(BRANCHES[branch]), number


def _numbers(keys: Sequence[PageKey]) -> np.ndarray:
    return np.array([(bank.id, step, branch, number) for bank, step, branch, number in keys], dtype=np.int64)
