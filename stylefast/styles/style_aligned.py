"""StyleAligned: pictures share self-attention with a reference (arXiv 2312.02133)."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from stylefast import values
from stylefast.errors import StyleError
from stylefast.models.layout import AttentionLayout, checked_layers
from stylefast.models.pictures import check_sources
from stylefast.models.row_table import CONCAT, SWAP
from stylefast.sampling.guidance import MAX_GUIDANCE
from stylefast.styles.bank import StyleBank
from stylefast.styles.style import ModelFacts, References, ReferenceStyle, Rows, checked_weights

MODES = ("concat", "swap")
NOISES = ("forward", "ddim")
PARTS = ("q", "k", "v")
_FLAGS = ("share_attention", "share_group_norm", "share_layer_norm", "full_attention_share", "share_styles")
# name -> lowest, highest, further allowed values
_NUMBERS = {
    "scale": (-values.MAX_STRENGTH, values.MAX_STRENGTH, ()),
    "shift": (-values.MAX_STRENGTH, values.MAX_STRENGTH, (-math.inf,)),
    "only_self_level": (0, 1, ()),
    "inversion_guidance": (0, MAX_GUIDANCE, ()),
    "calibrate": (0, 1, ()),
}


@dataclass(frozen=True, eq=False)
class StyleAligned(ReferenceStyle):
    """Style of a reference, applied through shared self-attention.

    With neither `reference` nor `prompt`, the first prompt of the call with this object is the reference.

    Args:
        reference: a picture (path, PIL image), or a list of them; their latents are noised along the schedule. Or a
            `StyleBank` with a precomputed reference: prompt, seed, noise and share_styles are then fixed by the bank,
            the other arguments can be set freely.
        prompt: what the reference shows; without a picture, the reference is generated from it and not returned.
        adain: which of "q", "k", "v" take the reference's token statistics, or their strengths, {"q": 1.0, "k": 0.5}.
            With several references, the first one's statistics are used.
        scale: multiplies the logits of the reference's tokens; values below 1 weaken a dominant reference.
        shift: added to those logits; log(c) counts every reference token c times.
        mode: "concat" (own and reference tokens) or "swap" (reference tokens only, arXiv 2402.12974).
        layers: "all", or substrings of layer names ("up_blocks", "up_blocks.0.attentions.1"); other layers stay plain.
        only_self_level: fraction of self-attention layers left plain, distributed as in the reference code.
        share_attention: False keeps AdaIN and omits the reference's keys and values.
        share_group_norm: pool the statistics of every group norm with the reference's.
        share_layer_norm: accepted for parity; has no effect, since layer norms work per token.
        full_attention_share: the paper's ablation: all pictures attend to all, without AdaIN, scale and shift.
        noise: how a real picture is brought to a step's noise level. "forward" adds one fixed noise; "ddim" inverts it
            under `prompt`, as in the authors' notebook, for scheduler "ddim" only and at the cost of one more picture.
        inversion_guidance: guidance of that inversion.
        seed: seed of the reference's noise, None or -1 for a random one (a reference that is the first prompt uses its
            request's seed).
        share_styles: whether the request's other styles apply to the reference as well.
        window: (start, end) in fractions of the steps; outside of it, rows are plain.
        weights: of several references, relative to each other: under `(3, 1)` a token of the first counts three times
            as much as one of the second; None: all count the same. AdaIN always follows the first.
        calibrate: how much, 0 to 1, each latent channel takes the mean and deviation of the (first) reference in late
            steps, so that its colours come through; a help for mode "swap" above all.

    Raises StyleError for values out of range.

    Examples:
        >>> style = sf.StyleAligned(engine.references()["neon"], scale=0.8)
        >>> len(engine.generate(["a fish", "a cat"], style, steps=2).images)
        2
        >>> result = engine.generate(["a star in neon style", "a fish"], sf.StyleAligned(), steps=2)
        >>> len(result.images)  # the first of which is the reference
        2
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
    seed: int | None = 0
    share_styles: bool = True
    window: tuple[float, float] = (0.0, 1.0)
    weights: Sequence[float] | None = None
    calibrate: float = 0.0
    option: ClassVar[str] = "aligned"
    picture_fields: ClassVar[tuple[str, ...]] = ("reference",)
    served: ClassVar[Mapping[str, str]] = {"bank": "reference"}

    def __post_init__(self):
        checked = {
            "mode": values.one_of("StyleAligned mode", self.mode, MODES, error=StyleError),
            "noise": values.one_of("StyleAligned noise", self.noise, NOISES, error=StyleError),
            "seed": values.seed("seed", self.seed, error=StyleError),
            "window": values.fractions("window", self.window, error=StyleError),
            "layers": checked_layers(self.layers),
            "adain": _checked_adain(self.adain),
        }
        for name in _FLAGS:
            checked[name] = values.flag(name, getattr(self, name), error=StyleError)
        for name, (low, high, also) in _NUMBERS.items():
            checked[name] = values.real_number(name, getattr(self, name), low, high, also=also, error=StyleError)
        if self.prompt is not None:
            checked["prompt"] = values.prompt("prompt", self.prompt, error=StyleError)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.mode == "swap" and (self.shift == -math.inf or not self.share_attention):
            raise StyleError(
                "mode 'swap' drops the target's own tokens, so it needs the reference's; use 'concat' instead"
            )
        if self.weights is not None:
            object.__setattr__(self, "weights", checked_weights(self.weights))
        self._check_reference()
        if self.weights is not None:
            count = len(self.references) if self.bank is None else self.bank.info.references
            if count < 2 or len(self.weights) != count:
                raise StyleError(
                    f"{len(self.weights)} weights for {count or 'no'} references; give several, or no weights"
                )

    def _check_reference(self):
        if isinstance(self.reference, StyleBank):
            self._check_bank()
        elif values.entries(self.reference) == []:
            raise StyleError("the list of references is empty; give pictures, or None for the first prompt")
        elif self.reference is not None:
            object.__setattr__(self, "reference", check_sources("reference", self.reference))
            if isinstance(self.reference, (str, os.PathLike)) and Path(self.reference).suffix == ".bank":
                shown = values.quoted(str(self.reference))
                raise StyleError(f"{shown} is a style bank, not a picture; pass sf.StyleBank.load({shown})")
        if self.reference is None and self.prompt is not None and not self.prompt.strip():
            raise StyleError("the reference's prompt is empty; say what it shows, or give a picture")
        if self.full_attention_share and (self.reference is not None or self.prompt is not None):
            raise StyleError("full_attention_share joins the pictures of one call; it takes no reference or prompt")
        if self.calibrate and self.full_attention_share:
            raise StyleError("calibrate takes the colours of a reference, which full_attention_share does not have")
        if self.calibrate and self.bank is not None and self.bank.info.store != "latents":
            raise StyleError(
                "calibrate takes the colours of a reference, of which a bank of keys and values has no picture; bake "
                "it with store='latents', or leave calibrate out"
            )

    def adain_strengths(self) -> dict[str, float]:
        """Return the strength per named part; other parts are absent and count as 0."""
        if isinstance(self.adain, Mapping):
            return {part: float(strength) for part, strength in self.adain.items()}
        return dict.fromkeys(self.adain, 1.0)

    def _check_bank(self):
        for name, default in (("prompt", None), ("seed", 0), ("noise", "forward")):
            if getattr(self, name) != default:
                raise StyleError(
                    f"{name} is {values.quoted(getattr(self, name))}, but the reference is a style bank, which was "
                    f"baked with its own {name}; leave it out, or bake the style again"
                )

    @property
    def bank(self) -> StyleBank | None:
        """Return the style bank given as reference, or None."""
        return self.reference if isinstance(self.reference, StyleBank) else None

    @property
    def references(self) -> list:
        """Return the reference pictures, possibly none."""
        if self.reference is None or self.bank is not None:
            return []
        return list(self.reference) if isinstance(self.reference, (list, tuple)) else [self.reference]

    def layer_mask(self, layout: AttentionLayout) -> torch.Tensor:
        """Return the layers that use the style, [layers] bool in registry order. Raises StyleError if none match."""
        chosen = torch.tensor(layout.matching(self.layers))
        return chosen & ~plain_layers(len(chosen), self.only_self_level)

    # for the engine, see `Style` and `ReferenceStyle`

    def check(self, model: ModelFacts) -> None:
        """Raise StyleError if `layers` matches none of the model's layers, or the model can't calibrate colours."""
        self.layer_mask(model.layout)
        if self.calibrate and model.trained_on_noise_levels:
            raise StyleError(
                "calibrate acts in a range of training timesteps, and this model "
                f"({model.trained_on_noise_levels}) was trained on noise levels instead; leave it out"
            )

    @property
    def reads(self) -> References:
        """Return the reference: a bank, pictures, a picture of the prompt, or the call's first picture."""
        return References(
            bank=self.bank,
            pictures=self.references,
            prompt=self.prompt,
            seed=self.seed or 0,
            noise=self.noise,
            inversion_guidance=self.inversion_guidance,
            share_styles=self.share_styles,
            mutual=self.full_attention_share,
            calibrate=self.calibrate,
        )

    def write_rows(self, rows: Rows, row: int, layout: AttentionLayout, leads: bool) -> None:
        """Write how a row reads its references: layers, strengths of their tokens, AdaIN, group norms."""
        rows.self_mode[row] = SWAP if self.mode == "swap" else CONCAT
        rows.self_layers[row] = self.layer_mask(layout).numpy()
        # the others take their statistics from the first of the group
        rows.takes_norms[row] = self.share_group_norm and not leads
        if self.full_attention_share:
            return
        rows.self_scale[row], rows.self_shift[row] = self.scale, self.shift if self.share_attention else -math.inf
        rows.takes_adain[row] = True
        if self.weights is not None:
            # the logarithm of a weight multiplies the tokens' part in the softmax by it; equal ones change nothing
            rows.own_shifts[row] = np.log(np.array(self.weights) * len(self.weights) / sum(self.weights))
        strengths = self.adain_strengths()
        rows.adain_strength[row] = [strengths.get(part, 0.0) for part in PARTS]

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Return the prompt of the reference, if it has one."""
        return [("the style's prompt", self.prompt)] if self.prompt else []

    def write_field(self, name: str, value: Any, store: Any) -> Any:
        """Return a field's value for a record; a bank by its file."""
        if name == "reference" and self.bank is not None:
            return store.bank(value)
        return super().write_field(name, value, store)

    @classmethod
    def read_field(cls, name: str, value: Any, sources: Any) -> Any:
        """Return a field's value from a record; a reference may be a bank."""
        if name == "reference" and sources.is_bank(value):
            return sources.bank(value)
        return super().read_field(name, value, sources)


