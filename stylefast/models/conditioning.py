"""What the layers of the UNet read and leave behind: text, pictures, pages, and the row table cut into layers."""

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
    lengths: torch.Tensor  # [image pages] int64: tokens in use


class StylePages(NamedTuple):
    """One step of a style bank: what reference rows would have offered, without running them."""

    layers: tuple[KeyValue, ...]  # raw keys and values per self-attention layer
    means: tuple[torch.Tensor, ...]  # per layer [3, pages, heads, d]: token means of queries, keys, values
    variances: tuple[torch.Tensor, ...]
    norm_means: tuple[torch.Tensor, ...]  # per group norm [pages, groups], in module order
    norm_variances: tuple[torch.Tensor, ...]
    norm_elements: tuple[int | None, ...]  # numbers behind each; None: as many as in the row that reads them


class RowFeatures:
    """What rows offer to others that take them as a reference, kept while they run: the content of a style bank.

    `layers[i]` holds (hidden [rows, tokens, channels], keys, values [rows, tokens, heads, d], means, variances
    [3, rows, heads, d] of queries, keys, values) of self-attention layer i; `norms[i]` the (mean, variance)
    [rows, groups] of group norm i and `norm_elements[i]` how many numbers each of them covers.
    """

    def __init__(self):
        self.layers: dict[int, tuple[torch.Tensor, ...]] = {}
        self.norms: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.norm_elements: dict[int, int] = {}

    def keep_attention(self, layer: int, hidden, q, k, v):
        """Take the features of one self-attention layer."""
        self.layers[layer] = (hidden, k, v, *token_stats(q, k, v))

    def keep_norm(self, index: int, x, groups: int):
        """Take the statistics that group norm `index` sees: biased variances, as in the norm."""
        # as exact as the norm's own sums, which a reader of the bank must not be able to tell apart
        flat = x.double().reshape(len(x), groups, -1)
        self.norms[index] = (flat.mean(-1).float(), flat.var(-1, unbiased=False).float())
        self.norm_elements[index] = flat.shape[-1]


class SelfInputs(NamedTuple):
    """The columns of the row table that one self-attention layer reads, and the pages it may read."""

    page: torch.Tensor  # [rows, R]
    mode: torch.Tensor  # [rows], PLAIN where the layer is not active
    scale: torch.Tensor  # [rows, R]
    shift: torch.Tensor
    adain_page: torch.Tensor  # [rows], NO_PAGE where the layer is not active
    adain_strength: torch.Tensor  # [rows, 3]
    pool: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)  # keys, values
    pool_stats: tuple[torch.Tensor, ...] = ()  # means, variances
    keep: Callable[..., None] | None = None  # of `RowFeatures`, where a reference is baked


class CrossInputs(NamedTuple):
    """What one cross-attention layer reads: text, and image segments where there are any."""

    text_k: torch.Tensor  # [text pages, tokens, heads, d]
    text_v: torch.Tensor
    text_page: torch.Tensor  # [rows]
    images: tuple = ()  # the remaining arguments of `gated_cross_attention`


class NormInputs(NamedTuple):
    """Whose statistics one group norm pools with."""

    page: torch.Tensor  # [rows], or [0] if no row shares
    pool: tuple = ()  # means, variances [pages, groups], elements
    keep: Callable[..., None] | None = None


class Conditioning(NamedTuple):
    """Everything beside the feature map that a block may look at, and what each layer sees of it.

    Layers take plain tensors and no number that says which layer they are, so that blocks of equal shape share one
    compiled region.
    """

    time: torch.Tensor  # [rows, time channels], after SiLU
    rows: RowTable
    text_kv: tuple[KeyValue, ...]
    image_kv: ImageKV | None
    pages: StylePages | None
    masks: tuple[torch.Tensor, ...]  # per attention level [masks, tokens]
    features: RowFeatures | None = None
    # for all layers at once, as so many small operations would cost as much as the attention of a small batch
    modes: torch.Tensor | None = None  # [layers, rows], PLAIN where a layer is not active
    adain_pages: torch.Tensor | None = None  # [layers, rows], NO_PAGE where a layer is not active

    @classmethod
    def of(cls, time, rows: RowTable, *others) -> "Conditioning":
        """With modes and AdaIN pages of every layer worked out; `others` as the fields up to `features`."""
        if rows.self_page.shape[1] == 0:
            return cls(time, rows, *others)
        active = rows.self_layers.T
        modes = torch.where(active, rows.self_mode, PLAIN)
        return cls(time, rows, *others, modes, torch.where(active, rows.adain_page, NO_PAGE))

    def self_attention(self, layer: int) -> SelfInputs:
        """What self-attention `layer` reads."""
        rows, pages, features = self.rows, self.pages, self.features
        keep = None if features is None else partial(features.keep_attention, layer)
        if self.modes is None:
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
        """What cross-attention `layer` of attention module `module` reads."""
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
        """What group norm `index` reads."""
        pages, pool = self.pages, ()
        if pages is not None and self.rows.norm_page.shape[0]:
            pool = (pages.norm_means[index], pages.norm_variances[index], pages.norm_elements[index])
        keep = None if self.features is None else partial(self.features.keep_norm, index)
        return NormInputs(self.rows.norm_page, pool, keep)
