"""Pages of style banks on the device: which are there, who uses them, and how the others come.

A page is what one reference offers in one step and branch. `PagePool` keeps the books (pins, least recently used first
out); this module moves the bytes. On a GPU pages come through pinned host memory on a stream of their own, a step ahead
of their use; on a CPU they are copied when they are held. The bank's type may differ from the model's, and a bank of
hidden states is projected to keys and values on the way in, so what the kernels read is always the same.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from stylefast.errors import OutOfMemory
from stylefast.models.conditioning import StylePages
from stylefast.models.unet import UNet
from stylefast.runtime.page_layout import PageLayout
from stylefast.runtime.page_pool import PagePool, PoolFull
from stylefast.sampling.guidance import BRANCHES
from stylefast.styles.bank import StyleBank

# (bank, step, place in BRANCHES, which of the bank's references)
PageKey = tuple[StyleBank, int, int, int]


class BankPages:
    """Slots for pages of one latent size.

    `pages` is what the UNet reads; its tensors stay where they are. `slots` pages fit.
    """

    def __init__(self, unet: UNet, latent_size: tuple[int, int], slots: int):
        self._unet, self.latent_size = unet, latent_size
        self.layout = PageLayout(unet, latent_size, unet.dtype)
        self.slots, self._pool = slots, PagePool(slots)
        self._blocks = torch.zeros(slots, self.layout.nbytes, dtype=torch.uint8, device=unet.device)
        self._stats = [self.layout.stats_view(self._blocks, i) for i in range(len(unet.layout.layers))]
        self._norms = [self.layout.norm_view(self._blocks, i) for i in range(len(self.layout.norm_elements))]
        self._kv = [self.layout.kv_view(self._blocks, i) for i in range(len(unet.layout.layers))]
        self.pages = StylePages(
            layers=tuple((kv[:, 0], kv[:, 1]) for kv in self._kv),
            # [blocks, 3, heads, d] -> [3, blocks, heads, d]
            means=tuple(stats[:, 0].transpose(0, 1) for stats in self._stats),
            variances=tuple(stats[:, 1].transpose(0, 1) for stats in self._stats),
            norm_means=tuple(norm[:, 0] for norm in self._norms),
            norm_variances=tuple(norm[:, 1] for norm in self._norms),
            norm_elements=self.layout.norm_elements,
        )
        self._attentions = [unet.get_submodule(layer.name).attn1 for layer in unet.layout.layers]
        self._stream = torch.cuda.Stream(unet.device) if unet.device.type == "cuda" else None
        self._leaving: deque[tuple[torch.cuda.Event, np.ndarray]] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._blocks.numel()

    def stats(self) -> dict[str, int]:
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
        self._bring(keys, claim)
        if not self._pool.wait(claim.slots):
            self._pool.release(numbers)
            raise OutOfMemory("a page that another thread was loading could not be loaded; try again")
        return claim.slots

    def prefetch(self, keys: Sequence[PageKey]) -> None:
        """Start to bring pages that will be held soon, as far as there is room that nobody uses."""
        if keys and self._stream is not None:
            self._reap()
            self._bring(keys, self._pool.prefetch(_numbers(keys)))

    def release(self, keys: Sequence[PageKey]) -> None:
        """Unpin pages once the step that reads them was launched; on a GPU they stay until it has run."""
        if not keys:
            return
        if self._stream is None:
            self._pool.release(_numbers(keys))
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._unet.device))
        self._leaving.append((event, _numbers(keys)))
        self._reap()

    def drop(self, bank: StyleBank) -> None:
        """Forget the pages of a bank; those in use go when they are released."""
        self._pool.drop(bank.id)

    def clear(self) -> None:
        """Forget all pages that nobody uses."""
        self._reap()
        self._pool.clear()

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

    @torch.inference_mode()
    def _bring(self, keys: Sequence[PageKey], claim) -> None:
        """Fill the slots that were claimed, and make the present stream wait for them."""
        claimed = [i for i in range(len(keys)) if claim.claimed[i]]
        pending = [int(claim.slots[i]) for i in claimed]
        try:
            if self._stream is None:
                for i, slot in zip(claimed, list(pending)):
                    self._copy(keys[i], slot)
                    self._pool.filled(np.array([slot]))
                    pending.remove(slot)
                return
            for i, slot in zip(claimed, list(pending)):
                with torch.cuda.stream(self._stream):
                    self._copy(keys[i], slot)
                self._pool.filled(np.array([slot]))
                pending.remove(slot)
            torch.cuda.current_stream(self._unet.device).wait_stream(self._stream)
        except BaseException:
            if pending:
                self._pool.failed(np.array(pending))
            raise

    def _copy(self, key: PageKey, slot: int) -> None:
        bank, step, branch, number = key
        place = (step, bank.info.branches.index(BRANCHES[branch]), number)
        stored = set(bank.info.layers)
        for layer in self.layout.order:
            if layer not in stored:
                continue
            self._kv[layer][slot].copy_(self._keys_and_values(bank, layer, place), non_blocking=True)
            for i, name in enumerate(("mean", "variance")):
                self._stats[layer][slot, i].copy_(bank.tensors[f"{name}.{layer}"][place], non_blocking=True)
        for i, norm in enumerate(self._norms):
            norm[slot, 0].copy_(bank.tensors[f"norm_mean.{i}"][place], non_blocking=True)
            norm[slot, 1].copy_(bank.tensors[f"norm_variance.{i}"][place], non_blocking=True)

    def _keys_and_values(self, bank: StyleBank, layer: int, place: tuple[int, int, int]) -> torch.Tensor:
        """[2, tokens, heads, d] in any type, on the device where it must be computed."""
        hidden = bank.info.store == "hidden"
        values = bank.tensors[f"{'hidden' if hidden else 'kv'}.{layer}"][place]
        if f"scale.{layer}" in bank.tensors:
            scale = bank.tensors[f"scale.{layer}"][place].to(self._unet.device, non_blocking=True)
            values = values.to(self._unet.device, non_blocking=True).float()
            # kv: [2, tokens, heads, d] by [2, heads, d]; hidden: [tokens, channels] by [channels]
            values = values * (scale if hidden else scale[:, None])
        if not hidden:
            return values
        attention = self._attentions[layer]
        k, v = attention.key_values(values.to(self._unet.device, self._unet.dtype, non_blocking=True)[None])
        return torch.stack([k[0], v[0]])


def _numbers(keys: Sequence[PageKey]) -> np.ndarray:
    return np.array([(bank.id, step, branch, number) for bank, step, branch, number in keys], dtype=np.int64)
