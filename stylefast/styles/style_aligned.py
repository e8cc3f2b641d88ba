"""StyleAligned: pictures share self-attention with a reference (arXiv 2312.02133)."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from stylefast.errors import StyleError
from stylefast.models.layout import AttentionLayout
from stylefast.styles.bank import StyleBank

MODES = ("concat", "swap")
NOISES = ("forward", "ddim")
PARTS = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class StyleAligned:
    """Take the style of a reference through shared self-attention.

    With neither `reference` nor `prompt`, the first prompt of the call that carries this object is the reference.

    Args:
        reference: a picture (path, PIL image), or a list of them; their latents are noised along the schedule. Or a
            `StyleBank`, whose reference was run once and for all: prompt, seed, noise and share_styles are then the
            bank's, and the rest of the arguments is free.
        prompt: what the reference shows; without a picture, the reference is generated from it and not returned.
        adain: which of "q", "k", "v" take the reference's token statistics, or their strengths, {"q": 1.0, "k": 0.5}.
            With several references the statistics are the first one's.
        scale: multiplies the logits against the reference's tokens; below 1 holds a dominant reference back.
        shift: added to those logits; log(c) counts every reference token c times.
        mode: "concat" (own and reference tokens) or "swap" (reference tokens only, arXiv 2402.12974).
        layers: "all", or substrings of layer names ("up_blocks", "up_blocks.0.attentions.1"); other layers stay plain.
        only_self_level: fraction of self-attention layers left plain, spread out as in the reference code.
        share_attention: False keeps AdaIN and leaves the reference's keys and values out.
        share_group_norm: pool the statistics of every group norm with the reference's.
        share_layer_norm: accepted for parity; a layer norm works per token, so this changes nothing.
        full_attention_share: the paper's ablation: all pictures attend to all, without AdaIN, scale and shift.
        noise: how a real picture is brought to a step's noise level. "forward" noises it with one fixed noise; "ddim"
            inverts it under `prompt`, as the authors' notebook does, for scheduler "ddim" only and at the cost of one
            more picture.
        inversion_guidance: guidance of that inversion.
        seed: of the reference's noise (unless the reference is the first prompt, which has the request's seed).
        share_styles: whether the request's other styles apply to the reference as well.
        window: (start, end) in fractions of the steps outside of which rows are plain.

    Raises StyleError for values out of range.
    """

    reference: Any = None
    prompt: str | None = None
    adain: Sequence[str] | Mapping[str, float] = ("q", "k")
    scale: float = 1.0
    shift: float = 0.0
    mode: str = "concat"
    layers: str | Sequence[str] = "all"
    only_self_level: float = 0.0
    share_attention: bool = True
    share_group_norm: bool = False
    share_layer_norm: bool = False
    full_attention_share: bool = False
    noise: str = "forward"
    inversion_guidance: float = 2.0
    seed: int = 0
    share_styles: bool = True
    window: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if self.mode not in MODES:
            raise StyleError(f"StyleAligned mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        if self.noise not in NOISES:
            raise StyleError(f"StyleAligned noise is {self.noise!r}; it must be one of {', '.join(NOISES)}")
        if not _is_number(self.inversion_guidance) or not 0 <= self.inversion_guidance <= 100:
            raise StyleError(f"inversion_guidance is {self.inversion_guidance!r}; it must be a number from 0 to 100")
        if not _is_number(self.only_self_level) or not 0.0 <= self.only_self_level <= 1.0:
            raise StyleError(f"only_self_level is {self.only_self_level!r}; it is a fraction of layers, 0 to 1")
        if not _is_number(self.scale) or not math.isfinite(self.scale):
            raise StyleError(f"scale is {self.scale!r}; it must be finite")
        if not _is_number(self.shift) or math.isnan(self.shift) or self.shift == math.inf:
            raise StyleError(f"shift is {self.shift!r}; it must be finite, or -inf to leave the reference's tokens out")
        if self.mode == "swap" and (self.shift == -math.inf or not self.share_attention):
            raise StyleError("mode 'swap' drops the own tokens, so the reference's must stay; use 'concat' instead")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise StyleError(f"seed is {self.seed!r}; it must be a whole number from 0 to 2^63 - 1")
        if not isinstance(self.layers, (str, list, tuple)):
            raise StyleError(f"layers is {self.layers!r}; it must be 'all', or substrings of layer names")
        self._check_reference()
        self._check_adain()
        window = self.window
        pair = isinstance(window, (list, tuple)) and len(window) == 2 and all(map(_is_number, window))
        if not pair or not 0.0 <= window[0] < window[1] <= 1.0:
            raise StyleError(f"window is {window!r}; it needs 0 <= start < end <= 1, in fractions of the steps")

    def _check_reference(self):
        if isinstance(self.reference, StyleBank):
            self._check_bank()
        elif isinstance(self.reference, (str, os.PathLike)) and Path(self.reference).suffix == ".bank":
            raise StyleError(
                f"{self.reference} is a style bank, not a picture; pass sf.StyleBank.load({str(self.reference)!r})"
            )
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise StyleError(f"prompt is a {type(self.prompt).__name__}; it must be a string")
        if self.reference is None:
            if self.prompt is not None and not self.prompt.strip():
                raise StyleError("the reference's prompt is empty; say what it shows, or give a picture")
        elif self.bank is None and not self.references:
            raise StyleError("the list of references is empty; give pictures, or None for the first prompt")
        if self.full_attention_share and (self.reference is not None or self.prompt is not None):
            raise StyleError("full_attention_share joins the pictures of one call; it takes no reference or prompt")

    def _check_adain(self):
        if not isinstance(self.adain, (Mapping, str, list, tuple, set, frozenset)):
            raise StyleError(f"adain is {self.adain!r}; it must name parts out of {', '.join(PARTS)}")
        strengths = self.adain if isinstance(self.adain, Mapping) else dict.fromkeys(self.adain, 1.0)
        unknown = [part for part in strengths if part not in PARTS]
        if unknown:
            raise StyleError(f"adain names {', '.join(map(repr, unknown))}; it knows {', '.join(PARTS)}")
        for part, strength in strengths.items():
            if not _is_number(strength) or not 0.0 <= strength <= 1.0:
                raise StyleError(f"adain strength of {part} is {strength!r}; it must be between 0 and 1")

    def adain_strengths(self) -> dict[str, float]:
        """Strength per part; parts that are not named are 0."""
        if isinstance(self.adain, Mapping):
            return {part: float(strength) for part, strength in self.adain.items()}
        return dict.fromkeys(self.adain, 1.0)

    def _check_bank(self):
        for name, default in (("prompt", None), ("seed", 0), ("noise", "forward")):
            if getattr(self, name) != default:
                raise StyleError(
                    f"{name} is {getattr(self, name)!r}, but the reference is a style bank, which was baked with a "
                    f"{name} of its own; leave it out, or bake the style again"
                )

    @property
    def bank(self) -> StyleBank | None:
        """The style bank that stands in place of a reference, if any."""
        return self.reference if isinstance(self.reference, StyleBank) else None

    @property
    def references(self) -> list:
        """The reference pictures, possibly none."""
        if self.reference is None or self.bank is not None:
            return []
        return list(self.reference) if isinstance(self.reference, (list, tuple)) else [self.reference]

    def layer_mask(self, layout: AttentionLayout) -> torch.Tensor:
        """[layers] bool in registry order: where the style applies. Raises StyleError if `layers` matches none."""
        names = [layer.name for layer in layout.layers]
        if self.layers == "all":
            chosen = torch.ones(len(names), dtype=torch.bool)
        else:
            patterns = [self.layers] if isinstance(self.layers, str) else list(self.layers)
            chosen = torch.tensor([any(pattern in f"{name}." for pattern in patterns) for name in names])
            if not chosen.any():
                raise StyleError(
                    f"layers={self.layers!r} matches no self-attention layer; modules are {', '.join(layout.modules)}"
                )
        return chosen & ~plain_layers(len(names), self.only_self_level)


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def plain_layers(count: int, level: float) -> torch.Tensor:
    """[count] bool: the layers that `only_self_level` leaves plain, by the counting rule of the reference code.

    A level that rounds to no layer leaves none plain (from below 1/2) or all (from above).
    """
    inverted = level > 0.5
    switched = int((1 - level if inverted else level) * count)
    marked = torch.zeros(count, dtype=torch.bool)
    if switched:
        marked[:: count // switched] = True
    return ~marked if inverted else marked
