"""Mean and variance in one pass over any number of tiles, safe where the mean is large against the spread (Welford)."""

import triton
import triton.language as tl


@triton.jit
def add_to_moments(x, valid, step, mean, spread):
    """Takes one more value into every element's mean and spread (sum of squared deviations).

    Before it each element has seen `step` values; where `valid` is false nothing changes, which must then stay so.
    """
    delta = x - mean
    grown = mean + delta * (1.0 / (step + 1))
    return tl.where(valid, grown, mean), tl.where(valid, spread + delta * (x - grown), spread)


@triton.jit
def merge_moments(count, mean, spread, axis: tl.constexpr):
    """Count, mean and spread of all sets along `axis` taken together; a set of count 0 adds nothing."""
    total = tl.sum(count, axis)
    centre = tl.sum(count * mean, axis) / tl.maximum(total, 1.0)
    off = mean - tl.expand_dims(centre, axis)
    return total, centre, tl.sum(spread + count * off * off, axis)
