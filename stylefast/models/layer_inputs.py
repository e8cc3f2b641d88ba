"""Inputs and stored features of the UNet's layers: text, pictures, bank pages, and the row table per layer."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from stylefast.kernels.shared_attention import PLAIN
from stylefast.kernels.token_stats import token_stats
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
        self.layers[layer] = (hidden, k, v, *token_stats(q, k, v))

    def keep_norm(self, index: int, x, groups: int):
        """Record the statistics of group norm `index`, with biased variances as in the norm."""
        # double precision matches the norm's own sums, so that bank readers get the same result as live references
        flat = x.double().reshape(len(x), groups, -1)
        self.norms[index] = (flat.mean(-1).float(), flat.var(-1, unbiased=False).float())
        self.norm_elements[index] = flat.shape[-1]


class SelfInputs(NamedTuple):
    """Columns of the row table for one self-attention layer, and the pages it may read."""

    page: torch.Tensor  # [rows, R]
    mode: torch.Tensor  # [rows], PLAIN if the layer is inactive
    scale: torch.Tensor  # [rows, R]
    shift: torch.Tensor
    adain_page: torch.Tensor  # [rows], NO_PAGE if the layer is inactive
    adain_strength: torch.Tensor  # [rows, 3]
    pool: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)  # keys, values
    pool_stats: tuple[torch.Tensor, ...] = ()  # means, variances
    keep: Callable[..., None] | None = None  # method of `RowFeatures`, while baking a reference


class CrossInputs(NamedTuple):
    """Inputs of one cross-attention layer: text, and image segments if any."""

    text_k: torch.Tensor  # [text pages, tokens, heads, d]
    text_v: torch.Tensor
    text_page: torch.Tensor  # [rows]
    images: tuple = ()  # the remaining arguments of `gated_cross_attention`


class NormInputs(NamedTuple):
    """Pages whose statistics one group norm pools with its own."""

    page: torch.Tensor  # [rows], or [0] if no row shares
    pool: tuple = ()  # means, variances [pages, groups], elements
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
        keep = None if features is None else partial(features.keep_attention, layer)
        if self.modes is None or self.adain_pages is None:
            return SelfInputs(
                rows.self_page,
                rows.self_mode,
                rows.self_scale,
                rows.self_shift,
                rows.adain_page,
                rows.adain_strength,
                keep=keep,
            )
        pool = {}
        if pages is not None:
            pool = {"pool": pages.layers[layer], "pool_stats": (pages.means[layer], pages.variances[layer])}
        return SelfInputs(
            rows.self_page,
            self.modes[layer],
            rows.self_scale,
            rows.self_shift,
            self.adain_pages[layer],
            rows.adain_strength,
            keep=keep,
            **pool,
        )

    def cross_attention(self, layer: int, module: int, level: int) -> CrossInputs:
        """Return the inputs of cross-attention `layer` in attention module `module` at attention level `level`."""
        rows, images = self.rows, ()
        if self.image_kv is not None:
            masks = self.masks[level] if self.masks else None
            images = (
                *self.image_kv.layers[layer],
                self.image_kv.lengths,
                rows.image_page,
                rows.image_strength[:, :, module],
                rows.image_group,
                masks,
                rows.image_mask,
            )
        return CrossInputs(*self.text_kv[layer], rows.text_page, images)

    def norm(self, index: int) -> NormInputs:
        """Return the inputs of group norm `index`."""
        pages, pool = self.pages, ()
        if pages is not None and self.rows.norm_page.shape[0]:
            pool = (pages.norm_means[index], pages.norm_variances[index], pages.norm_elements[index])
        keep = None if self.features is None else partial(self.features.keep_norm, index)
        return NormInputs(self.rows.norm_page, pool, keep)
