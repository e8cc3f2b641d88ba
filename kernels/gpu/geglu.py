"""GEGLU in Triton: out = hidden * gelu(gate), x = [hidden, gate] along the last dimension, gelu by erf.

(GLU variants, arXiv 2002.05202.) Each byte is read once and written once; fp32 inside.
"""

import math

import torch
import triton
import triton.language as tl

from stylefast.kernels.configs import Config, configurations
from stylefast.kernels.gpu.ahead import Specialisation
from stylefast.kernels.gpu.launch import as_rows, compiler_options, device_of, settings, specialisation

_SQRT_HALF = tl.constexpr(math.sqrt(0.5))


@triton.jit(do_not_specialize=["rows"])
def _geglu(
    x,  # [rows, 2 * inner]
    out,  # [rows, inner]
    rows,
    inner,
    x_row,
    out_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < inner)
    source = x + row * x_row + column
    hidden = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + inner, mask=inside, other=0.0).to(tl.float32)
    result = hidden * (0.5 * gate * (1 + tl.erf(gate * _SQRT_HALF)))
    tl.store(out + row * out_row + column, result.to(out.dtype.element_ty), mask=inside)


def geglu(x: torch.Tensor, out: torch.Tensor, config: Config | None = None) -> None:
    """Write hidden * gelu(gate) of x [..., 2 * inner] into out [..., inner], whose rows are evenly spaced."""
    if out.numel() == 0:
        return
    x, out = as_rows(x), out.view(-1, out.shape[-1])
    rows, inner = out.shape
    config = settings("geglu", x, config, columns=inner, bits=x.element_size() * 8)
    grid = (triton.cdiv(rows, config["rows"]), triton.cdiv(inner, config["columns"]))
    with device_of(x):
        _geglu[grid](
            x,
            out,
            rows,
            inner,
            x.stride(0),
            out.stride(0),
            ROWS=config["rows"],
            COLUMNS=config["columns"],
            **compiler_options(config),
        )


def specialisations(capability: int) -> list[Specialisation]:
    """List every committed configuration of this chip, for rows on 16-byte boundaries."""
    return [
        specialisation(
            f"geglu {key}",
            _geglu,
            pointers=dict.fromkeys(("x", "out"), "*bf16" if key["bits"] == 16 else "*fp32"),
            constants={"ROWS": config["rows"], "COLUMNS": config["columns"]},
            divisible=("inner", "x_row", "out_row"),
            num_warps=config["num_warps"],
        )
        for key, config in configurations("geglu", capability)
    ]