def _checked_adain(adain) -> tuple[str, ...] | dict[str, float]:
    if isinstance(adain, Mapping):
        adain = values.mapping("adain", adain, error=StyleError)
    elif isinstance(adain, str):
        adain = str.__str__(adain)
    elif isinstance(adain, (list, tuple)):
        adain = values.entries(adain) or []
    elif not isinstance(adain, (set, frozenset)):
        raise StyleError(f"adain is {values.quoted(adain)}; it must name some of {', '.join(PARTS)}")
    unknown = [part for part in adain if not isinstance(part, str) or part not in PARTS]
    if unknown:
        raise StyleError(f"adain names {values.quoted(unknown[0])}; choose from {', '.join(PARTS)}")
    if not isinstance(adain, Mapping):
        return tuple(part for part in PARTS if part in adain)
    return {
        part: values.real_number(f"adain strength of {part}", strength, 0, 1, error=StyleError)
        for part, strength in adain.items()
    }


def plain_layers(count: int, level: float) -> torch.Tensor:
    """Return the layers that `only_self_level` leaves plain, [count] bool, by the counting rule of the reference code.

    A level too near to 0 or 1 to make up a whole layer leaves none or all plain, respectively.
    """
    inverted = level > 0.5
    switched = int((1 - level if inverted else level) * count)
    marked = torch.zeros(count, dtype=torch.bool)
    if switched:
        marked[:: count // switched] = True
    return ~marked if inverted else marked
