"""Group norm with optional SiLU and optional pooling of statistics with a reference.

StyleAligned's `share_group_norm` runs a group norm over the target and its reference together. Only two floats per
(row, group) of the reference are needed: with n own and n_r reference elements,

    m = (n m_t + n_r m_r) / (n + n_r)        v = (n (v_t + (m_t - m)^2) + n_r (v_r + (m_r - m)^2)) / (n + n_r)

so nothing is concatenated and a baked reference needs no feature maps. Variances are biased, as in group norm.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from stylefast.errors import InvalidRequest
from stylefast.kernels import checks
from stylefast.kernels.registry import Operation, require_extension


class Norm(NamedTuple):
    """A group norm, and whether SiLU follows it; see `group_norm_silu`."""

    groups: int
    weight: torch.Tensor  # [channels]
    bias: torch.Tensor  # [channels]
    eps: float
    silu: bool


class NormPages(NamedTuple):
    """The page with which each row pools its statistics, and pages outside the batch; see `group_norm_silu`."""

    page: torch.Tensor | None = None  # [rows] int64; -1: none
    mean: torch.Tensor | None = None  # [pages, groups] fp32
    variance: torch.Tensor | None = None
    elements: int = 0  # per group of such a page


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
    """Normalise over concatenated elements if the reference is in the batch. Returns x's shape and type."""
    rows, exact = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    flat = x.to(exact).reshape(rows, groups, x[0, 0].numel() * x.shape[1] // groups)
    out = torch.empty_like(flat)
    for row in range(rows):
        p = int(page[row]) if page is not None else -1
        if 0 <= p < rows:
            both = torch.cat([flat[row], flat[p]], -1)
            mean, variance = both.mean(-1), both.var(-1, unbiased=False)
        else:
            mean, variance = flat[row].mean(-1), flat[row].var(-1, unbiased=False)
            if p >= rows:
                assert pool_mean is not None and pool_variance is not None
                mean, variance = pooled_stats(
                    mean, variance, flat.shape[-1], pool_mean[p - rows], pool_variance[p - rows], pool_elements
                )
        out[row] = (flat[row] - mean[:, None]) / torch.sqrt(variance[:, None] + eps)
    out = out.reshape(x.shape) * weight.to(exact)[:, None, None] + bias.to(exact)[:, None, None]
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
    pool_elements: int | None = 0,
) -> torch.Tensor:
    """Apply group norm and SiLU with pooled statistics, the custom op `torch.ops.stylefast.group_norm_silu`.

    x [rows, channels, h, w], contiguous or channels-last; weight, bias [channels]; page [rows] int64 or empty: p < rows
    pools with row p, p >= rows with entry p - rows of pool_mean, pool_variance [pages, groups] fp32, taken over
    pool_elements elements each (None: as many as x has), -1 is the plain norm. Returns x's shape, type and memory
    format.

    Raises InvalidRequest, a ValueError, for shapes and types that don't fit and, on CPUs or under STYLEFAST_CHECKS=1,
    for a page out of range and for pool statistics that are not finite or a negative variance.
    """
    if page is not None and page.shape == (0,):
        page = None
    if pool_elements is None:
        pool_elements = x.shape[1] // groups * x.shape[2] * x.shape[3]
    norm = Norm(groups, weight, bias, eps, silu)
    pages = NormPages(page, pool_mean, pool_variance, pool_elements)
    _check(x, norm, pages)
    return operation.call(x, norm, pages)


