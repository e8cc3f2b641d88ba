"""LoRAs per row in Triton: y_p[row] += sum_n scale[row, n] * (x[row] * A[u]) B[u], u = unit[p, row, n].

A program takes a tile of tokens of one row. The units of a part stand side by side: unit n has the columns 16 n to
16 n + 15 of one matrix, whose columns are gathered from the pool as they are loaded, so that one product serves all of
them and x is loaded once for all parts. The inner products stay on chip, are scaled in fp32, rounded to x's type, and
multiplied with the gathered rows of B, one tile of output channels after another. A convolution is the same product
over taps and channels. Rows without units end at once; which those are is read on the device only.

Rows with the same units are not sorted together here, as they are on CPUs. At SDXL's sizes a row fills its tiles with
its own tokens, and its factors are about 1% of what it moves: a layer of 1280 channels and 1024 tokens in bf16 reads 80
KB of them beside 8 MB of x and y. Where rows have one token each, as in the time embedding, all programs run at the
same time, so one of them brings a unit into L2 for all. Sorting would cost more launches per step than it saves.
"""

import torch
import triton
import triton.language as tl

from stylefast.errors import InvalidRequest
from stylefast.kernels.configs import Config, configurations
from stylefast.kernels.gpu.ahead import Specialisation
from stylefast.kernels.gpu.launch import compiler_options, device_of, power_of_two, settings, specialisation
from stylefast.kernels.row_lora import RANK

# columns of one launch whose sums for a tile of tokens fit into registers: of a single part, and of several together
MOST_RANKS, _MOST_SHARED = 256, 96
_RANK = tl.constexpr(RANK)
# sizes and strides that are 1 for some layers must not make a kernel of their own
_SIZES = ["count", "pool", "tokens", "width", "x_height", "x_width", "unit_part", "unit_row", "unit_n", "scale_row"]


@triton.jit
def _columns(
    unit,
    scale,
    row,
    part,
    count,
    pool,
    unit_part,
    unit_row,
    unit_n,
    scale_row,
    scale_n,
    RANKS: tl.constexpr,
):
    """Return each column's unit and factor, and whether it is read, or broken by a unit out of range."""
    n = tl.arange(0, RANKS) // _RANK
    factor = tl.load(scale + row * scale_row + n * scale_n, mask=n < count, other=0.0)
    number = tl.load(unit + part * unit_part + row * unit_row + n * unit_n, mask=n < count, other=-1)
    used = (number >= 0) & (factor != 0)
    broken = used & (number >= pool)
    live = used & (number < pool)
    factor = tl.where(broken, float("nan"), tl.where(live, factor, 0.0))
    return tl.where(live, number, 0), factor, live, broken


