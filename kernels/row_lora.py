"""LoRAs per row: each row of a batch adds the low-rank products of its own adapters (LoRA, arXiv 2106.09685).

y_p[row] += sum_n scale[row, n] * (x[row] * A[u]) B[u]      u = unit[p, row, n]; the first product may be a convolution

Factors lie in pools of units of rank 16. An adapter of rank r takes ceil(r / 16) of them, the last one padded with
zeros, and several adapters on a row are more units of that row, so rows with any ranks and numbers of adapters share
one call. (Batches of different adapters: Punica, arXiv 2310.18547; one pool for all ranks: S-LoRA, arXiv 2311.03285.)
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from stylefast.errors import InvalidRequest
from stylefast.kernels import checks
from stylefast.kernels.registry import Operation, require_extension
from stylefast.values import quoted, whole_number

RANK = 16  # of a unit
MOST_PARTS = 3
_SIDES = {1: 1, 9: 3}  # taps -> side of the kernel


class LoraPool(NamedTuple):
    """The factors of every unit, contiguous and of one type; see `row_lora`."""

    down: torch.Tensor  # [units, taps, in, 16]
    up: torch.Tensor  # [units, 16, out]


class LoraRows(NamedTuple):
    """The N units that each row may use in each part, and how strongly; see `row_lora`."""

    unit: torch.Tensor  # [parts, rows, N] int64; -1: none
    scale: torch.Tensor  # [rows, N] fp32


def row_lora_ref(
    x: torch.Tensor,  # [rows, tokens, in] or [rows, in, h, w]
    ys: list[torch.Tensor],  # parts of [rows, tokens, out] or [rows, out, h', w']
    pool: LoraPool,
    rows: LoraRows,
    stride: int = 1,
    padding: int = 0,
) -> list[torch.Tensor]:
    """Evaluate the formula above row by row and unit by unit in fp32 or, for fp64 input, in fp64.

    Returns what `row_lora` would leave in ys.
    """
    (down, up), (unit, scale), exact = pool, rows, _exact(x.dtype)
    results = []
    for part, y in enumerate(ys):
        total = y.to(exact, copy=True)
        for row, n in itertools.product(range(len(x)), range(unit.shape[2])):
            u, factor = int(unit[part, row, n]), scale[row, n].to(exact)
            if u < 0 or factor == 0:
                continue
            a, b = down[u].to(exact), up[u].to(exact)
            if x.ndim == 3:
                total[row] += factor * (x[row].to(exact) @ a[0] @ b)
                continue
            side = _SIDES[down.shape[1]]
            padded = F.pad(x[row].to(exact), (padding,) * 4)
            height, width = y.shape[2:]
            for tap in range(side * side):
                i, j = divmod(tap, side)
                seen = padded[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
                total[row] += factor * torch.einsum("chw,ck,ko->ohw", seen, a[tap], b)
        results.append(total.to(y.dtype))
    return results


def row_lora(
    x: torch.Tensor,
    ys: list[torch.Tensor],
    pool: LoraPool,
    rows: LoraRows,
    stride: int = 1,
    padding: int = 0,
) -> None:
    """Add every row's own low-rank products to ys, in place, the custom op `torch.ops.stylefast.row_lora`.

    For linear layers x is [rows, tokens, in], its last dimension contiguous, and ys are 1 to 3 tensors
    [rows, tokens, out]: several layers that share x, such as those of queries, keys and values. For convolutions x is
    [rows, in, h, w] and ys [rows, out, h', w'], with any strides (channels-last is fastest); stride (1 or 2) and
    padding (0 or 1) are the layer's. The pool's taps are 1 or, row by row of a 3 x 3 kernel, 9; alpha / rank belongs
    into `up`. x, ys and the pool have one type. `rows.unit` says which units a row uses for each part, `rows.scale`
    what multiplies them. A unit with scale 0 is skipped: it costs nothing, and a NaN in it has no effect.

    Sums are fp32 (fp64 for fp64), y is rounded once. Triton's form rounds x A to x's type before the second product.

    Raises InvalidRequest, a ValueError, for shapes, types and devices that don't fit, for ys that overlap one another
    or an input, and on CPUs for a unit out of range. On CUDA a unit out of range makes its row NaN, without a
    synchronisation, unless STYLEFAST_CHECKS=1 is set in the environment.
    """
    _check(x, ys, *pool, *rows, stride, padding)
    if ys and rows.unit.shape[2]:
        operation.call(x, *pool, *rows, stride, padding, ys)


def _check(x, ys, down, up, unit, scale, stride, padding):
    if x.ndim == 4:
        checks.shape("x", x, rows=-1, channels=-1, h=-1, w=-1)
    else:
        checks.shape("x", x, rows=-1, tokens=-1, channels=-1)
    checks.floating("x", x)
    rows, channels = x.shape[0], x.shape[-1 if x.ndim == 3 else 1]
    checks.shape("down", down, units=-1, taps=-1, channels=channels, rank=RANK)
    taps = down.shape[1]
    if taps not in _SIDES or (x.ndim == 3 and taps != 1):
        raise InvalidRequest(
            f"down has {taps} taps, but a {'linear layer has 1' if x.ndim == 3 else 'convolution has 1 or 9'}"
        )
    checks.shape("up", up, units=down.shape[0], rank=RANK, out=-1)
    for name, factor in (("down", down), ("up", up)):
        checks.dtype(name, factor, x.dtype)
        if not factor.is_contiguous():
            raise InvalidRequest(
                f"{name} must be contiguous, but has strides {list(factor.stride())}; call .contiguous() on it"
            )
    whole_number("stride", stride, 1, 2)
    whole_number("padding", padding, 0, 1)
    if x.ndim == 3 and (stride, padding) != (1, 0):
        raise InvalidRequest(
            f"stride {stride} and padding {padding} belong to convolutions, but x is [rows, tokens, in]"
        )
    if not isinstance(ys, (list, tuple)) or len(ys) > MOST_PARTS:
        raise InvalidRequest(f"ys is {quoted(ys)}; it must be a list of at most {MOST_PARTS} tensors")
    sizes = output_shape(x, down, up, stride, padding)
    for i, y in enumerate(ys):
        checks.shape(f"ys[{i}]", y, **sizes)
        checks.dtype(f"ys[{i}]", y, x.dtype)
    if x.ndim == 3:
        checks.dense_channels(x=x, **{f"ys[{i}]": y for i, y in enumerate(ys)})
    checks.shape("unit", unit, parts=len(ys), rows=rows, N=-1)
    checks.dtype("unit", unit, torch.int64)
    checks.shape("scale", scale, rows=rows, N=unit.shape[2])
    checks.dtype("scale", scale, torch.float32)
    named = {f"ys[{i}]": y for i, y in enumerate(ys)}
    checks.together("x", x=x, down=down, up=up, unit=unit, scale=scale, **named)
    if not torch.compiler.is_compiling():
        _check_memory(named, x=x, down=down, up=up, unit=unit, scale=scale)


def output_shape(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, stride: int, padding: int) -> dict[str, int]:
    """Return the named dimensions of a y."""
    if x.ndim == 3:
        return {"rows": x.shape[0], "tokens": x.shape[1], "out": up.shape[2]}
    side = _SIDES[down.shape[1]]
    height, width = (max(0, (n + 2 * padding - side) // stride + 1) for n in x.shape[2:])
    return {"rows": x.shape[0], "out": up.shape[2], "h": height, "w": width}


def _check_memory(ys: dict[str, torch.Tensor], **inputs: torch.Tensor) -> None:
    """Raise InvalidRequest for a y whose elements share memory with one another, another y or an input."""
    for i, (name, y) in enumerate(ys.items()):
        if any(size > 1 and step == 0 for size, step in zip(y.shape, y.stride())):
            raise InvalidRequest(f"{name} is expanded (strides {list(y.stride())}), but it is written; .clone() it")
        for other, x in (inputs | dict(list(ys.items())[:i])).items():
            if not _apart(y, x):
                raise InvalidRequest(f"{name} overlaps {other} in memory; give it a buffer of its own")


def _apart(y: torch.Tensor, x: torch.Tensor) -> bool:
    """Return whether two tensors share no element; they may be views of one fused output, side by side."""
    if checks.disjoint(y, x):
        return True
    last = y.ndim - 1 if y.ndim == 3 else 1
    if y.dtype != x.dtype or y.shape != x.shape or y.stride() != x.stride() or y.stride(last) != 1:
        return False
    # every run of channels begins at a multiple of `period` from the first one
    period = math.gcd(*(step for d, (n, step) in enumerate(zip(y.shape, y.stride())) if d != last and n > 1))
    away = (x.data_ptr() - y.data_ptr()) // y.element_size() % period if period else 0
    return y.shape[last] <= away <= period - y.shape[last]


def _check_values(x, down, up, unit, scale, stride, padding, ys):
    checks.integers_within("unit", unit, -1, down.shape[0], f"units of a pool of {down.shape[0]}")


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _kernel(a: torch.Tensor) -> torch.Tensor:
    """Turn factors [.., taps, in, rank] into convolution weights [.., rank, in, side, side]."""
    side = _SIDES[a.shape[-3]]
    return a.unflatten(-3, (side, side)).movedim((-1, -2), (-4, -3))


def _torch(x, down, up, unit, scale, stride, padding, ys) -> None:
    """Compute one product for all rows with the same units. Synchronises with the device."""
    exact, pool = _exact(x.dtype), down.shape[0]
    strengths = scale.tolist()
    for y, units in zip(ys, unit.tolist(), strict=True):
        if y.numel() == 0:
            continue
        groups: dict[tuple, list[int]] = {}
        for row, used in enumerate(units):
            active = tuple((n, u) for n, u in enumerate(used) if u >= 0 and strengths[row][n] != 0)
            groups.setdefault(active, []).append(row)
        groups.pop((), None)
        for active, members in groups.items():
            index, (places, chosen) = torch.tensor(members, device=x.device), zip(*active)
            if max(chosen) >= pool:  # as in Triton's form
                y[index] = math.nan
                continue
            places, chosen = list(places), list(chosen)
            a, b = down[chosen].to(exact), up[chosen].to(exact).flatten(0, 1)
            factor = scale[index][:, places].to(exact).repeat_interleave(RANK, 1)  # [members, n * 16]
            inputs = x[index].to(exact)
            if x.ndim == 3:
                inner = inputs @ a[:, 0].transpose(0, 1).flatten(1)
                added = (inner * factor[:, None]) @ b
            else:
                inner = F.conv2d(inputs, _kernel(a).flatten(0, 1), stride=stride, padding=padding)
                added = torch.einsum("rkhw,ko->rohw", inner * factor[:, :, None, None], b)
            y[index] = (y[index].to(exact) + added).to(y.dtype)


def _traceable(x, down, up, unit, scale, stride, padding, ys) -> None:
    """Compute without reading tensors on the host: every row gathers every unit, zeros where it has none."""
    rows, (pool, _, channels, _) = x.shape[0], down.shape
    if pool == 0 or unit.shape[2] == 0 or not all(y.numel() for y in ys):
        return
    exact = _exact(x.dtype)
    for y, index in zip(ys, unit):
        live = (index >= 0) & (scale != 0)  # [rows, N]
        place = index.clamp(0, pool - 1)
        # zeros where masked: 0 * NaN would be NaN
        a = torch.where(live[..., None, None, None], down[place], 0).to(exact)  # [rows, N, taps, in, 16]
        b = torch.where(live[..., None, None], up[place], 0).to(exact).flatten(1, 2)  # [rows, N * 16, out]
        factor = torch.where(live, torch.where(index < pool, scale, math.nan), 0).to(exact).repeat_interleave(RANK, 1)
        if x.ndim == 3:
            inner = x.to(exact) @ a[:, :, 0].transpose(1, 2).flatten(2)
            added = (inner * factor[:, None]) @ b
        else:
            weight = _kernel(a).flatten(0, 2)  # [rows * N * 16, in, side, side]
            inputs = x.to(exact).reshape(1, rows * channels, *x.shape[2:])
            inner = F.conv2d(inputs, weight, stride=stride, padding=padding, groups=rows)[0].unflatten(0, (rows, -1))
            added = torch.einsum("rkhw,rko->rohw", inner * factor[..., None, None], b)
        added = torch.where(live.any(1).reshape(-1, *[1] * (y.ndim - 1)), added, 0)
        y.copy_((y.to(exact) + added).to(y.dtype))


def _cpp(x, down, up, unit, scale, stride, padding, ys) -> None:
    require_extension().row_lora(x, down, up, unit, scale, stride, padding, ys)


# ys come last because an operation without outputs writes into its last argument
operation = Operation(
    "row_lora",
    "(Tensor x, Tensor down, Tensor up, Tensor unit, Tensor scale, int stride, int padding, Tensor(a!)[] ys) -> ()",
    outputs=lambda *arguments: None,
    forms={"triton": "row_lora", "cpp": _cpp, "torch": _torch},
    values=_check_values,
    traceable=_traceable,
)
