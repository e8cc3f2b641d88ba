"""AdaIN: statistics over tokens, and the gains and offsets that they give.

StyleAligned (arXiv 2312.02133, section 3.2) normalises the queries and keys of a target to the statistics of its
reference: AdaIN(x, y) = std(y) * (x - mean(x)) / std(x) + mean(y) with std = sqrt(variance + 1e-5), over tokens, per
row, head and channel, with the unbiased variance. That is affine in x, and a strength s in [0, 1] applies it partially:

    ratio = sqrt((variance_y + 1e-5) / (variance_x + 1e-5))
    gain  = 1 + s (ratio - 1)           offset = s (mean_y - ratio mean_x)

`token_stats` computes the means and variances, `adain_affine` the gains and offsets, and `shared_attention` applies
them as it loads x, which needs no extra pass. A constant channel has variance 0; eps inside the root keeps it finite.
"""

import torch

from stylefast.errors import InvalidRequest
from stylefast.kernels import checks
from stylefast.kernels.registry import Operation, require_extension
from stylefast.kernels.shared_attention import Affine

ADAIN_EPS = 1e-5


def token_stats_ref(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute mean and unbiased variance over tokens in plain PyTorch.

    x: [rows, tokens, heads, d], any float type, any strides. Returns two fp32 tensors [rows, heads, d], or fp64 for
    fp64 input. The variance of a single token is 0.
    """
    tokens = x.shape[1]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.sum(1) / tokens
    deviation = x - mean[:, None]
    return mean, (deviation * deviation).sum(1) / max(tokens - 1, 1)


def token_stats(x: torch.Tensor, *more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and unbiased variance over tokens, of up to three tensors in one pass.

    Each is [rows, tokens, heads, d], all of one shape and type; strides may differ, the last dimension is contiguous.
    Returns two fp32 tensors: [rows, heads, d] for one tensor, [tensors, rows, heads, d] for several. Raises
    InvalidRequest, a ValueError, for other shapes, types or strides, and if there are no tokens.
    """
    tensors = [x, *more]
    checks.shape("x", x, rows=-1, tokens=-1, heads=-1, d=-1)
    checks.floating("x", x)
    if not 1 <= len(tensors) <= 3:
        raise InvalidRequest(f"token_stats takes 1 to 3 tensors, not {len(tensors)}")
    if x.shape[1] == 0:
        raise InvalidRequest(f"token_stats needs at least 1 token, but x has shape {list(x.shape)}")
    rows, tokens, heads, width = x.shape
    for i, other in enumerate(tensors):
        name = f"tensor {i}"
        checks.shape(name, other, rows=rows, tokens=tokens, heads=heads, d=width)
        checks.dtype(name, other, x.dtype)
        checks.dense_channels(**{name: other})
        checks.together("x", **{"x": x, name: other})
    mean, variance = stats_operation.call(tensors)
    return (mean, variance) if more else (mean[0], variance[0])


def _stats_refuse(form, arguments) -> str:
    width = arguments[0][0].shape[-1]
    return f"head size {width} is not a multiple of 8" if form == "cpp" and width % 8 else ""


def _stats_outputs(tensors):
    rows, _, heads, width = tensors[0].shape
    shape = (len(tensors), rows, heads, width)
    return tuple(torch.empty(shape, dtype=torch.float32, device=tensors[0].device) for _ in range(2))


def _stats_torch(tensors):
    if tensors[0].numel() == 0:
        return _stats_outputs(tensors)
    exact, correction = torch.promote_types(tensors[0].dtype, torch.float32), min(1, tensors[0].shape[1] - 1)
    pairs = [torch.var_mean(x.to(exact), dim=1, correction=correction) for x in tensors]
    mean, variance = torch.stack([mean for _, mean in pairs]), torch.stack([variance for variance, _ in pairs])
    return mean.float(), variance.float()


def _stats_cpp(tensors, mean, variance):
    require_extension().token_stats(tensors, mean, variance)


stats_operation = Operation(
    "token_stats",
    "(Tensor[] tensors) -> (Tensor, Tensor)",
    outputs=_stats_outputs,
    forms={"triton": "token_stats", "cpp": _stats_cpp, "torch": _stats_torch},
    refuse=_stats_refuse,
)


def adain_affine_ref(
    mean: torch.Tensor,  # [parts, rows, heads, d]
    variance: torch.Tensor,
    page: torch.Tensor,  # [rows] int64: a row p < rows, or pool entry p - rows, or -1
    strength: torch.Tensor,  # [rows, parts] fp32
    pool_mean: torch.Tensor | None = None,  # [parts, pages, heads, d]
    pool_variance: torch.Tensor | None = None,
) -> Affine:
    """Evaluate the formula above, one part and row at a time."""
    gain, offset = torch.ones_like(mean), torch.zeros_like(mean)
    parts, rows = mean.shape[:2]
    all_mean = mean if pool_mean is None else torch.cat([mean, pool_mean], 1)
    all_variance = variance if pool_variance is None else torch.cat([variance, pool_variance], 1)
    for part in range(parts):
        for row in range(rows):
            p, s = int(page[row]), float(strength[row, part])
            if p < 0 or s == 0:
                continue
            ratio = torch.sqrt((all_variance[part, p] + ADAIN_EPS) / (variance[part, row] + ADAIN_EPS))
            gain[part, row] = 1 + s * (ratio - 1)
            offset[part, row] = s * (all_mean[part, p] - ratio * mean[part, row])
    return Affine(gain, offset)


def adain_affine(
    mean: torch.Tensor,
    variance: torch.Tensor,
    page: torch.Tensor,
    strength: torch.Tensor,
    pool_mean: torch.Tensor | None = None,
    pool_variance: torch.Tensor | None = None,
    check_finite: bool = True,
) -> Affine:
    """Return the gain and offset that move each row towards the statistics of its page.

    mean, variance [parts, rows, heads, d] fp32, from `token_stats` (3 parts: queries, keys, values); page [rows] int64,
    p < rows is row p, p >= rows is entry p - rows of pool_mean, pool_variance [parts, pages, heads, d], -1 is none;
    strength [rows, parts] in [0, 1]. Rows without a page, and parts of strength 0, get exactly gain 1 and offset 0,
    even if their statistics are NaN. Returns Affine of two tensors like mean.

    Raises InvalidRequest, a ValueError, for shapes that don't fit and, on CPUs or under STYLEFAST_CHECKS=1, for a page
    or strength out of range and for statistics in use that are not finite or a negative variance. `check_finite=False`
    skips the check of statistics: if activations overflowed, the gains of those rows are not finite either.
    """
    _check(mean, variance, page, strength, pool_mean, pool_variance)
    return Affine(*affine_operation.call(mean, variance, page, strength, pool_mean, pool_variance, check_finite))


def _check(mean, variance, page, strength, pool_mean, pool_variance):
    checks.shape("mean", mean, parts=-1, rows=-1, heads=-1, d=-1)
    parts, rows, heads, width = mean.shape
    checks.shape("variance", variance, parts=parts, rows=rows, heads=heads, d=width)
    checks.shape("page", page, rows=rows)
    checks.dtype("page", page, torch.int64)
    checks.shape("strength", strength, rows=rows, parts=parts)
    if (pool_mean is None) != (pool_variance is None):
        raise InvalidRequest("pool_mean and pool_variance go together: give both or neither")
    if pool_mean is not None:
        checks.shape("pool_mean", pool_mean, parts=parts, pages=-1, heads=heads, d=width)
        checks.shape("pool_variance", pool_variance, parts=parts, pages=pool_mean.shape[1], heads=heads, d=width)
    statistics = {"mean": mean, "variance": variance, "pool_mean": pool_mean, "pool_variance": pool_variance}
    for name, x in {**statistics, "strength": strength}.items():
        if x is not None:
            checks.dtype(name, x, torch.float32)
    checks.together("mean", **statistics, page=page, strength=strength)


def _check_values(mean, variance, page, strength, pool_mean, pool_variance, check_finite):
    rows, pages = mean.shape[1], pool_mean.shape[1] if pool_mean is not None else 0
    checks.integers_within("page", page, -1, rows + pages, f"pages of {rows} rows and {pages} in the pool")
    checks.numbers_within("strength", strength, 0, 1)
    for part in range(mean.shape[0] if check_finite else 0):
        moves = (page >= 0) & (strength[:, part] != 0)
        of_rows = torch.cat([moves.nonzero().flatten(), page[moves & (page < rows)]])
        _check_statistics("", mean[part, of_rows], variance[part, of_rows])
        if pool_mean is not None:
            entries = page[moves & (page >= rows)] - rows
            _check_statistics("pool_", pool_mean[part, entries], pool_variance[part, entries])


def _check_statistics(prefix, mean, variance):
    largest = torch.finfo(torch.float32).max
    checks.numbers_within(f"{prefix}mean", mean, -largest, largest)
    checks.numbers_within(f"{prefix}variance", variance, 0, largest)


def _affine_outputs(mean, *others):
    return tuple(torch.empty(mean.shape, dtype=torch.float32, device=mean.device) for _ in range(2))


def _affine_torch(mean, variance, page, strength, pool_mean, pool_variance, check_finite):
    all_mean, all_variance = mean, variance
    if pool_mean is not None:
        all_mean, all_variance = torch.cat([mean, pool_mean], 1), torch.cat([variance, pool_variance], 1)
    source = page.clamp(min=0)
    s = strength.T[:, :, None, None]  # [parts, rows, 1, 1]
    ratio = torch.sqrt((all_variance[:, source] + ADAIN_EPS) / (variance + ADAIN_EPS))
    applies = (s != 0) & (page >= 0)[:, None, None]
    gain = torch.where(applies, 1 + s * (ratio - 1), 1.0)
    offset = torch.where(applies, s * (all_mean[:, source] - ratio * mean), 0.0)
    return gain.contiguous(), offset.contiguous()


def _affine_cpp(mean, variance, page, strength, pool_mean, pool_variance, check_finite, gain, offset):
    require_extension().adain_affine(mean, variance, page, strength, pool_mean, pool_variance, gain, offset)


def _affine_triton(mean, variance, page, strength, pool_mean, pool_variance, check_finite, gain, offset, **config):
    from stylefast.kernels.gpu.adain_affine import adain_affine as launch

    launch(mean, variance, page, strength, pool_mean, pool_variance, gain, offset, **config)


affine_operation = Operation(
    "adain_affine",
    "(Tensor mean, Tensor variance, Tensor page, Tensor strength, Tensor? pool_mean, Tensor? pool_variance, "
    "bool check_finite) "
    "-> (Tensor, Tensor)",
    outputs=_affine_outputs,
    forms={"triton": _affine_triton, "cpp": _affine_cpp, "torch": _affine_torch},
    values=_check_values,
)
