"""Memory layout of one page of a style bank: its layers and norms, grouped into a few parts.

On the device every part is a dense tensor whose first dimension is the page's slot: keys and values of an attention
level, statistics of a level, group norms. Exported graphs read the parts; the kernels read views of one layer, `[slots,
tokens, heads, d]`, whose token stride equals that of the batch's own keys, as the fastest attention kernel requires. In
host memory a page is one block with all parts in a row, so that it is copied to the device in as many copies as there
are parts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from stylefast.models.unet import UNet
from stylefast.styles.bank import StyleBank
from stylefast.styles.bank_size import BankShapes

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
