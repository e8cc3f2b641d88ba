"""Inputs and stored features of the UNet's layers: text, pictures, bank pages, and the row table per layer."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from stylefast.kernels.gated_cross_attention import ImageSegments
from stylefast.kernels.shared_attention import PLAIN, Pool, References
from stylefast.kernels.token_stats import operation as token_stats
from stylefast.models.row_table import NO_PAGE, RowTable

KeyValue = tuple[torch.Tensor, torch.Tensor]  # two tensors [pages, tokens, heads, d]


class ImageKV(NamedTuple):
    """Image keys and values of every layer, padded to one token count."""

    layers: tuple[KeyValue, ...]
    lengths: torch.Tensor  # [image pages] int64: number of valid tokens


class StylePages(NamedTuple):
    """One step of a style bank: the features of reference rows that need not run."""

    layers: tuple[KeyValue, ...]  # raw keys and values per self-attention layer
    means: tuple[torch.Tensor, ...]  # per layer [3, pages, heads, d]: token means of queries, keys, values
    variances: tuple[torch.Tensor, ...]
    norm_means: tuple[torch.Tensor, ...]  # per group norm [pages, groups], in module order
    norm_variances: tuple[torch.Tensor, ...]
    norm_elements: tuple[int | None, ...]  # elements per statistic; None: as many as in the reading row


class RowFeatures:
    """Features of running rows, recorded for a style bank that lets other rows use them as a reference.

    `layers[i]` holds (hidden [rows, tokens, channels], keys, values [rows, tokens, heads, d], means, variances
    [3, rows, heads, d] of queries, keys, values) of self-attention layer i; `norms[i]` the (mean, variance)
    [rows, groups] of group norm i and `norm_elements[i]` the number of elements in each.
    """

    def __init__(self):
        self.layers: dict[int, tuple[torch.Tensor, ...]] = {}
        self.norms: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.norm_elements: dict[int, int] = {}

    def keep_attention(self, layer: int, hidden, q, k, v):
        """Record the features of one self-attention layer."""
        self.layers[layer] = (hidden, k, v, *token_stats.run([q, k, v]))

    def keep_norm(self, index: int, x, groups: int):
        """Record the statistics of group norm `index`, with biased variances as in the norm."""
        # double precision matches the norm's own sums, so that bank readers get the same result as live references
        flat = x.double().reshape(len(x), groups, -1)
        self.norms[index] = (flat.mean(-1).float(), flat.var(-1, unbiased=False).float())
        self.norm_elements[index] = flat.shape[-1]


class SelfInputs(NamedTuple):
    """Columns of the row table for one self-attention layer, and the pages it may read."""

    references: References  # mode is PLAIN if the layer is inactive
    adain_page: torch.Tensor  # [rows], NO_PAGE if the layer is inactive
    adain_strength: torch.Tensor  # [rows, 3]
    pool: Pool | None = None
    pool_stats: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)  # means, variances
    keep: Callable[..., None] | None = None  # method of `RowFeatures`, while baking a reference


class CrossInputs(NamedTuple):
    """Inputs of one cross-attention layer: text, and image segments if any."""

    text_k: torch.Tensor  # [text pages, tokens, heads, d]
    text_v: torch.Tensor
    text_page: torch.Tensor  # [rows]
    images: ImageSegments | None = None


class NormInputs(NamedTuple):
    """Pages whose statistics one group norm pools with its own."""

    page: torch.Tensor | None  # [rows]; None if no row shares
    pool: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)  # means, variances [pages, groups]
    pool_elements: int | None = 0  # elements per statistic; None: as many as in the reading row
    keep: Callable[..., None] | None = None


class LayerInputs(NamedTuple):
    """All inputs of a block other than the feature map, split by layer.

    Layers take plain tensors and no layer index, so that blocks of equal shape share one compiled region.
    """

    time: torch.Tensor  # [rows, time channels], after SiLU
    rows: RowTable
    text_kv: tuple[KeyValue, ...]
    image_kv: ImageKV | None
    pages: StylePages | None
    masks: tuple[torch.Tensor, ...]  # per attention level [masks, tokens]
    features: RowFeatures | None = None
    # computed for all layers at once: per layer, these small operations would cost as much as a small batch's attention
    modes: torch.Tensor | None = None  # [layers, rows], PLAIN if a layer is inactive
    adain_pages: torch.Tensor | None = None  # [layers, rows], NO_PAGE if a layer is inactive

    @classmethod
    def of(
        cls,
        time: torch.Tensor,
        rows: RowTable,
        text_kv: tuple[KeyValue, ...],
        image_kv: ImageKV | None,
        pages: StylePages | None,
        masks: tuple[torch.Tensor, ...],
        features: RowFeatures | None = None,
    ) -> "LayerInputs":
        """Build with the modes and AdaIN pages of every layer computed."""
        modes = adain_pages = None
        if rows.self_page.shape[1]:
            active = rows.self_layers.T
            modes = torch.where(active, rows.self_mode, PLAIN)
            adain_pages = torch.where(active, rows.adain_page, NO_PAGE)
        return cls(time, rows, text_kv, image_kv, pages, masks, features, modes, adain_pages)

    def self_attention(self, layer: int) -> SelfInputs:
        """Return the inputs of self-attention `layer`."""
        rows, pages, features = self.rows, self.pages, self.features
        mode, adain_page, pool, pool_stats = rows.self_mode, rows.adain_page, None, (None, None)
        if self.modes is not None and self.adain_pages is not None:
            mode, adain_page = self.modes[layer], self.adain_pages[layer]
            if pages is not None:
                pool, pool_stats = Pool(*pages.layers[layer]), (pages.means[layer], pages.variances[layer])
        references = References(rows.self_page, mode, rows.self_scale, rows.self_shift)
        keep = None if features is None else partial(features.keep_attention, layer)
        return SelfInputs(references, adain_page, rows.adain_strength, pool, pool_stats, keep)

    def cross_attention(self, layer: int, module: int, level: int) -> CrossInputs:
        """Return the inputs of cross-attention `layer` in attention module `module` at attention level `level`."""
        rows, images = self.rows, None
        if self.image_kv is not None:
            images = ImageSegments(
                *self.image_kv.layers[layer],
                self.image_kv.lengths,
                rows.image_page,
                rows.image_strength[:, :, module],
                rows.image_group,
                self.masks[level] if self.masks else None,
                rows.image_mask,
            )
        return CrossInputs(*self.text_kv[layer], rows.text_page, images)

    def norm(self, index: int) -> NormInputs:
        """Return the inputs of group norm `index`."""
        keep = None if self.features is None else partial(self.features.keep_norm, index)
        if self.rows.norm_page.shape[0] == 0:
            return NormInputs(None, keep=keep)
        if self.pages is None:
            return NormInputs(self.rows.norm_page, keep=keep)
        pool = (self.pages.norm_means[index], self.pages.norm_variances[index])
        return NormInputs(self.rows.norm_page, pool, self.pages.norm_elements[index], keep)
