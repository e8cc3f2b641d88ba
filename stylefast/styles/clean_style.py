"""CleanStyle: keep what is style of an image prompt's tokens, and damp the rest, which carries content.

"CleanStyle: Plug-and-Play Style Conditioning Purification" of arXiv 2602.20721. The keys and values of a picture's
tokens in one layer are a matrix [tokens, channels]. Its largest singular values are kept; the others, s, become
s exp(-a_t s), where a_t falls over the steps (CS-SVD). The unconditional branch sees the same tokens with all singular
values damped, instead of no picture, so that guidance steers away from what is left of the content (SS-CFG).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stylefast import values
from stylefast.errors import StyleError
from stylefast.models.row_table import KeyValue


class Damping(NamedTuple):
    """What happens to singular values: `keep` stay, the others become s exp(-strength s)."""

    keep: int
    strength: float


@dataclass(frozen=True)
class CleanStyle:
    """How an image prompt's tokens are cleaned of content, for `InstantStyle(clean=)`; defaults are the paper's.

    Args:
        strength: of the damping in the first steps; 0: none. More removes more content, and in the end style.
        keep: number of largest singular values that are never damped.
        decline, middle: at the fraction t of the steps the strength is multiplied by 1 - sigmoid(decline (t - middle)).
        negative: strength for all singular values in the unconditional branch; 0: it sees no picture, as usual.

    Raises StyleError for values out of range.

    Examples:
        >>> neon = engine.references()["neon"]
        >>> style = sf.InstantStyle(neon, clean=sf.CleanStyle())
        >>> result = engine.generate("a fish", style, steps=2)
    """

    strength: float = 0.01
    keep: int = 1
    decline: float = 20.0
    middle: float = 0.3
    negative: float = 0.2

    def __post_init__(self):
        for name in ("strength", "decline", "negative"):
            checked = values.real_number(name, getattr(self, name), 0, values.MAX_STRENGTH, error=StyleError)
            object.__setattr__(self, name, checked)
        object.__setattr__(self, "middle", values.real_number("middle", self.middle, 0, 1, error=StyleError))
        object.__setattr__(self, "keep", values.whole_number("keep", self.keep, 0, 4096, error=StyleError))

    def at(self, time: float) -> Damping:
        """Return what happens to the tokens at a fraction of the steps, 0 to 1."""
        # 1 - sigmoid(x) = 1 / (1 + exp(x))
        exponent = min(self.decline * (time - self.middle), 700.0)
        return Damping(self.keep, self.strength / (1.0 + math.exp(exponent)))

    @property
    def unconditional(self) -> Damping | None:
        """Return what happens to the tokens that the unconditional branch sees; None: it sees no picture."""
        return Damping(0, self.negative) if self.negative else None


def damped(layers: Sequence[KeyValue | None], dampings: Sequence[Damping], each: int) -> list[list[KeyValue | None]]:
    """Return the keys and values of every layer for each damping.

    layers: (k, v) [1, tokens, heads, d] of each layer, or None; each: tokens of one picture, whose matrices
    [each, heads * d] are decomposed by themselves. Computed in fp32, or in fp64 for such input.
    """
    found: list[list[KeyValue | None]] = [[] for _ in dampings]
    if not found:
        return found  # most styles are not cleaned, and decompositions take time
    for pair in layers:
        if pair is None:
            for one in found:
                one.append(None)
            continue
        # [2, 1, pictures, each, channels]
        matrices = torch.stack([x.flatten(-2).unflatten(1, (-1, each)) for x in pair])
        exact = matrices.double() if matrices.dtype == torch.float64 else matrices.float()
        left, sizes, right = torch.linalg.svd(exact, full_matrices=False)
        for one, damping in zip(found, dampings, strict=True):
            factor = torch.exp(-damping.strength * sizes)
            factor[..., : damping.keep] = 1
            k, v = ((left * (factor * sizes).unsqueeze(-2)) @ right).flatten(2, 3).to(matrices.dtype)
            one.append((k.view_as(pair[0]), v.view_as(pair[1])))
    return found


def weighted(layers: Sequence[KeyValue | None], weights: Tensor, each: int) -> list[KeyValue | None]:
    """Return keys and values with the values of each picture's tokens multiplied by its weight [pictures]."""
    factor = weights.repeat_interleave(each)[None, :, None, None]
    return [pair and (pair[0], pair[1] * factor.to(pair[1])) for pair in layers]
