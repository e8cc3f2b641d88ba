"""Features that a style bank records of reference rows while they run."""

from torch import Tensor

from stylefast.kernels.adain import stats_operation as token_stats


class RowFeatures:
    """Features of running rows, recorded for a style bank that lets other rows use them as a reference.

    `layers[i]` holds (hidden [rows, tokens, channels], keys, values [rows, tokens, heads, d], means, variances
    [3, rows, heads, d] of queries, keys, values) of self-attention layer i; `norms[i]` the (mean, variance)
    [rows, groups] of group norm i and `norm_elements[i]` the number of elements in each.
    """

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, ...]] = {}
        self.norms: dict[int, tuple[Tensor, Tensor]] = {}
        self.norm_elements: dict[int, int] = {}

    def keep_attention(self, layer: int, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Record the features of one self-attention layer."""
        self.layers[layer] = (hidden, k, v, *token_stats.run([q, k, v]))

    def keep_norm(self, index: int, x: Tensor, groups: int) -> None:
        """Record the statistics of group norm `index`, with biased variances as in the norm."""
        # double precision matches the norm's own sums, so that bank readers get the same result as live references
        flat = x.double().reshape(len(x), groups, -1)
        self.norms[index] = (flat.mean(-1).float(), flat.var(-1, unbiased=False).float())
        self.norm_elements[index] = flat.shape[-1]
