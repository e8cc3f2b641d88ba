"""One-pass mean and variance over any number of tiles, accurate even for means far above the spread (Welford)."""

import triton
import triton.language as tl


@triton.jit
def add_to_moments(x, valid, step, mean, spread):
    """Add one value to every element's mean and spread (sum of squared deviations).

    Each element must have seen `step` values so far. Elements with `valid` false are unchanged and must stay invalid in
    later steps.
    """
    delta = x - mean
    grown = mean + delta * (1.0 / (step + 1))
    return tl.where(valid, grown, mean), tl.where(valid, spread + delta * (x - grown), spread)


@triton.jit
def merge_moments(count, mean, spread, axis: tl.constexpr):
    """Return count, mean and spread of the union of all sets along `axis`; a set of count 0 adds nothing."""
    total = tl.sum(count, axis)
    centre = tl.sum(count * mean, axis) / tl.maximum(total, 1.0)
    off = mean - tl.expand_dims(centre, axis)
    return total, centre, tl.sum(spread + count * off * off, axis)