def _check(x, norm: Norm, pages: NormPages):
    groups, weight, bias, eps, _ = norm
    page, pool_mean, pool_variance, pool_elements = pages
    checks.shape("x", x, rows=-1, channels=-1, h=-1, w=-1)
    checks.floating("x", x)
    rows, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise InvalidRequest(f"{channels} channels can't be split into {groups} groups")
    if not eps > 0:
        raise InvalidRequest(f"eps must be above 0, not {eps}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        checks.shape(name, parameter, channels=channels)
        checks.dtype(name, parameter, x.dtype, torch.float32)
    if weight.dtype != bias.dtype:
        raise InvalidRequest(f"weight and bias must have one type, not {weight.dtype} and {bias.dtype}")
    if page is not None:
        checks.shape("page", page, rows=rows)
        checks.dtype("page", page, torch.int64)
    if (pool_mean is None) != (pool_variance is None):
        raise InvalidRequest("pool_mean and pool_variance go together: give both or neither")
    if pool_mean is not None and pool_variance is not None:
        checks.shape("pool_mean", pool_mean, pages=-1, groups=groups)
        checks.shape("pool_variance", pool_variance, pages=pool_mean.shape[0], groups=groups)
        for name, x_ in (("pool_mean", pool_mean), ("pool_variance", pool_variance)):
            checks.dtype(name, x_, torch.float32)
        if pool_elements < 1:
            raise InvalidRequest(f"pool_elements must say how many elements a group had, not {pool_elements}")
    checks.together("x", x=x, weight=weight, bias=bias, page=page, pool_mean=pool_mean, pool_variance=pool_variance)


def _check_values(x, norm, pool: NormPages):
    page, pool_mean, pool_variance, _ = pool
    if page is not None:
        pages = pool_mean.shape[0] if pool_mean is not None else 0
        meaning = f"pages of {x.shape[0]} rows and {pages} in the pool"
        checks.integers_within("page", page, -1, x.shape[0] + pages, meaning)
        if pool_mean is not None and pool_variance is not None:
            largest, used = torch.finfo(torch.float32).max, page[page >= x.shape[0]] - x.shape[0]
            checks.numbers_within("pool_mean", pool_mean[used], -largest, largest)
            checks.numbers_within("pool_variance", pool_variance[used], 0, largest)


def _refuse(form, arguments) -> str:
    x, norm, _ = arguments
    if form != "torch" and not x.dtype == norm.weight.dtype == norm.bias.dtype:
        return f"x is {x.dtype}, but weight and bias are {norm.weight.dtype} and {norm.bias.dtype}"
    return ""


def _memory_format(x):
    dense = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if dense else torch.contiguous_format


def _outputs(x, *others):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


def _torch(x, norm: Norm, pages: NormPages):
    return _pooled_norm(x, norm, pages).contiguous(memory_format=_memory_format(x))


def _pooled_norm(x, norm: Norm, pages: NormPages):
    groups, weight, bias, eps, silu = norm
    page, pool_mean, pool_variance, pool_elements = pages
    if page is None or x.numel() == 0:
        wide = x.to(torch.promote_types(x.dtype, weight.dtype))
        out = F.group_norm(wide, groups, weight, bias, eps)
        return (F.silu(out) if silu else out).to(x.dtype)

    rows, exact = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    flat = x.to(exact).reshape(rows, groups, -1)
    elements = flat.shape[-1]
    variance, mean = torch.var_mean(flat, -1, correction=0)  # [rows, groups]
    all_mean, all_variance = mean, variance
    count = torch.full((rows,), float(elements), device=x.device)
    if pool_mean is not None and pool_variance is not None:
        all_mean, all_variance = torch.cat([mean, pool_mean.to(exact)]), torch.cat([variance, pool_variance.to(exact)])
        count = torch.cat([count, count.new_full((pool_mean.shape[0],), float(pool_elements))])

    safe = page.clamp(min=0)
    shared_mean, shared_variance = pooled_stats(
        mean, variance, elements, all_mean[safe], all_variance[safe], count[safe, None]
    )
    shares = (page >= 0)[:, None]
    mean, variance = torch.where(shares, shared_mean, mean), torch.where(shares, shared_variance, variance)
    out = ((flat - mean[..., None]) * torch.rsqrt(variance[..., None] + eps)).reshape(x.shape)
    out = out * weight.to(exact)[:, None, None] + bias.to(exact)[:, None, None]
    return (F.silu(out) if silu else out).to(x.dtype)


def pooled_stats(
    mean: torch.Tensor,
    variance: torch.Tensor,
    elements: int | torch.Tensor,
    other_mean: torch.Tensor,
    other_variance: torch.Tensor,
    other_elements: int | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance of the union of two sets, from those of each; shapes broadcast."""
    total = elements + other_elements
    pooled_mean = (elements * mean + other_elements * other_mean) / total
    spread = elements * (variance + (mean - pooled_mean) ** 2)
    other_spread = other_elements * (other_variance + (other_mean - pooled_mean) ** 2)
    return pooled_mean, (spread + other_spread) / total


def _cpp(x, norm: Norm, pages: NormPages, out):
    norm = norm._replace(weight=norm.weight.contiguous(), bias=norm.bias.contiguous())
    # copies only if x is neither contiguous nor channels-last
    require_extension().group_norm_silu(x.contiguous(memory_format=_memory_format(x)), *norm, *pages, out)


operation = Operation(
    "group_norm_silu",
    "(Tensor x, int groups, Tensor weight, Tensor bias, float eps, bool silu, Tensor? page, Tensor? pool_mean, "
    "Tensor? pool_variance, SymInt pool_elements) -> Tensor",
    groups=(Norm, NormPages),
    outputs=_outputs,
    forms={"triton": "group_norm_silu", "cpp": _cpp, "torch": _torch},
    refuse=_refuse,
    values=_check_values,
)