@triton.jit
def _add(
    inner,
    factor,
    number,
    live,
    up,
    y,  # at the row's first number
    place,  # [TOKENS] numbers from there to each token
    inside,  # [TOKENS]
    out,
    y_channel,
    RANKS: tl.constexpr,
    OUT: tl.constexpr,
):
    """Add the second product to a part's y."""
    rank = tl.arange(0, RANKS) % _RANK
    left = (inner * factor[None, :]).to(up.dtype.element_ty)
    source = up + (number * _RANK + rank) * out
    for first in range(0, out, OUT):
        channel = first + tl.arange(0, OUT)
        right = tl.load(source[:, None] + channel[None, :], mask=live[:, None] & (channel < out)[None, :], other=0.0)
        added = tl.dot(left, right, input_precision="ieee")
        target = y + place[:, None] + channel[None, :] * y_channel
        mask = inside[:, None] & (channel < out)[None, :]
        before = tl.load(target, mask=mask, other=0.0).to(tl.float32)
        tl.store(target, (before + added).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _product(inner, values, number, live, down, tap, channel, channels, TAPS: tl.constexpr, RANKS: tl.constexpr):
    """Return inner + values A for one tap's tile of channels."""
    rank = tl.arange(0, RANKS) % _RANK
    source = down + number * TAPS * channels * _RANK + rank
    place = (tap * channels + channel) * _RANK
    mask = live[None, :] & (channel < channels)[:, None]
    factors = tl.load(source[None, :] + place[:, None], mask=mask, other=0.0)
    return tl.dot(values, factors, inner, input_precision="ieee")


@triton.jit(do_not_specialize=_SIZES)
def row_lora_kernel(
    x,  # [rows, x_height, x_width, channels]
    down,  # [pool, taps, channels, 16]
    up,  # [pool, 16, out]
    unit,  # [parts, rows, count] int64
    scale,  # [rows, count]
    y0,
    y1,
    y2,  # [rows, height, width, out], all with the same strides
    count,
    pool,
    tokens,  # height * width
    width,
    x_height,
    x_width,
    channels,
    out,
    unit_part,
    unit_row,
    unit_n,
    scale_row,
    scale_n,
    x_row,
    x_line,
    x_pixel,
    x_channel,
    y_row,
    y_line,
    y_pixel,
    y_channel,
    PARTS: tl.constexpr,
    SIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    RANKS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    tables = (count, pool, unit_part, unit_row, unit_n, scale_row, scale_n)
    number0, factor0, live0, broken0 = _columns(unit, scale, row, 0, *tables, RANKS)
    number1, factor1, live1, broken1 = number0, factor0, live0, broken0
    number2, factor2, live2, broken2 = number0, factor0, live0, broken0
    if PARTS > 1:
        number1, factor1, live1, broken1 = _columns(unit, scale, row, 1, *tables, RANKS)
    if PARTS > 2:
        number2, factor2, live2, broken2 = _columns(unit, scale, row, 2, *tables, RANKS)
    used = live0 | live1 | live2 | broken0 | broken1 | broken2
    if tl.max(used.to(tl.int32), 0) > 0:
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        inside = token < tokens
        line, pixel = token // width, token % width
        x += row * x_row
        inner0 = tl.zeros((TOKENS, RANKS), tl.float32)
        inner1, inner2 = inner0, inner0
        tiles = tl.cdiv(channels, CHANNELS)
        for step in range(0, SIDE * SIDE * tiles):
            tap = step // tiles
            channel = (step % tiles) * CHANNELS + tl.arange(0, CHANNELS)
            from_line = line * STRIDE - PADDING + tap // SIDE
            from_pixel = pixel * STRIDE - PADDING + tap % SIDE
            seen = inside & (from_line >= 0) & (from_line < x_height) & (from_pixel >= 0) & (from_pixel < x_width)
            source = x + (from_line * x_line + from_pixel * x_pixel)[:, None] + channel[None, :] * x_channel
            values = tl.load(source, mask=seen[:, None] & (channel < channels)[None, :], other=0.0)
            inner0 = _product(inner0, values, number0, live0, down, tap, channel, channels, SIDE * SIDE, RANKS)
            if PARTS > 1:
                inner1 = _product(inner1, values, number1, live1, down, tap, channel, channels, SIDE * SIDE, RANKS)
            if PARTS > 2:
                inner2 = _product(inner2, values, number2, live2, down, tap, channel, channels, SIDE * SIDE, RANKS)
        place = line * y_line + pixel * y_pixel
        _add(inner0, factor0, number0, live0, up, y0 + row * y_row, place, inside, out, y_channel, RANKS, OUT)
        if PARTS > 1:
            _add(inner1, factor1, number1, live1, up, y1 + row * y_row, place, inside, out, y_channel, RANKS, OUT)
        if PARTS > 2:
            _add(inner2, factor2, number2, live2, up, y2 + row * y_row, place, inside, out, y_channel, RANKS, OUT)


def row_lora(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    unit: torch.Tensor,
    scale: torch.Tensor,
    stride: int,
    padding: int,
    ys: list[torch.Tensor],
    config: Config | None = None,
) -> None:
    """Add to ys, in place; arguments as the custom op's, already checked.

    A row with a unit out of range becomes NaN, without out-of-bounds reads. Up to 16 units of a row are added with one
    rounding of y, more in several launches. Raises InvalidRequest for bf16 on the CPU, because Triton's interpreter
    would multiply its bits as integers.
    """
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        raise InvalidRequest("Triton's interpreter multiplies no bfloat16 matrices; use float16 or float32 on the CPU")
    if not ys or ys[0].numel() == 0 or unit.shape[2] == 0:
        return
    at_once = MOST_RANKS // RANK
    if unit.shape[2] > at_once:
        for units, scales in zip(unit.split(at_once, 2), scale.split(at_once, 1), strict=True):
            row_lora(x, down, up, units, scales, stride, padding, ys, config)
        return
    ranks = RANK * power_of_two(unit.shape[2])
    if len(ys) > 1 and (len(ys) * ranks > _MOST_SHARED or any(y.stride() != ys[0].stride() for y in ys)):
        for part, y in enumerate(ys):
            row_lora(x, down, up, unit[part : part + 1], scale, stride, padding, [y], config)
        return
    config = settings("row_lora", x, config, ranks=len(ys) * ranks, bits=x.element_size() * 8)
    x, first = _pixels(x), _pixels(ys[0])
    rows, height, width, out = first.shape
    down, up = down.contiguous(), up.contiguous()
    side = 3 if down.shape[1] == 9 else 1
    grid = (triton.cdiv(height * width, config["tokens"]), rows)
    with device_of(x):
        row_lora_kernel[grid](
            x,
            down,
            up,
            unit,
            scale,
            *(ys + ys[:1] * 2)[:3],
            unit.shape[2],
            down.shape[0],
            height * width,
            width,
            *x.shape[1:],
            out,
            *unit.stride(),
            *scale.stride(),
            *x.stride(),
            *first.stride(),
            PARTS=len(ys),
            SIDE=side,
            STRIDE=stride,
            PADDING=padding,
            RANKS=ranks,
            TOKENS=config["tokens"],
            CHANNELS=config["channels"],
            OUT=config["out"],
            **compiler_options(config),
        )


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """View x as [rows, height, width, channels]; tokens are one line of pixels."""
    return x[:, None] if x.ndim == 3 else x.permute(0, 2, 3, 1)


def specialisations(capability: int) -> list[Specialisation]:
    """List every committed configuration: three parts of one unit each, and a convolution with the most units."""
    found = []
    for key, config in configurations("row_lora", capability):
        kind = "*bf16" if key["bits"] == 16 else "*fp32"
        pointers = {**dict.fromkeys(("x", "down", "up", "y0", "y1", "y2"), kind), "unit": "*i64", "scale": "*fp32"}
        parts, side = (1, 3) if key["ranks"] == MOST_RANKS else (3, 1)
        constants = {
            "PARTS": parts,
            "SIDE": side,
            "STRIDE": 1,
            "PADDING": side // 2,
            "RANKS": key["ranks"] // parts,
            "TOKENS": config["tokens"],
            "CHANNELS": config["channels"],
            "OUT": config["out"],
            "x_channel": 1,
            "y_channel": 1,
            "scale_n": 1,
        }
        strides = [f"{side}_{part}" for side in ("x", "y") for part in ("row", "line", "pixel")]
        found.append(
            specialisation(
                f"row_lora {key}",
                row_lora_kernel,
                pointers,
                constants,
                ["channels", "out", *strides],
                config["num_warps"],
                config["num_stages"],
            )
        )
    return found
