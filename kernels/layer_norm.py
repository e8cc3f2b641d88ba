"""Layer norm, alone or after adding a residual.

    total = x + residual         out = (total - mean(total)) / sqrt(var(total) + eps) * weight + bias

over the last dimension, with the biased variance. A transformer block adds and normalises three times; the fused kernel
reads the sum from registers instead of memory.
"""

import torch
import torch.nn.functional as F

from stylefast.errors import InvalidRequest
from stylefast.kernels import checks
from stylefast.kernels.registry import Operation, require_extension

MAX_CHANNELS = 8192  # the Triton form holds a row in registers


def layer_norm_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Evaluate the formula above without residual, in fp32 or, for fp64 input, in fp64."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(exact)
    centred = wide - wide.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return (centred / torch.sqrt(variance + eps) * weight.to(exact) + bias.to(exact)).to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Apply layer norm over the last dimension: x [..., channels], weight and bias [channels] -> x's shape, contiguous.

    Raises InvalidRequest, a ValueError, for shapes, types or eps that don't fit.
    """
    _check(x, weight, bias, eps)
    return operation.call(x, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + residual, rounded to their common type, and its layer norm: two tensors of x's shape, contiguous.

    Raises InvalidRequest, a ValueError, for shapes, types or eps that don't fit.
    """
    _check(x, weight, bias, eps)
    checks.floating("residual", residual)
    if residual.shape != x.shape:
        raise InvalidRequest(f"residual must have x's shape {list(x.shape)}, not {list(residual.shape)}")
    checks.dense_channels(residual=residual)
    checks.together("x", x=x, residual=residual)
    return add_operation.call(x, residual, weight, bias, eps)


def _check(x, weight, bias, eps):
    checks.floating("x", x)
    if x.ndim < 1 or x.shape[-1] == 0:
        raise InvalidRequest(f"x needs at least one channel, but has shape {list(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        checks.shape(name, parameter, channels=x.shape[-1])
        checks.dtype(name, parameter, x.dtype, torch.float32)
    if weight.dtype != bias.dtype:
        raise InvalidRequest(f"weight and bias must have one type, not {weight.dtype} and {bias.dtype}")
    if not eps > 0:
        raise InvalidRequest(f"eps must be above 0, not {eps}")
    checks.dense_channels(x=x)
    checks.together("x", x=x, weight=weight, bias=bias)


def _refuse(form, arguments) -> str:
    types, channels = {x.dtype for x in arguments if isinstance(x, torch.Tensor)}, arguments[0].shape[-1]
    if form != "torch" and len(types) > 1:
        return f"the arguments mix {', '.join(sorted(map(str, types)))}"
    if form == "triton" and channels > MAX_CHANNELS:
        return f"{channels} channels are more than {MAX_CHANNELS}"
    return ""


def _output(x, *others):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _outputs(x, residual, *others):
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return tuple(torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(2))


def _torch(x, weight, bias, eps):
    wide = x.to(torch.promote_types(x.dtype, weight.dtype))
    return F.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype).contiguous()


def _torch_add(x, residual, weight, bias, eps):
    total = (x + residual).contiguous()
    return total, _torch(total, weight, bias, eps)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _cpp(x, weight, bias, eps, out):
    # reshape copies only if the leading dimensions don't collapse into evenly spaced rows
    require_extension().layer_norm(_rows(x), weight.contiguous(), bias.contiguous(), eps, _rows(out))


def _cpp_add(x, residual, weight, bias, eps, total, out):
    parameters = (weight.contiguous(), bias.contiguous(), eps)
    require_extension().add_layer_norm(_rows(x), _rows(residual), *parameters, _rows(total), _rows(out))


operation = Operation(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    outputs=_output,
    forms={"triton": "layer_norm", "cpp": _cpp, "torch": _torch},
    refuse=_refuse,
)
add_operation = Operation(
    "add_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    outputs=_outputs,
    forms={"triton": "layer_norm", "cpp": _cpp_add, "torch": _torch_add},
    refuse=_refuse,
)
