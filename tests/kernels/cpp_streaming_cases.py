"""Cases and formulas in double precision for the C++ kernels that are bound by memory."""

import math

import pytest
import torch
import torch.nn.functional as F

from stylefast._extension import extension

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# largest error that rounding explains here, relative and absolute: values are of order 1
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAN = math.nan
EPS = 1e-5


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(like, shape=None):
    """NaN in the layout of `like`, for results."""
    if shape is None:
        return torch.full_like(like, NAN)
    return torch.full(shape, NAN, dtype=like.dtype)


def assert_near(found, expected, dtype=None, factor=1.0):
    tolerance = TOLERANCE[dtype or found.dtype] * factor
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def geglu(x):
    out = poisoned(x, (*x.shape[:-1], x.shape[-1] // 2))
    extension().geglu(x, out)
    return out


def geglu_formula(x):
    hidden, gate = x.double().chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def layer_norm(x, weight, bias, eps=EPS):
    out = poisoned(x, x.shape)
    extension().layer_norm(x, weight, bias, eps, out)
    return out


def add_layer_norm(x, residual, weight, bias, eps=EPS):
    total, out = poisoned(x, x.shape), poisoned(x, x.shape)
    extension().add_layer_norm(x, residual, weight, bias, eps, total, out)
    return total, out


def layer_norm_formula(x, weight, bias, eps=EPS):
    return F.layer_norm(x.double(), x.shape[-1:], weight.double(), bias.double(), eps)


LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def group_norm(x, groups, weight, bias, silu=True, page=None, pool=(None, None), elements=0, eps=EPS):
    out = poisoned(x)
    page = None if page is None else torch.tensor(page)
    extension().group_norm_silu(x, groups, weight, bias, eps, silu, page, *pool, elements, out)
    return out


def group_norm_formula(x, groups, weight, bias, silu=True, page=None, pool=(None, None), elements=0, eps=EPS):
    rows = len(x)
    flat = x.double().reshape(rows, groups, -1)
    out = torch.empty_like(flat)
    for row in range(rows):
        p = -1 if page is None else page[row]
        own = flat[row] if not 0 <= p < rows else torch.cat([flat[row], flat[p]], -1)
        mean, variance = own.mean(-1), own.var(-1, unbiased=False)
        if p >= rows:
            n, other_mean, other_variance = flat.shape[-1], *(s[p - rows].double() for s in pool)
            both = (n * mean + elements * other_mean) / (n + elements)
            spread = n * (variance + (mean - both) ** 2) + elements * (other_variance + (other_mean - both) ** 2)
            mean, variance = both, spread / (n + elements)
        out[row] = (flat[row] - mean[:, None]) / torch.sqrt(variance + eps)[:, None]
    out = out.reshape(x.shape) * weight.double()[:, None, None] + bias.double()[:, None, None]
    return F.silu(out) if silu else out


def norm_case(rows, channels, height, width, layout, dtype=torch.float32):
    x = normal(rows, channels, height, width, seed=1, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    return x, normal(channels, seed=2, dtype=dtype), normal(channels, seed=3, dtype=dtype)


def adain_case():
    mean, variance = normal(3, 5, 2, 40, seed=1), normal(3, 5, 2, 40, seed=2).abs()
    pool_mean, pool_variance = normal(3, 2, 2, 40, seed=3), normal(3, 2, 2, 40, seed=4).abs()
    strength = torch.rand(5, 3, generator=torch.Generator().manual_seed(5))
    strength[1, 2] = 0
    return mean, variance, torch.tensor([-1, 0, 1, 5, 6]), strength, pool_mean, pool_variance


def adain_affine(mean, *others):
    gain, offset = poisoned(mean, mean.shape), poisoned(mean, mean.shape)
    extension().adain_affine(mean, *others, gain, offset)
    return gain, offset


def step_case(pictures=3, shape=(4, 9, 11), state=torch.float32, network=torch.float32):
    latents, anchor, noise = (normal(pictures, *shape, seed=i, dtype=state) for i in range(3))
    history = normal(pictures, 2, *shape, seed=3, dtype=network)
    predictions = normal(3 * pictures, *shape, seed=4, dtype=network)
    rows = torch.randperm(3 * pictures, generator=torch.Generator().manual_seed(5))
    branch_rows = torch.stack([rows[:pictures], torch.full((pictures,), -1), *rows[pictures:].view(2, pictures)], 1)
    return dict(
        latents=latents,
        anchor=anchor,
        history=history,
        predictions=predictions,
        branch_rows=branch_rows,
        branch_weights=normal(pictures, 4, seed=6),
        rescale=torch.linspace(0, 1, pictures),
        denoised=normal(pictures, 2, seed=7),
        update=normal(pictures, 2, 6, seed=8),
        noise=noise,
    )


def step(case, **given):
    out = tuple(poisoned(case[name], case[name].shape) for name in ("latents", "anchor", "history"))
    case = case | given
    extension().guided_step(*case.values(), *out)
    return out


def every_operation(rows=3):
    """Results of every operation at sizes where several threads have work."""
    x, weight, bias = norm_case(rows, 40, 48, 49, "contiguous")
    last = x.contiguous(memory_format=torch.channels_last)
    tokens, residual = normal(rows, 700, 80, seed=4), normal(rows, 700, 80, seed=5)
    parameters = normal(80, seed=6), normal(80, seed=7)
    stats = torch.full((2, rows, 8, 40), NAN), torch.full((2, rows, 8, 40), NAN)
    extension().token_stats([normal(rows, 600, 8, 40, seed=i) for i in (8, 9)], *stats)
    case = step_case(shape=(4, 80, 81))
    page = [1] * rows
    return (
        geglu(tokens),
        layer_norm(tokens, *parameters),
        *add_layer_norm(tokens, residual, *parameters),
        group_norm(x, 4, weight, bias, page=page),
        group_norm(last, 4, weight, bias, page=page),
        *stats,
        *step(case),
        *adain_affine(*stats, torch.tensor(page), torch.ones(rows, 2), None, None),
    )


def refused(match):
    return pytest.raises(ValueError, match=match)
