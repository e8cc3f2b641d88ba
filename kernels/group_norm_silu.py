"""Group norm, optionally followed by SiLU, optionally with statistics pooled with a reference.

StyleAligned's `share_group_norm` runs a group norm over the target and its reference together. Only two floats per
(row, group) of the reference matter: with n own and n_r reference elements,

    m = (n m_t + n_r m_r) / (n + n_r)        v = (n (v_t + (m_t - m)^2) + n_r (v_r + (m_r - m)^2)) / (n + n_r)

so nothing is concatenated and a baked reference needs no feature maps. Variances are biased, as in group norm.
"""

import torch
import torch.nn.functional as F


def group_norm_silu_ref(
    x: torch.Tensor,  # [rows, channels, h, w]
    groups: int,
    weight: torch.Tensor,  # [channels]
    bias: torch.Tensor,  # [channels]
    eps: float,
    silu: bool,
    page: torch.Tensor | None = None,  # [rows] int64: a row p < rows, or pool entry p - rows, or -1
    pool_mean: torch.Tensor | None = None,  # [pages, groups]
    pool_variance: torch.Tensor | None = None,
    pool_elements: int = 0,  # elements per group behind a pool entry
) -> torch.Tensor:
    """The norm over concatenated elements where the reference is in the batch. Returns x's shape and type."""
    rows, channels = x.shape[:2]
    flat = x.float().reshape(rows, groups, -1)
    out = torch.empty_like(flat)
    for row in range(rows):
        p = int(page[row]) if page is not None else -1
        if 0 <= p < rows:
            both = torch.cat([flat[row], flat[p]], -1)
            mean, variance = both.mean(-1), both.var(-1, unbiased=False)
        else:
            mean, variance = flat[row].mean(-1), flat[row].var(-1, unbiased=False)
            if p >= rows:
                mean, variance = pooled_stats(
                    mean, variance, flat.shape[-1], pool_mean[p - rows], pool_variance[p - rows], pool_elements
                )
        out[row] = (flat[row] - mean[:, None]) / torch.sqrt(variance[:, None] + eps)
    out = out.reshape(x.shape) * weight.float()[:, None, None] + bias.float()[:, None, None]
    return (F.silu(out) if silu else out).to(x.dtype)


def group_norm_silu(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    silu: bool,
    page: torch.Tensor | None = None,
    pool_mean: torch.Tensor | None = None,
    pool_variance: torch.Tensor | None = None,
    pool_elements: int = 0,
) -> torch.Tensor:
    """Group norm and SiLU with pooled statistics by the two-float blend; arguments as `group_norm_silu_ref`."""
    if page is None or page.shape[0] == 0:
        out = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(out) if silu else out

    rows, channels = x.shape[:2]
    flat = x.float().reshape(rows, groups, -1)
    elements = flat.shape[-1]
    variance, mean = torch.var_mean(flat, -1, correction=0)  # [rows, groups]
    all_mean, all_variance = mean, variance
    count = torch.full((rows,), float(elements), device=x.device)
    if pool_mean is not None:
        all_mean, all_variance = torch.cat([mean, pool_mean.float()]), torch.cat([variance, pool_variance.float()])
        count = torch.cat([count, count.new_full((pool_mean.shape[0],), float(pool_elements))])

    safe = page.clamp(min=0)
    shared_mean, shared_variance = pooled_stats(
        mean, variance, elements, all_mean[safe], all_variance[safe], count[safe, None]
    )
    shares = (page >= 0)[:, None]
    mean, variance = torch.where(shares, shared_mean, mean), torch.where(shares, shared_variance, variance)
    out = ((flat - mean[..., None]) * torch.rsqrt(variance[..., None] + eps)).reshape(x.shape)
    out = out * weight.float()[:, None, None] + bias.float()[:, None, None]
    return (F.silu(out) if silu else out).to(x.dtype)


def pooled_stats(mean, variance, elements, other_mean, other_variance, other_elements):
    """Mean and biased variance of two sets taken together, from those of each; shapes broadcast."""
    total = elements + other_elements
    pooled_mean = (elements * mean + other_elements * other_mean) / total
    spread = elements * (variance + (mean - pooled_mean) ** 2)
    other_spread = other_elements * (other_variance + (other_mean - pooled_mean) ** 2)
    return pooled_mean, (spread + other_spread) / total
