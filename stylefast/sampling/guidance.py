"""How the predictions of a picture's branches combine into one.

Four branches exist: "null" (negative or empty prompt), "context" (the prompt without its style), "style" (the style
without the prompt's content) and "full" (both). Every guidance here is a weighted sum of them.
"""

import math
from dataclasses import dataclass

from stylefast.errors import InvalidRequest

BRANCHES = ("null", "context", "style", "full")
CONVENTIONS = ("code", "paper")

# below this a weight is rounding left over from sums such as 0.1 + 0.2 - 0.3, not worth a UNet evaluation
_NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class StyleContextGuidance:
    """DreamStyler's style and context guidance (Ahn et al. 2024, Eq. 3 and 11).

    With e0, eC, eS, eF the null, context, style and full predictions:

        e = e0 + h * [ls (eS - e0) + lc (eF - eS) + lc (eC - e0) + ls (eF - eC)] + ln (eF - e0)

    style, context, negative: ls, lc, ln. convention: "code" has h = 1/2, as the released code; "paper" has h = 1.
    ls == lc needs neither the context nor the style branch. Raises InvalidRequest for negative or infinite weights.
    """

    style: float = 0.5
    context: float = 3.0
    negative: float = 5.0
    convention: str = "code"

    def __post_init__(self):
        for name in ("style", "context", "negative"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidRequest(f"guidance weight {name} must be a finite number of at least 0, not {value}")
        if self.convention not in CONVENTIONS:
            raise InvalidRequest(f"convention {self.convention!r} is unknown; choose one of {', '.join(CONVENTIONS)}")

    def collapsed(self) -> tuple[float, float]:
        """(w, d) of the same guidance written as `(1 - w) e0 + w eF + d (eC - eS)`."""
        half = 0.5 if self.convention == "code" else 1.0
        return self.negative + half * (self.style + self.context), half * (self.context - self.style)


def guidance_weights(guidance: float, style_context: StyleContextGuidance | None = None) -> dict[str, float]:
    """Branch -> weight, in the order of BRANCHES; branches of weight zero are left out and need not be evaluated.

    Without `style_context` this is classifier-free guidance, `null + guidance (full - null)`; at guidance <= 1 it is
    off and only "full" remains. With it, `guidance` has no part: `style_context.negative` stands in its place.

    Raises InvalidRequest for a guidance that is negative or not finite.
    """
    if not (math.isfinite(guidance) and guidance >= 0):
        raise InvalidRequest(f"guidance must be a finite number of at least 0, not {guidance}; 0 to 1 turns it off")
    if style_context is None:
        w, d = max(float(guidance), 1.0), 0.0
    else:
        w, d = style_context.collapsed()
    weights = dict(zip(BRANCHES, (1.0 - w, d, -d, w), strict=True))
    return {branch: weight for branch, weight in weights.items() if abs(weight) > _NEGLIGIBLE}


@dataclass(frozen=True)
class GuidanceInterval:
    """The part of the trajectory in which guidance acts (Kynkäänniemi et al. 2024, arXiv 2404.07724).

    start, end: fractions of the steps, 0 <= start < end <= 1; step i of n is guided if start <= i / n < end. The paper
    states the interval in sigma. (0, 0.8) cuts guidance off for the last fifth, (0, 1) guides everywhere.

    Raises InvalidRequest for other numbers.
    """

    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if not 0 <= self.start < self.end <= 1:
            raise InvalidRequest(
                f"a guidance interval must have 0 <= start < end <= 1, in fractions of the steps, not "
                f"({self.start}, {self.end}); guidance=1 turns guidance off"
            )

    def covers(self, step: int, steps: int) -> bool:
        """Whether `step`, counted from 0, of `steps` is guided."""
        return self.start <= step / steps < self.end


def branch_weights_per_step(
    weights: dict[str, float], steps: int, interval: GuidanceInterval
) -> list[dict[str, float]]:
    """Branch -> weight for each of `steps` steps: `weights` within the interval, "full" alone outside it.

    Raises InvalidRequest for an unknown branch, steps below 1, or an interval that falls between two steps.
    """
    unknown = set(weights) - set(BRANCHES)
    if unknown:
        raise InvalidRequest(f"branches {sorted(unknown)} are unknown; choose from {', '.join(BRANCHES)}")
    if steps < 1:
        raise InvalidRequest(f"steps must be at least 1, not {steps}")
    guided = [interval.covers(step, steps) for step in range(steps)]
    if not any(guided):
        raise InvalidRequest(
            f"the guidance interval ({interval.start}, {interval.end}) holds none of {steps} steps; widen it, or turn "
            "guidance off with guidance=1"
        )
    return [dict(weights) if inside else {"full": 1.0} for inside in guided]
