"""AdaIN's gain and offset per (row, head, channel), from the statistics of each row and of its page."""

import torch
import triton
import triton.language as tl

from stylefast.kernels.configs import Config, configurations
from stylefast.kernels.gpu.ahead import Specialisation
from stylefast.kernels.gpu.launch import compiler_options, device_of, settings, specialisation

_EPS = tl.constexpr(1e-5)
_RUNTIME = ["rows", "pages", "columns", "tensors", "page_row", "strength_row", "strength_tensor"]
_RUNTIME += [f"{x}_{dim}" for x in ("mean", "variance", "pool_mean", "pool_variance") for dim in ("tensor", "page")]


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=["page", "strength"])
def adain_affine_kernel(
    mean,  # [tensors, rows, columns]
    variance,
    page,  # [rows] int64
    strength,  # [rows, tensors]
    pool_mean,  # [tensors, pages, columns]
    pool_variance,
    gain,  # [tensors, rows, columns], contiguous
    offset,
    rows,
    pages,
    columns,
    tensors,
    mean_tensor,
    mean_page,
    variance_tensor,
    variance_page,
    pool_mean_tensor,
    pool_mean_page,
    pool_variance_tensor,
    pool_variance_page,
    page_row,
    strength_row,
    strength_tensor,
    HAS_POOL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor = (tl.program_id(0) % tensors).to(tl.int64)
    row = (tl.program_id(0) // tensors).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(page + row * page_row)
    s = tl.load(strength + row * strength_row + tensor * strength_tensor)
    changed = (p != -1) & (s != 0)
    valid = (p >= 0) & (p < rows + pages)
    mask = column < tl.where(changed & valid, columns, 0)

    own_mean = tl.load(mean + tensor * mean_tensor + row * mean_page + column, mask=mask, other=0.0)
    own_variance = tl.load(variance + tensor * variance_tensor + row * variance_page + column, mask=mask, other=0.0)
    live = column < tl.where(changed & valid & (p < rows), columns, 0)
    target_mean = tl.load(mean + tensor * mean_tensor + p * mean_page + column, mask=live, other=0.0)
    target_variance = tl.load(variance + tensor * variance_tensor + p * variance_page + column, mask=live, other=0.0)
    if HAS_POOL:
        pooled = column < tl.where(changed & valid & (p >= rows), columns, 0)
        at = pool_mean + tensor * pool_mean_tensor + (p - rows) * pool_mean_page + column
        target_mean += tl.load(at, mask=pooled, other=0.0)
        at = pool_variance + tensor * pool_variance_tensor + (p - rows) * pool_variance_page + column
        target_variance += tl.load(at, mask=pooled, other=0.0)

    ratio = tl.sqrt((target_variance + _EPS) / (own_variance + _EPS))
    new_gain = tl.where(valid, 1.0 + s * (ratio - 1.0), float("nan"))
    new_offset = tl.where(valid, s * (target_mean - own_mean * ratio), float("nan"))
    place = (tensor * rows + row) * columns + column
    tl.store(gain + place, tl.where(changed, new_gain, 1.0), mask=column < columns)
    tl.store(offset + place, tl.where(changed, new_offset, 0.0), mask=column < columns)


def adain_affine(
    mean: torch.Tensor,
    variance: torch.Tensor,
    page: torch.Tensor,
    strength: torch.Tensor,
    pool_mean: torch.Tensor | None,
    pool_variance: torch.Tensor | None,
    gain: torch.Tensor,
    offset: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Fill gain and offset, fp32 [tensors, rows, heads, d] and contiguous, by the formula of the public operation.

    mean, variance [tensors, rows, heads, d]; page [rows]; strength [rows, tensors]; pool_* [tensors, pages, heads, d].
    A page outside [-1, rows + pages) gives NaN.
    """
    if gain.numel() == 0:
        return
    tensors, rows, heads, d = mean.shape
    columns = heads * d
    config = settings("adain_affine", mean, config)
    mean, variance = _dense(mean), _dense(variance)
    pages, pool_strides = 0, [0] * 4
    if pool_mean is not None:
        pages = pool_mean.shape[1]
        pool_mean, pool_variance = _dense(pool_mean), _dense(pool_variance)
        pool_strides = [*pool_mean.stride()[:2], *pool_variance.stride()[:2]]
    block = config["block"]
    with device_of(mean):
        adain_affine_kernel[(rows * tensors, triton.cdiv(columns, block))](
            mean,
            variance,
            page,
            strength,
            pool_mean,
            pool_variance,
            gain,
            offset,
            rows,
            pages,
            columns,
            tensors,
            *mean.stride()[:2],
            *variance.stride()[:2],
            *pool_strides,
            *page.stride(),
            *strength.stride(),
            HAS_POOL=pool_mean is not None,
            BLOCK=block,
            **compiler_options(config),
        )


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Return x [tensors, rows, heads, d] with heads and channels contiguous, copied only if they are not."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def specialisations(capability: int) -> list[Specialisation]:
    """List the compiles of all committed configurations, with and without a pool."""
    compiles = []
    for _, config in configurations("adain_affine", capability):
        for pool in (False, True):
            kind = "*fp32" if pool else "none"
            pointers = dict.fromkeys(("mean", "variance", "strength", "gain", "offset"), "*fp32")
            pointers |= {"page": "*i64", "pool_mean": kind, "pool_variance": kind}
            constants = {"HAS_POOL": pool, "BLOCK": config["block"]}
            name = f"adain_affine{' pool' * pool}"
            compiles.append(
                specialisation(name, adain_affine_kernel, pointers, constants, num_warps=config["num_warps"])
            )
    return compiles
