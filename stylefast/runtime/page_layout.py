"""How one page of a style bank lies in memory: what its layers and norms hold, in one block.

A block is contiguous, so a page crosses from the host to the device in one copy. What the kernels read are strided
views of all blocks: `[blocks, tokens, heads, d]` with the stride of a block between pages. Layers stand in the order in
which they run. Tokens have the stride of the batch's own keys, which the fastest attention kernel asks for.
"""

import math

import torch

from stylefast.models.unet import UNet
from stylefast.styles.bank import StyleBank
from stylefast.styles.bank_size import BankShapes

FP8 = torch.float8_e4m3fn
_ALIGN = 64  # bytes: of every tensor in a block, and more than any kernel's vectors


class PageLayout:
    """Offsets of one page's tensors in a block of `nbytes`.

    Of every layer: "values", keys and values [2, tokens, heads, d] in `dtype`, or for store="hidden" the hidden states
    [tokens, channels]; with fp8 their "scale" [2, heads, d] or [channels]; "stats" [2, 3, heads, d], the means and
    variances of queries, keys, values. Of every group norm: "norm" [2, groups], mean and variance. All but the values
    are float32.
    """

    def __init__(self, unet: UNet, latent_size: tuple[int, int], dtype: torch.dtype, store: str = "kv"):
        self.dtype, self.store, self.nbytes = dtype, store, 0
        layers = unet.layout.layers
        height, width = latent_size
        shapes = BankShapes.from_config(unet.config, (width, height), pixels_per_latent=1)
        self.order = sorted(range(len(layers)), key=lambda i: (layers[i].module_index, i))  # as layers run
        self._places: dict[tuple[str, int], tuple[int, tuple[int, ...], torch.dtype]] = {}
        for i in self.order:
            layer = shapes.layers[i]
            hidden = store == "hidden"
            self._place("values", i, (layer.tokens, layer.channels) if hidden else (2, *layer), dtype)
            if dtype == FP8:
                self._place("scale", i, (layer.channels,) if hidden else (2, layer.heads, layer.d))
            self._place("stats", i, (2, 3, layer.heads, layer.d))
        self.norm_elements = shapes.norm_elements
        for i, groups in enumerate(shapes.groups):
            self._place("norm", i, (2, groups))

    def _place(self, what: str, index: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        self._places[what, index] = (self.nbytes, shape, dtype)
        self.nbytes += -(-math.prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN

    def view(self, blocks: torch.Tensor, what: str, index: int) -> torch.Tensor:
        """One tensor of all blocks [n, nbytes] uint8: [n, ...]."""
        start, shape, dtype = self._places[what, index]
        return blocks[:, start : start + math.prod(shape) * dtype.itemsize].view(dtype).unflatten(1, shape)

    def copies(self, bank: StyleBank, place: tuple[int, int, int], block: torch.Tensor):
        """(sources, destinations): what brings the page at `place` (step, branch, reference) into block [nbytes]."""
        sources, destinations, one = [], [], block[None]
        for i in (i for i in self.order if i in bank.info.layers):
            values = "hidden" if self.store == "hidden" else "kv"
            sources.append(bank.tensors[f"{values}.{i}"][place])
            destinations.append(self.view(one, "values", i)[0])
            if self.dtype == FP8:
                sources.append(bank.tensors[f"scale.{i}"][place])
                destinations.append(self.view(one, "scale", i)[0])
            for side, name in enumerate(("mean", "variance")):
                sources.append(bank.tensors[f"{name}.{i}"][place])
                destinations.append(self.view(one, "stats", i)[0, side])
        for i in range(len(self.norm_elements)):
            for side, name in enumerate(("norm_mean", "norm_variance")):
                sources.append(bank.tensors[f"{name}.{i}"][place])
                destinations.append(self.view(one, "norm", i)[0, side])
        return sources, destinations
