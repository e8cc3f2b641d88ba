"""How one page of a style bank lies in memory: keys, values and statistics of all layers in one block.

A block is contiguous, so a page crosses from the host to the device in one copy. What the kernels read are strided
views of all blocks: `[blocks, tokens, heads, d]` with the stride of a block between pages. Layers stand in the order in
which they run. Tokens have the stride of the batch's own keys, which the fastest attention kernel asks for.
"""

import math
from collections.abc import Sequence

import torch

from stylefast.models.unet import UNet
from stylefast.styles.bank_size import BankShapes

_ALIGN = 64  # bytes: of every tensor in a block, and more than any kernel's vectors


class PageLayout:
    """Offsets of one page's tensors.

    `kv[layer]` are keys and values in `dtype`, or `hidden[layer]` the hidden states; `stats[layer]` means and variances
    of queries, keys, values; `norms[i]` the mean and variance of group norm i's groups, in float32.
    """

    def __init__(self, unet: UNet, latent_size: tuple[int, int], dtype: torch.dtype):
        self.dtype, self.nbytes = dtype, 0
        layers = unet.layout.layers
        height, width = latent_size
        shapes = BankShapes.from_config(unet.config, (width, height), pixels_per_latent=1)
        self.order = sorted(range(len(layers)), key=lambda i: (layers[i].module_index, i))  # as layers run
        self.kv: list[tuple[int, tuple]] = [(0, ())] * len(layers)
        self.stats: list[tuple[int, tuple]] = [(0, ())] * len(layers)
        for i in self.order:
            layer = shapes.layers[i]
            self.kv[i] = self._place((2, *layer), dtype)
            self.stats[i] = self._place((2, 3, layer.heads, layer.d), torch.float32)
        self.norm_elements = shapes.norm_elements
        self.norms = [self._place((2, groups), torch.float32) for groups in shapes.groups]

    def _place(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, tuple]:
        start = self.nbytes
        size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
        self.nbytes += -(-size // _ALIGN) * _ALIGN
        return start, shape

    def kv_view(self, blocks: torch.Tensor, layer: int) -> torch.Tensor:
        """Keys and values [blocks, 2, tokens, heads, d] of blocks [n, nbytes] uint8."""
        return _view(blocks, self.kv[layer], self.dtype)

    def stats_view(self, blocks: torch.Tensor, layer: int) -> torch.Tensor:
        """Means and variances [blocks, 2, 3, heads, d]."""
        return _view(blocks, self.stats[layer], torch.float32)

    def norm_view(self, blocks: torch.Tensor, index: int) -> torch.Tensor:
        """Mean and variance [blocks, 2, groups]."""
        return _view(blocks, self.norms[index], torch.float32)


def _view(blocks: torch.Tensor, place: tuple[int, Sequence[int]], dtype: torch.dtype) -> torch.Tensor:
    start, shape = place
    size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    return blocks[:, start : start + size].view(dtype).unflatten(1, shape)
