"""Token statistics and the affine form of AdaIN.

StyleAligned (arXiv 2312.02133, section 3.2) normalises the queries and keys of a target to the statistics of its
reference: AdaIN(x, y) = std(y) * (x - mean(x)) / std(x) + mean(y), over tokens, per row, head and channel, with the
unbiased variance and 1e-5 inside the root. That is one gain and one offset per (row, head, channel), so it can be
applied where x is loaded and needs no pass of its own.
"""

import torch

ADAIN_EPS = 1e-5


def token_stats_ref(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance over tokens, spelled out.

    x: [rows, tokens, heads, d], any float type, any strides. Returns two fp32 tensors [rows, heads, d].
    The variance of a single token is 0.
    """
    tokens = x.shape[1]
    x = x.float()
    mean = x.sum(1) / tokens
    deviation = x - mean[:, None]
    return mean, (deviation * deviation).sum(1) / max(tokens - 1, 1)


def token_stats(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance over tokens: x [rows, tokens, heads, d] -> two fp32 tensors [rows, heads, d]."""
    variance, mean = torch.var_mean(x.float(), dim=1, correction=min(1, x.shape[1] - 1))
    return mean, variance


def adain_affine(
    mean: torch.Tensor,  # [rows, heads, d], of the tensor to change
    variance: torch.Tensor,  # [rows, heads, d]
    target_mean: torch.Tensor,  # [rows, heads, d], of the reference
    target_variance: torch.Tensor,  # [rows, heads, d]
    strength: torch.Tensor,  # [rows], 0: leave x alone, 1: full AdaIN
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain and offset [rows, heads, d]: x * gain + offset is x moved by `strength` towards AdaIN(x, target)."""
    s = strength[:, None, None]
    ratio = torch.sqrt((target_variance + ADAIN_EPS) / (variance + ADAIN_EPS))
    gain = 1 + s * (ratio - 1)
    offset = s * (target_mean - mean * ratio)
    return gain, offset
