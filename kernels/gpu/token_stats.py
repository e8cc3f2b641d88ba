"""Mean and unbiased variance over tokens, of up to three tensors per launch.

A program takes one head of one row and a stretch of its tokens. Every element of its tile runs Welford's recurrence
over the tiles, and the columns are merged once, by count, mean and sum of squared deviations (Chan, Golub, LeVeque
1979), so no precision is lost if the mean is large relative to the deviation. A stretch's length does not depend on the
batch, so neither does a row's result. Rows of more than one stretch take a second, small launch.
"""

import torch
import triton
import triton.language as tl

from stylefast.kernels.configs import Config, configurations
from stylefast.kernels.gpu.ahead import Specialisation
from stylefast.kernels.gpu.launch import compiler_options, device_of, power_of_two, settings, specialisation
from stylefast.kernels.gpu.strides import ALIGN, aligned, strides

_SIZES = ["rows", "tokens", "heads", "splits"]
_STRIDES = [f"{x}_{dim}" for x in ("x", "y", "z") for dim in ("row", "token", "head")]


@triton.jit
def _merge(mean, m2, count):
    """Merge the statistics of [n, d] parts; count [n] fp32. Returns mean and m2 [d]."""
    total = tl.maximum(tl.sum(count, 0), 1.0)
    # relative to the first part's mean, which is never empty, so that a large mean loses no precision
    first = tl.sum(tl.where((tl.arange(0, mean.shape[0]) == 0)[:, None], mean, 0.0), 0)
    centred = tl.where((count > 0)[:, None], mean - first[None, :], 0.0)
    shift = tl.sum(centred * count[:, None], 0) / total
    apart = centred - shift[None, :]
    return first + shift, tl.sum(m2 + apart * apart * count[:, None], 0)


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def token_stats_kernel(
    x,  # [rows, tokens, heads, D], like y and z; strides in units of ALIGN
    y,
    z,
    mean,  # [tensors, rows, heads, D], or with SPLIT [splits, tensors, rows, heads, D]
    variance,  # the same, or with SPLIT the sum of squared deviations
    rows,
    tokens,
    heads,
    splits,
    x_row,
    x_token,
    x_head,
    y_row,
    y_token,
    y_head,
    z_row,
    z_token,
    z_head,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STRETCH: tl.constexpr,  # tokens of a program
    SPLIT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    split = tl.program_id(0) % splits
    head = (tl.program_id(0) // splits % heads).to(tl.int64)
    row = (tl.program_id(0) // splits // heads % rows).to(tl.int64)
    tensor = tl.program_id(0) // splits // heads // rows

    base = x + (row * x_row + head * x_head) * ALIGN
    stride = x_token
    if tensor == 1:
        base = y + (row * y_row + head * y_head) * ALIGN
        stride = y_token
    if tensor == 2:
        base = z + (row * z_row + head * z_head) * ALIGN
        stride = z_token

    channel = tl.arange(0, BLOCK_D)
    within = channel < D
    token = split * STRETCH + tl.arange(0, BLOCK_T)
    end = tl.minimum(tokens, (split + 1) * STRETCH)
    offsets = token.to(tl.int64)[:, None] * (stride * ALIGN) + channel[None, :]
    seen_mean = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    seen_m2 = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, STRETCH, BLOCK_T):
        inside = start + token < end
        tile = base + start * stride.to(tl.int64) * ALIGN + offsets
        value = tl.load(tile, mask=inside[:, None] & within[None, :], other=0).to(tl.float32)
        count += inside.to(tl.float32)
        step = tl.where(inside, 1.0 / tl.maximum(count, 1.0), 0.0)  # 0 keeps the statistics unchanged
        delta = tl.where(inside[:, None], value - seen_mean, 0.0)
        seen_mean += delta * step[:, None]
        seen_m2 += tl.where(inside[:, None], delta * (value - seen_mean), 0.0)

    merged, m2 = _merge(seen_mean, seen_m2, count)
    if SPLIT:
        place = split.to(tl.int64) * (tl.num_programs(0) // splits) + tl.program_id(0) // splits
    else:
        place = tl.program_id(0).to(tl.int64)
        m2 = m2 / tl.maximum(end - split * STRETCH - 1, 1)
    tl.store(mean + place * D + channel, merged, mask=within)
    tl.store(variance + place * D + channel, m2, mask=within)


@triton.jit(do_not_specialize=["tokens", "splits"])
def merge_stats_kernel(
    part_mean,  # [splits, tensors, rows, heads, D]
    part_m2,
    mean,  # [tensors, rows, heads, D]
    variance,
    tokens,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,  # at least splits
    STRETCH: tl.constexpr,
):
    channel = tl.arange(0, BLOCK_D)
    within = channel < D
    split = tl.arange(0, BLOCK_S)
    mask = (split < splits)[:, None] & within[None, :]
    place = split.to(tl.int64)[:, None] * tl.num_programs(0) + tl.program_id(0)
    count = tl.maximum(tl.minimum(tokens - split * STRETCH, STRETCH), 0).to(tl.float32)
    means = tl.load(part_mean + place * D + channel[None, :], mask=mask, other=0.0)
    m2s = tl.load(part_m2 + place * D + channel[None, :], mask=mask, other=0.0)
    merged, m2 = _merge(means, m2s, count)
    target = tl.program_id(0).to(tl.int64) * D + channel
    tl.store(mean + target, merged, mask=within)
    tl.store(variance + target, m2 / tl.maximum(tokens - 1, 1), mask=within)


def token_stats(
    xs: list[torch.Tensor], mean: torch.Tensor, variance: torch.Tensor, config: Config | None = None
) -> None:
    """Fill mean and variance, contiguous fp32 [tensors, rows, heads, d], of 1 to 3 tensors [rows, tokens, heads, d].

    The tensors have one shape and type; strides may differ. The variance of one token is 0.
    """
    x = xs[0]
    rows, tokens, heads, d = x.shape
    if mean.numel() == 0 or tokens == 0:
        return
    config = settings("token_stats", x, config, d=d)
    block_t, stretch = config["block_t"], config["stretch"]
    splits = triton.cdiv(tokens, stretch)
    xs = [aligned(x) for x in xs]
    x, y, z = (xs[min(i, len(xs) - 1)] for i in range(3))
    programs = len(xs) * rows * heads
    parts = (mean, variance)
    if splits > 1:
        parts = torch.empty((2, splits, *mean.shape), dtype=torch.float32, device=x.device).unbind()
    with device_of(x):
        token_stats_kernel[(programs * splits,)](
            x,
            y,
            z,
            *parts,
            rows,
            tokens,
            heads,
            splits,
            *(s // ALIGN for t in (x, y, z) for s in strides(t)),
            D=d,
            BLOCK_D=power_of_two(d),
            BLOCK_T=block_t,
            STRETCH=stretch,
            SPLIT=splits > 1,
            ALIGN=ALIGN,
            **compiler_options(config),
        )
        if splits > 1:
            merge_stats_kernel[(programs,)](
                *parts,
                mean,
                variance,
                tokens,
                splits,
                D=d,
                BLOCK_D=power_of_two(d),
                BLOCK_S=power_of_two(splits),
                STRETCH=stretch,
                num_warps=4,
                enable_fp_fusion=True,
            )


def specialisations(capability: int) -> list[Specialisation]:
    """List the committed configurations with many stretches and with one."""
    compiles = []
    for key, config in configurations("token_stats", capability):
        for dtype, split in (("bf16", True), ("fp32", False)):
            constants = {
                "D": key["d"],
                "BLOCK_D": power_of_two(key["d"]),
                "BLOCK_T": config["block_t"],
                "STRETCH": config["stretch"],
                "SPLIT": split,
                "ALIGN": ALIGN,
            }
            compiles.append(
                specialisation(
                    f"token_stats {dtype} d={key['d']}{' split' * split}",
                    token_stats_kernel,
                    {"x": f"*{dtype}", "y": f"*{dtype}", "z": f"*{dtype}", "mean": "*fp32", "variance": "*fp32"},
                    constants,
                    num_warps=config["num_warps"],
                    num_stages=config["num_stages"],
                )
            )
        compiles.append(
            specialisation(
                f"token_stats merge d={key['d']}",
                merge_stats_kernel,
                dict.fromkeys(("part_mean", "part_m2", "mean", "variance"), "*fp32"),
                {"D": key["d"], "BLOCK_D": power_of_two(key["d"]), "BLOCK_S": 64, "STRETCH": config["stretch"]},
            )
        )
    return compiles
