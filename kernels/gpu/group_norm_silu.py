"""Group norm with SiLU in Triton, with optional pooling of statistics with a reference; two launches, no copy.

The first computes mean and spread of every (row, group) over splits of its positions; the second merges the splits,
pools them with the statistics of the row's page and writes the result. Both read tiles [channels, positions] by
strides, so one kernel serves contiguous and channels_last: in the first launch a contiguous group is one long channel,
and a channels_last tile spans several whole groups so that neighbouring channels are read together. All arithmetic is
fp32.
"""

import torch
import triton
import triton.language as tl

from stylefast.errors import InvalidRequest
from stylefast.kernels.configs import Config, configurations
from stylefast.kernels.gpu.ahead import Specialisation
from stylefast.kernels.gpu.launch import (
    compiler_options,
    device_of,
    power_of_two,
    settings,
    specialisation,
    with_position_stride,
)
from stylefast.kernels.gpu.moments import add_to_moments, merge_moments
from stylefast.kernels.group_norm_silu import Norm, NormPages

TABLES = [
    "groups",
    "splits",
    "tiles",
    "rows",
    "page_stride",
    "pages",
    "pool_elements",
    "pool_mean_page",
    "pool_mean_group",
    "pool_variance_page",
    "pool_variance_group",
]


@triton.jit(do_not_specialize=["groups", "splits", "tiles"])
def _statistics(
    x,  # [rows, channels, positions]
    moments,  # [rows, groups, splits, 3]: count, mean, spread
    channels,
    positions,
    groups,
    splits,
    tiles,
    x_row,
    x_channel,
    x_position,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Compute the moments of GROUPS groups of one row over `tiles` tiles of positions per program."""
    split = tl.program_id(0)
    first_group = tl.program_id(1) * GROUPS
    row = tl.program_id(2).to(tl.int64)
    local = tl.arange(0, CHANNELS)
    channel = first_group * GROUP_CHANNELS + local
    in_block = (local < GROUPS * GROUP_CHANNELS) & (channel < channels)
    begin = split * tiles * POSITIONS
    end = tl.minimum(begin + tiles * POSITIONS, positions)
    start = x + row * x_row + channel[:, None].to(tl.int64) * x_channel

    mean = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    spread = tl.zeros([CHANNELS, POSITIONS], tl.float32)
    step = 0.0
    for offset in range(begin, end, POSITIONS):
        position = offset + tl.arange(0, POSITIONS)
        valid = in_block[:, None] & (position < positions)[None, :]
        values = tl.load(start + position[None, :] * x_position, mask=valid, other=0.0).to(tl.float32)
        mean, spread = add_to_moments(values, valid, step, mean, spread)
        step += 1.0

    lane = tl.arange(0, POSITIONS)
    seen = tl.maximum(end - begin - lane + POSITIONS - 1, 0) // POSITIONS  # number of values per lane
    counts = tl.where(in_block[:, None], seen[None, :], 0).to(tl.float32)
    count, mean, spread = merge_moments(counts, mean, spread, 1)  # [channels]
    group = tl.arange(0, GROUPS_PADDED)
    belongs = (local // GROUP_CHANNELS)[:, None] == group[None, :]
    count = tl.where(belongs, count[:, None], 0.0)  # [channels, groups]
    mean = tl.where(belongs, mean[:, None], 0.0)
    spread = tl.where(belongs, spread[:, None], 0.0)
    count, mean, spread = merge_moments(count, mean, spread, 0)  # [groups]

    target = moments + ((row * groups + first_group + group) * splits + split) * 3
    in_range = (group < GROUPS) & (first_group + group < groups)
    tl.store(target, count, mask=in_range)
    tl.store(target + 1, mean, mask=in_range)
    tl.store(target + 2, spread, mask=in_range)


@triton.jit
def _group_moments(moments, row, group, known, groups, splits, SPLITS: tl.constexpr):
    """Return count, mean and biased variance of `group` [n] in one row; zeros for groups >= `known`."""
    split = tl.arange(0, SPLITS)
    place = moments + ((row * groups + group[:, None]) * splits + split[None, :]) * 3
    inside = (group < known)[:, None] & (split < splits)[None, :]
    count = tl.load(place, mask=inside, other=0.0)
    mean = tl.load(place + 1, mask=inside, other=0.0)
    spread = tl.load(place + 2, mask=inside, other=0.0)
    count, mean, spread = merge_moments(count, mean, spread, 1)
    return count, mean, spread / tl.maximum(count, 1.0)


@triton.jit(do_not_specialize=TABLES)
def _apply(
    x,  # [rows, channels, positions]
    moments,  # [rows, groups, splits, 3]
    weight,
    bias,  # [channels]
    page,  # [rows] or None
    pool_mean,
    pool_variance,  # [pages, groups] or None
    out,  # [rows, channels, positions]
    eps,
    channels,
    positions,
    groups,
    splits,
    rows,
    tiles,
    page_stride,
    pages,
    pool_elements,
    pool_mean_page,
    pool_mean_group,
    pool_variance_page,
    pool_variance_group,
    x_row,
    x_channel,
    x_position,
    out_row,
    out_channel,
    out_position,
    GROUP_CHANNELS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    SILU: tl.constexpr,
):
    """Normalise CHANNELS channels of one row over `tiles` tiles of positions per program."""
    begin = tl.program_id(0) * tiles * POSITIONS
    first_channel = tl.program_id(1) * CHANNELS
    row = tl.program_id(2).to(tl.int64)
    channel = first_channel + tl.arange(0, CHANNELS)
    in_channels = channel < channels

    first_group = first_channel // GROUP_CHANNELS
    group = first_group + tl.arange(0, GROUPS_PADDED)
    count, mean, variance = _group_moments(moments, row, group, groups, groups, splits, SPLITS)
    if page is not None:
        other = tl.load(page + row * page_stride)
        in_batch = (other >= 0) & (other < rows)
        other_count, other_mean, other_variance = _group_moments(
            moments, tl.where(in_batch, other, 0), group, tl.where(in_batch, groups, 0), groups, splits, SPLITS
        )
        if pool_mean is not None:
            pooled = (other >= rows) & (other < rows + pages)
            entry = tl.where(pooled, other - rows, 0)
            from_pool = group < tl.where(pooled, groups, 0)
            other_count = tl.where(pooled, pool_elements * 1.0, other_count)
            other_mean += tl.load(
                pool_mean + entry * pool_mean_page + group * pool_mean_group, mask=from_pool, other=0.0
            ).to(tl.float32)
            other_variance += tl.load(
                pool_variance + entry * pool_variance_page + group * pool_variance_group, mask=from_pool, other=0.0
            ).to(tl.float32)
        total = tl.maximum(count + other_count, 1.0)
        off = other_mean - mean
        share = other_count / total  # 0 for a row without a page, which keeps its own statistics
        mean += off * share
        variance += (other_variance - variance) * share + off * off * share * (1 - share)
        mean = tl.where(other >= rows + pages, float("nan"), mean)

    scale = tl.rsqrt(variance + eps)
    belongs = (channel // GROUP_CHANNELS)[:, None] == group[None, :]  # [channels, groups]
    centre = tl.sum(tl.where(belongs, mean[None, :], 0.0), 1)
    gain = tl.sum(tl.where(belongs, scale[None, :], 0.0), 1)
    gain *= tl.load(weight + channel, mask=in_channels, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=in_channels, other=0.0).to(tl.float32)

    far = channel[:, None].to(tl.int64)
    source = x + row * x_row + far * x_channel
    target = out + row * out_row + far * out_channel
    for start in range(begin, tl.minimum(begin + tiles * POSITIONS, positions), POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        inside = in_channels[:, None] & (position < positions)[None, :]
        values = tl.load(source + position[None, :] * x_position, mask=inside, other=0.0).to(tl.float32)
        values = (values - centre[:, None]) * gain[:, None] + offset[:, None]
        if SILU:
            values = values / (1 + tl.exp(-values))
        tl.store(target + position[None, :] * out_position, values.to(out.dtype.element_ty), mask=inside)


def group_norm_silu(
    x: torch.Tensor,
    norm: Norm,
    pages: NormPages,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write the norm of x [rows, channels, h, w] into `out`; arguments as the operation's, already checked.

    `out` is contiguous or channels_last, or a slice of that. A row whose page is out of range becomes NaN.
    Raises InvalidRequest for pictures that span 2**31 elements or more.
    """
    if x.numel() == 0:
        return
    groups, weight, bias, eps, silu = norm
    page, pool_mean, pool_variance, pool_elements = pages
    rows, channels, height, width = x.shape
    positions, group_channels = height * width, channels // groups
    x, x_position = with_position_stride(x)
    out, out_position = with_position_stride(out)
    weight, bias = weight.contiguous(), bias.contiguous()
    if (reach := positions * max(x_position, out_position)) >= 2**31:
        raise InvalidRequest(f"a picture of x may reach over 2**31 - 1 elements, not {reach}; norm it in parts")
    packed = x.stride(1) == positions and x_position == 1  # a group is contiguous in memory
    layout = "contiguous" if x_position == 1 else "channels_last"
    config = settings("group_norm_silu", x, config, layout=layout, bits=x.element_size() * 8)
    if packed:
        # the first launch treats a group as one long channel
        sizes = (groups, group_channels * positions, x.stride(0), group_channels * positions, 1)
        tile = statistics_tile(1, 1, config["elements"], x.element_size())
    else:
        sizes = (channels, positions, x.stride(0), x.stride(1), x_position)
        tile = statistics_tile(group_channels, groups, config["elements"], x.element_size())
    length = sizes[1]
    blocks = triton.cdiv(groups, tile["GROUPS"])
    wanted = max(1, config["programs"] // (rows * blocks))
    splits = min(config["splits"], wanted, triton.cdiv(length, tile["POSITIONS"]))
    tiles = triton.cdiv(triton.cdiv(length, splits), tile["POSITIONS"])
    splits = triton.cdiv(length, tiles * tile["POSITIONS"])
    moments = torch.empty(rows, groups, splits, 3, dtype=torch.float32, device=x.device)

    applied = apply_tile(positions, channels, group_channels, groups, layout, config["elements"])
    pieces = triton.cdiv(positions, applied["POSITIONS"])
    repeats = max(1, rows * triton.cdiv(channels, applied["CHANNELS"]) * pieces // config["programs"])
    pool = (0, 0, 0, 0) if pool_mean is None else (*pool_mean.stride(), *pool_variance.stride())
    with device_of(x):
        _statistics[(splits, blocks, rows)](
            x, moments, sizes[0], length, groups, splits, tiles, *sizes[2:], **tile, **compiler_options(config)
        )
        _apply[(triton.cdiv(pieces, repeats), triton.cdiv(channels, applied["CHANNELS"]), rows)](
            x,
            moments,
            weight,
            bias,
            page,
            pool_mean,
            pool_variance,
            out,
            eps,
            channels,
            positions,
            groups,
            splits,
            rows,
            repeats,
            0 if page is None else page.stride(0),
            0 if pool_mean is None else pool_mean.shape[0],
            pool_elements,
            *pool,
            x.stride(0),
            x.stride(1),
            x_position,
            out.stride(0),
            out.stride(1),
            out_position,
            **applied,
            SPLITS=power_of_two(config["splits"]),
            SILU=silu,
            **compiler_options(config),
        )


def statistics_tile(group_channels: int, groups: int, elements: int, element_size: int) -> dict[str, int]:
    """Return the tile of the first launch: as many whole groups as fit 128 channels, 16-byte aligned if possible."""
    if group_channels == 1 and groups == 1:
        return {"GROUP_CHANNELS": 1, "GROUPS": 1, "GROUPS_PADDED": 1, "CHANNELS": 1, "POSITIONS": elements}
    most = min(max(1, 128 // group_channels), groups)
    aligned = [n for n in range(most, most // 2, -1) if n * group_channels * element_size % 16 == 0]
    together = aligned[0] if aligned else most
    wide = power_of_two(together * group_channels)
    return {
        "GROUP_CHANNELS": group_channels,
        "GROUPS": together,
        "GROUPS_PADDED": power_of_two(together),
        "CHANNELS": wide,
        "POSITIONS": max(1, elements // wide),
    }


def apply_tile(
    positions: int, channels: int, group_channels: int, groups: int, layout: str, elements: int
) -> dict[str, int]:
    """Return the tile of the second launch: long along the dimension that is contiguous in memory."""
    if layout == "channels_last":
        wide = min(64, power_of_two(channels))
        long = max(1, elements // wide)
    else:
        long = min(elements, power_of_two(positions))
        wide = min(max(1, elements // long), power_of_two(channels))
    touched = min((wide - 1 + group_channels - 1) // group_channels + 1, groups)
    return {
        "GROUP_CHANNELS": group_channels,
        "GROUPS_PADDED": power_of_two(touched),
        "CHANNELS": wide,
        "POSITIONS": long,
    }


def specialisations(capability: int) -> list[Specialisation]:
    """List both launches of every committed configuration, at 20 channels per group and with a pool."""
    found = []
    group_channels, groups = 20, 32
    for key, config in configurations("group_norm_silu", capability):
        layout, elements = key["layout"], config["elements"]
        kind, size = ("*bf16", 2) if key["bits"] == 16 else ("*fp32", 4)
        if layout == "contiguous":
            tile, along = statistics_tile(1, 1, elements, size), "position"
        else:
            tile, along = statistics_tile(group_channels, groups, elements, size), "channel"
        other = "channel" if along == "position" else "position"
        found.append(
            specialisation(
                f"group_norm_silu statistics {key}",
                _statistics,
                pointers={"x": kind, "moments": "*fp32"},
                constants={**tile, f"x_{along}": 1},
                divisible=("channels", "positions", "x_row", f"x_{other}"),
                num_warps=config["num_warps"],
            )
        )
        found.append(
            specialisation(
                f"group_norm_silu {key}",
                _apply,
                pointers={
                    **dict.fromkeys(("x", "weight", "bias", "out"), kind),
                    "page": "*i64",
                    **dict.fromkeys(("moments", "pool_mean", "pool_variance"), "*fp32"),
                },
                constants={
                    **apply_tile(4096, group_channels * groups, group_channels, groups, layout, elements),
                    f"x_{along}": 1,
                    f"out_{along}": 1,
                    "SPLITS": power_of_two(config["splits"]),
                    "SILU": True,
                },
                divisible=("channels", "positions", "x_row", f"x_{other}", "out_row", f"out_{other}"),
                num_warps=config["num_warps"],
            )
        )
    return found
