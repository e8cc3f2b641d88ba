"""Attention maps of one picture, recorded while its rows run and only then.

What a point of a picture reads of a reference is the shared attention's softmax (`kernels/shared_attention.py`) for
that point's query, as in the figure of StyleAligned (arXiv 2312.02133) that shows it. What an image prompt does is the
share of the cross-attention's output that it adds, at every point of the picture.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stylefast.kernels.gated_cross_attention import ImageSegments
from stylefast.kernels.gated_cross_attention import operation as gated_cross_attention
from stylefast.kernels.shared_attention_torch import CONCAT, PLAIN
from stylefast.models.row_features import Recorder
from stylefast.models.row_table import CrossInputs, SelfInputs
from stylefast.models.unet import adain


class SharedMap(NamedTuple):
    """Where one query reads, averaged over heads; all probabilities together are 1."""

    layer: int
    own: Tensor | None  # [h, w] fp32; None where the mode is swap, which does not read own tokens
    references: tuple[Tensor, ...]  # [h, w] of each reference


class ImageMap(NamedTuple):
    """Share, 0 to 1, of a cross-attention's output that comes from image prompts."""

    layer: int
    share: Tensor  # [h, w] fp32


class AttentionMaps(Recorder):
    """Maps of one step for one picture of a call of the UNet.

    picture, branch: whose row it is, as in `StepColumns.branch_rows`. point: (x, y) as fractions of the picture, in
    [0, 1). sizes: feature maps (h, w) of all layers. layers: indices of those that are wanted.

    `shared` and `image` are filled while the UNet runs; layers in which the row shares nothing are left out, and both
    are empty in steps in which the branch does not run.
    """

    def __init__(
        self,
        picture: int,
        branch: int,
        point: tuple[float, float],
        sizes: Sequence[tuple[int, int]],
        layers: Sequence[int],
    ):
        self._place, self._point, self._sizes, self._layers = (picture, branch), point, sizes, frozenset(layers)
        self._row = -1
        self.shared: list[SharedMap] = []
        self.image: list[ImageMap] = []

    def keep_rows(self, branch_rows: Tensor) -> None:
        """Find the picture's row."""
        self._row = int(branch_rows[self._place])

    def keep_attention(self, layer: int, inputs: SelfInputs, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Compute the softmax of the point's query in one self-attention layer."""
        row, (pages, modes, scales, shifts, bias) = self._row, inputs.references
        used = [] if row < 0 else [r for r in range(pages.shape[1]) if int(pages[row, r]) >= 0]
        if layer not in self._layers or not used or int(modes[row]) == PLAIN:
            return
        height, width = self._sizes[layer]
        token = int(self._point[1] * height) * width + int(self._point[0] * width)
        gain, offset = (part[:2, row] for part in adain(q, k, v, inputs))
        query = q[row, token].float() * gain[0] + offset[0]
        keys, logits = [], []
        if int(modes[row]) == CONCAT:
            keys.append(k[row].float() * gain[1] + offset[1])
            logits.append(self._logits(query, keys[0]))
        for r in used:
            page = int(pages[row, r])
            read = k[page] if page < len(k) or inputs.pool is None else inputs.pool.k[page - len(k)]
            found = self._logits(query, read.float()) * scales[row, r] + shifts[row, r]
            logits.append(found if bias is None else found + bias[page, : len(read)])
        lengths = [part.shape[-1] for part in logits]
        # a row that sees no token reads nothing
        weights = torch.softmax(torch.cat(logits, -1), -1).nan_to_num(0.0).mean(0)
        parts = [part.cpu().reshape(height, width) for part in weights.split(lengths)]
        own = parts.pop(0) if keys else None
        self.shared.append(SharedMap(layer, own, tuple(parts)))

    def keep_cross(self, layer: int, inputs: CrossInputs, q: Tensor) -> None:
        """Compute what image prompts add to one cross-attention layer."""
        row, images = self._row, inputs.images
        if row < 0 or layer not in self._layers or images is None:
            return
        if not bool(((images.page[row] >= 0) & (images.strength[row] != 0)).any()):
            return
        one = slice(row, row + 1)
        text = (inputs.text_k, inputs.text_v, inputs.text_page[one], inputs.text_lengths)
        whole = gated_cross_attention.run(q[one], *text, _of_row(images, one))[0].float()
        without = gated_cross_attention.run(q[one], *text, None)[0].float()
        added, rest = (part.flatten(1).norm(dim=-1) for part in (whole - without, without))
        share = added / (added + rest).clamp(min=torch.finfo(torch.float32).tiny)
        self.image.append(ImageMap(layer, share.cpu().reshape(self._sizes[layer])))

    @staticmethod
    def _logits(query: Tensor, keys: Tensor) -> Tensor:  # [heads, d], [tokens, heads, d] -> [heads, tokens]
        return torch.einsum("hd,khd->hk", query, keys) / math.sqrt(query.shape[-1])


def _of_row(images: ImageSegments, one: slice) -> ImageSegments:
    index = None if images.mask_index is None else images.mask_index[one]
    return images._replace(
        page=images.page[one], strength=images.strength[one].contiguous(), group=images.group[one], mask_index=index
    )
