"""Layer norm in Triton, alone or after adding a residual; two passes over registers, safe for large means.

out = (x - mean) / sqrt(variance + eps) * weight + bias      over the last dimension, biased variance, fp32 inside
"""

import torch
import triton
import triton.language as tl

from stylefast.errors import InvalidRequest
from stylefast.kernels.configs import Config, configurations
from stylefast.kernels.gpu.ahead import Specialisation
from stylefast.kernels.gpu.launch import as_rows, compiler_options, device_of, power_of_two, settings, specialisation

MAX_COLUMNS = 8192  # a longer row would spill from the registers


@triton.jit(do_not_specialize=["rows"])
def _layer_norm(
    x,
    residual,  # [rows, columns]; residual may be None
    weight,
    bias,  # [columns] or None
    total,  # [rows, columns]: x + residual, or None without one
    out,  # [rows, columns]
    eps,
    rows,
    columns,
    x_row,
    residual_row,
    total_row,
    out_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)
    in_row = (column < columns)[None, :]
    inside = (row < rows) & in_row
    values = tl.load(x + row * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + row * residual_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)  # normalise the rounded sum, which is also the next residual
        tl.store(total + row * total_row + column[None, :], rounded, mask=inside)
        values = rounded.to(tl.float32)

    mean = tl.sum(values, 1) / columns
    centred = tl.where(in_row, values - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / columns
    result = centred * tl.rsqrt(variance + eps)[:, None]
    if weight is not None:
        result *= tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        result += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row * out_row + column[None, :], result.to(out.dtype.element_ty), mask=inside)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write the layer norm of x [..., columns] into `out`, whose rows are evenly spaced.

    Raises InvalidRequest for more than 8192 columns.
    """
    _launch(x, None, weight, bias, eps, None, out, config)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    total: torch.Tensor,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write x + residual, rounded, into `total` and the layer norm of that into `out`; errors as `layer_norm`."""
    _launch(x, residual, weight, bias, eps, total, out, config)


def _launch(x, residual, weight, bias, eps, total, out, config):
    if x.numel() == 0:
        return
    columns = x.shape[-1]
    if columns > MAX_COLUMNS:
        raise InvalidRequest(f"layer_norm in Triton takes at most {MAX_COLUMNS} columns, not {columns}")
    x, out = as_rows(x), out.view(-1, columns)
    if residual is not None:
        residual, total = as_rows(residual), total.view(-1, columns)
    weight, bias = (None if parameter is None else parameter.contiguous() for parameter in (weight, bias))
    config = settings("layer_norm", x, config, columns=columns, bits=x.element_size() * 8)
    padded = power_of_two(columns)
    together = max(1, config["elements"] // padded)  # rows of one program
    with device_of(x):
        _layer_norm[(triton.cdiv(x.shape[0], together),)](
            x,
            residual,
            weight,
            bias,
            total,
            out,
            eps,
            x.shape[0],
            columns,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            0 if total is None else total.stride(0),
            out.stride(0),
            ROWS=together,
            COLUMNS=padded,
            **compiler_options(config),
        )


def specialisations(capability: int) -> list[Specialisation]:
    """List every committed configuration of this chip, with a residual, which takes the most registers."""
    found = []
    for key, config in configurations("layer_norm", capability):
        padded = power_of_two(key["columns"])
        kind = "*bf16" if key["bits"] == 16 else "*fp32"
        found.append(
            specialisation(
                f"add_layer_norm {key}",
                _layer_norm,
                pointers=dict.fromkeys(("x", "residual", "weight", "bias", "total", "out"), kind),
                constants={"ROWS": max(1, config["elements"] // padded), "COLUMNS": padded},
                divisible=("columns", "x_row", "residual_row", "total_row", "out_row"),
                num_warps=config["num_warps"],
            )
        )
    return found
