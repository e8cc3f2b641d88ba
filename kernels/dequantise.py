"""Dequantisation of the fp8 keys, values and hidden states of a style bank.

out = values * scale                           one scale per (group, channel), shared by the group's tokens
"""

import torch

from stylefast.errors import InvalidRequest
from stylefast.kernels import checks
from stylefast.kernels.registry import Operation, require_extension

FP8 = torch.float8_e4m3fn


def dequantise_ref(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Evaluate the formula above in fp32. values [groups, tokens, channels], scale [groups, channels]."""
    return values.float() * scale[:, None]


def dequantise(values: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return values * scale: values [groups, tokens, channels] float8_e4m3fn, scale [groups, channels] fp32.

    out: a contiguous tensor of that shape, fp32, bf16 or fp16, that is written and returned; each number is rounded
    once. None allocates an fp32 tensor. Raises InvalidRequest, a ValueError, for other shapes and types, and for an
    `out` that overlaps an input.
    """
    checks.shape("values", values, groups=-1, tokens=-1, channels=-1)
    checks.dtype("values", values, FP8)
    groups, tokens, channels = values.shape
    checks.shape("scale", scale, groups=groups, channels=channels)
    checks.dtype("scale", scale, torch.float32)
    checks.together("values", values=values, scale=scale, out=out)
    if out is None:
        out = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    checks.shape("out", out, groups=groups, tokens=tokens, channels=channels)
    checks.dtype("out", out, torch.float32, torch.bfloat16, torch.float16)
    if not out.is_contiguous():
        raise InvalidRequest(
            f"out must be contiguous, but has strides {list(out.stride())}; give it a buffer of its own"
        )
    if not torch.compiler.is_compiling():
        checks.apart(out, values=values, scale=scale)
    operation.call(scale, values.view(torch.uint8), out)
    return out


def _torch(scale, codes, out):
    out.copy_(dequantise_ref(codes.view(FP8), scale))


def _cpp(scale, codes, out):
    require_extension().dequantise(scale, codes.view(FP8), out)


# scale comes first because forms are chosen by the first tensor's type, and fp8 is passed as bytes because PyTorch
# supports few operations on it
operation = Operation(
    "dequantise",
    "(Tensor scale, Tensor codes, Tensor(a!) out) -> ()",
    outputs=lambda *arguments: None,
    forms={"triton": "dequantise", "cpp": _cpp, "torch": _torch},
)
