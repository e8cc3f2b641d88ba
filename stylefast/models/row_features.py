"""What is recorded of rows while they run: for a style bank, their features as references."""

from typing import TYPE_CHECKING

from torch import Tensor

from stylefast.kernels.adain import stats_operation as token_stats

if TYPE_CHECKING:
    from stylefast.models.row_table import CrossInputs, SelfInputs


class Recorder:
    """Records nothing; subclasses record what they want of a step of the UNet, which calls all methods."""

    def keep_rows(self, branch_rows: Tensor) -> None:
        """Take the rows of every picture's branches, [pictures, 4] int64, -1: none; called first."""

    def keep_attention(self, layer: int, inputs: "SelfInputs", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Take the hidden states [rows, tokens, channels] of a self-attention layer, and its q, k, v before AdaIN."""

    def keep_cross(self, layer: int, inputs: "CrossInputs", q: Tensor) -> None:
        """Take the queries [rows, tokens, heads, d] of a cross-attention layer."""

    def keep_norm(self, index: int, x: Tensor, groups: int) -> None:
        """Take the input [rows, channels, h, w] of group norm `index`."""


class RowFeatures(Recorder):
    """Features of running rows, recorded for a style bank that lets other rows use them as a reference.

    `layers[i]` holds (hidden [rows, tokens, channels], keys, values [rows, tokens, heads, d], means, variances
    [3, rows, heads, d] of queries, keys, values) of self-attention layer i; `norms[i]` the (mean, variance)
    [rows, groups] of group norm i and `norm_elements[i]` the number of elements in each.
    """

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, ...]] = {}
        self.norms: dict[int, tuple[Tensor, Tensor]] = {}
        self.norm_elements: dict[int, int] = {}

    def keep_attention(self, layer: int, inputs: "SelfInputs", x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Record the features of one self-attention layer."""
        self.layers[layer] = (x, k, v, *token_stats.run([q, k, v]))

    def keep_norm(self, index: int, x: Tensor, groups: int) -> None:
        """Record the statistics of group norm `index`, with biased variances as in the norm."""
        # double precision matches the norm's own sums, so that bank readers get the same result as live references
        flat = x.double().reshape(len(x), groups, -1)
        self.norms[index] = (flat.mean(-1).float(), flat.var(-1, unbiased=False).float())
        self.norm_elements[index] = flat.shape[-1]
