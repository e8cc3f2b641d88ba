"""Weights that combine the branch predictions of a picture.

The four branches are "null" (negative or empty prompt), "context" (the prompt without its style), "style" (the style
without the prompt's content) and "full" (both). Each guidance method is a weighted sum of them.
"""

from dataclasses import dataclass

from stylefast import values
from stylefast.errors import InvalidRequest

BRANCHES = ("null", "context", "style", "full")
FULL, NULL = "full", "null"
CONVENTIONS = ("code", "paper")
MAX_GUIDANCE = 100

# smaller weights are rounding residue of sums such as 0.1 + 0.2 - 0.3, not worth a UNet evaluation
_NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class StyleContextGuidance:
    """DreamStyler's style and context guidance (Ahn et al. 2024, Eq. 3 and 11).

    With e0, eC, eS, eF the null, context, style and full predictions:

        e = e0 + h * [ls (eS - e0) + lc (eF - eS) + lc (eC - e0) + ls (eF - eC)] + ln (eF - e0)

    Args:
        style, context, negative: ls, lc, ln. ls == lc needs neither the context nor the style branch.
        convention: "code" uses h = 1/2, as in the released code; "paper" uses h = 1.

    Raises InvalidRequest for weights outside 0 to 100.

    Examples:
        >>> guidance = sf.StyleContextGuidance(style=1.0, context=3.0, negative=5.0)
        >>> guidance.collapsed()
        (7.0, 1.0)
        >>> style = sf.DreamStyler(engine.styles()["chalk"], guidance=guidance)
        >>> result = engine.generate("a fish", style, steps=2)
    """

    style: float = 0.5
    context: float = 3.0
    negative: float = 5.0
    convention: str = "code"

    def __post_init__(self):
        for name in ("style", "context", "negative"):
            weight = values.real_number(f"guidance weight {name}", getattr(self, name), 0, MAX_GUIDANCE)
            object.__setattr__(self, name, weight)
        values.one_of("convention", self.convention, CONVENTIONS)

    def collapsed(self) -> tuple[float, float]:
        """Return (w, d) of the equivalent form `(1 - w) e0 + w eF + d (eC - eS)`."""
        half = 0.5 if self.convention == "code" else 1.0
        return self.negative + half * (self.style + self.context), half * (self.context - self.style)


def guidance_weights(guidance: float, style_context: StyleContextGuidance | None = None) -> dict[str, float]:
    """Return branch -> weight in the order of BRANCHES, without the zero-weight branches, which need no evaluation.

    Without `style_context` this is classifier-free guidance, `null + guidance (full - null)`; guidance <= 1 turns it
    off and leaves only "full". With `style_context`, `style_context.negative` replaces `guidance`, which is ignored.

    Raises InvalidRequest if `guidance` is outside 0 to 100.
    """
    guidance = values.real_number("guidance", guidance, 0, MAX_GUIDANCE)
    if style_context is None:
        w, d = max(guidance, 1.0), 0.0
    else:
        w, d = style_context.collapsed()
    weights = dict(zip(BRANCHES, (1.0 - w, d, -d, w), strict=True))
    return {branch: weight for branch, weight in weights.items() if abs(weight) > _NEGLIGIBLE}


@dataclass(frozen=True)
class GuidanceInterval:
    """Interval of the steps in which guidance is applied (Kynkäänniemi et al. 2024, arXiv 2404.07724).

    Args:
        start, end: fractions of the steps, 0 <= start < end <= 1; step i of n is guided if start <= i / n < end. (0, 1)
            guides everywhere, (0, 0.8) not in the last fifth. The paper states the interval in sigma.

    Raises InvalidRequest for other values.
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        start, end = values.fractions("the guidance interval", (self.start, self.end))
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "end", end)

    def covers(self, step: int, steps: int) -> bool:
        """Return whether `step` (0-based) of `steps` is guided."""
        return self.start <= step / steps < self.end


def branch_weights_per_step(
    weights: dict[str, float], steps: int, interval: GuidanceInterval
) -> list[dict[str, float]]:
    """Return branch -> weight for each of `steps` steps: `weights` within the interval, only "full" outside it.

    Raises InvalidRequest for an unknown branch, steps below 1, or an interval that falls between two steps.
    """
    unknown = set(weights) - set(BRANCHES)
    if unknown:
        raise InvalidRequest(f"branches {sorted(unknown)} are unknown; choose from {', '.join(BRANCHES)}")
    values.whole_number("steps", steps, 1)
    guided = [interval.covers(step, steps) for step in range(steps)]
    if not any(guided):
        raise InvalidRequest(
            f"the guidance interval ({interval.start}, {interval.end}) contains none of the {steps} steps; widen "
            "it, or turn guidance off with guidance=1"
        )
    return [dict(weights) if inside else {"full": 1.0} for inside in guided]
