"""GEGLU, the gated activation of a feed-forward layer (Shazeer, arXiv 2002.05202).

[hidden, gate] = x along the last dimension
out = hidden * gelu(gate)                      gelu(g) = g (1 + erf(g / sqrt 2)) / 2
"""

import torch
import torch.nn.functional as F

from stylefast.errors import InvalidRequest
from stylefast.kernels import checks
from stylefast.kernels.registry import Operation, require_extension


def geglu_ref(x: torch.Tensor) -> torch.Tensor:
    """Evaluate the formula above in fp32 or, for fp64 input, in fp64. x [..., 2 inner] -> [..., inner]."""
    exact = x.double() if x.dtype == torch.float64 else x.float()
    hidden, gate = exact.chunk(2, dim=-1)
    return (hidden * gate * (1 + torch.erf(gate / 2**0.5)) / 2).to(x.dtype)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """Return hidden * gelu(gate) with the exact gelu: x [..., 2 inner] -> [..., inner], contiguous.

    Raises InvalidRequest, a ValueError, if the last dimension is odd or strided.
    """
    checks.floating("x", x)
    if x.ndim < 1 or x.shape[-1] % 2:
        raise InvalidRequest(f"geglu splits the last dimension in two, but x has shape {list(x.shape)}")
    checks.dense_channels(x=x)
    return operation.call(x)


def _outputs(x):
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


def _torch(x):
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def _cpp(x, out):
    # reshape copies only if the leading dimensions don't collapse into evenly spaced rows
    require_extension().geglu(x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1]))


operation = Operation(
    "geglu",
    "(Tensor x) -> Tensor",
    outputs=_outputs,
    forms={"triton": "geglu", "cpp": _cpp, "torch": _torch},
)
