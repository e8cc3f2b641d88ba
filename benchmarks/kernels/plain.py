"""The peers in plain PyTorch, as typically written by users of diffusers.

q, k, v are [rows, tokens, heads, d]; rows are ordered by page: the first rows / pages of them belong to page 0.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

EPS = 1e-5


def attention(q, k, v):
    """Compute SDPA over [rows, tokens, heads, d]."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def with_page(x: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Append each row's page tokens to its own tokens: [rows, tokens + page tokens, heads, d]."""
    return torch.cat([x, expand(pages, x.shape[0])], 1)


def expand(pages: torch.Tensor, rows: int) -> torch.Tensor:
    """Expand [pages, ...] to [rows, ...], repeating each page for its rows."""
    each = rows // pages.shape[0]
    return pages[:, None].expand(-1, each, *pages.shape[1:]).reshape(rows, *pages.shape[1:])


def adain(x: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Normalise x over its tokens and apply the mean and deviation [rows, 1, heads, d], in x's type."""
    own_deviation = (x.var(dim=1, keepdim=True) + EPS).sqrt()
    return (x - x.mean(dim=1, keepdim=True)) / own_deviation * deviation + mean


def page_statistics(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and deviation [pages, 1, heads, d] of page tokens, in their type."""
    return pages.mean(dim=1, keepdim=True), (pages.var(dim=1, keepdim=True) + EPS).sqrt()


def style_aligned(q, k, v, page_k, page_v, q_statistics, k_statistics, attend: Callable = attention):
    """Apply AdaIN with statistics, expand, cat, attention: StyleAligned's attention with a cached reference."""
    rows = q.shape[0]
    q = adain(q, *(expand(s, rows) for s in q_statistics))
    k = adain(k, *(expand(s, rows) for s in k_statistics))
    return attend(q, with_page(k, page_k), with_page(v, page_v))


def two_attentions(q, text_k, text_v, image_k, image_v, strength: float, attend: Callable = attention):
    """Apply IP-Adapter's cross-attention: one call for text, one for the image tokens, and their weighted sum."""
    return attend(q, text_k, text_v) + strength * attend(q, image_k, image_v)


def token_stats(q, k):
    """Return mean and variance of both over tokens."""
    pairs = [torch.var_mean(wide(x), dim=1) for x in (q, k)]
    return torch.stack([mean for _, mean in pairs]), torch.stack([variance for variance, _ in pairs])


def group_norm_silu(x, groups: int, weight, bias, eps: float):
    """Apply group norm and SiLU to x [rows, channels, h, w]."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def geglu(x):
    """Return the first half of the last dimension, gated by the GELU of the second."""
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def add_layer_norm(x, residual, weight, bias, eps: float):
    """Return the sum of both and its layer norm."""
    total = x + residual
    return total, F.layer_norm(total, (x.shape[-1],), weight, bias, eps)


def guided_step(latents, anchor, history, predictions, branch_rows, branch_weights, rescale, denoised, update, noise):
    """Apply classifier-free guidance and the linear update; arguments as in `stylefast.kernels.guided_step`."""
    null, full = (wide(predictions[branch_rows[:, branch]]) for branch in (0, 3))
    output = _times(branch_weights[:, 0], null) + _times(branch_weights[:, 3], full)
    return _updated(latents, anchor, history, output, denoised, update, noise)


def rescaled_guided_step(
    latents, anchor, history, predictions, branch_rows, branch_weights, rescale, denoised, update, noise
):
    """Compute `guided_step` with guidance rescale."""
    null, full = (wide(predictions[branch_rows[:, branch]]) for branch in (0, 3))
    output = _times(branch_weights[:, 0], null) + _times(branch_weights[:, 3], full)
    output = _times(1 - rescale + rescale * full.std((1, 2, 3)) / output.std((1, 2, 3)), output)
    return _updated(latents, anchor, history, output, denoised, update, noise)


def _updated(latents, anchor, history, output, denoised, update, noise):
    x0 = _times(denoised[:, 0], wide(latents)) + _times(denoised[:, 1], output)
    terms = [wide(term) for term in (latents, anchor, x0, history[:, 0], history[:, 1], noise)]
    moved = [sum(_times(update[:, target, i], term) for i, term in enumerate(terms)) for target in (0, 1)]
    next_history = torch.stack([x0.to(history.dtype), history[:, 0]], 1)
    return moved[0].to(latents.dtype), moved[1].to(anchor.dtype), next_history


def wide(x: torch.Tensor) -> torch.Tensor:
    """Convert to fp32, but keep fp64."""
    return x if x.dtype == torch.float64 else x.float()


def _times(weight: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    return weight[:, None, None, None] * pictures
