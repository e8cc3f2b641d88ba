"""Mean and variance over tokens, the statistics of AdaIN.

StyleAligned (arXiv 2312.02133, section 3.2) normalises the queries and keys of a target to the statistics of its
reference: AdaIN(x, y) = std(y) * (x - mean(x)) / std(x) + mean(y), over tokens, per row, head and channel, with the
unbiased variance and 1e-5 inside the root. That is one gain and one offset per (row, head, channel), so it is applied
when x is loaded and needs no extra pass.
"""

import torch

from stylefast.errors import InvalidRequest
from stylefast.kernels import checks
from stylefast.kernels.registry import Operation, require_extension


def token_stats_ref(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute mean and unbiased variance over tokens in plain PyTorch.

    x: [rows, tokens, heads, d], any float type, any strides. Returns two fp32 tensors [rows, heads, d], or fp64 for
    fp64 input. The variance of a single token is 0.
    """
    tokens = x.shape[1]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.sum(1) / tokens
    deviation = x - mean[:, None]
    return mean, (deviation * deviation).sum(1) / max(tokens - 1, 1)


def token_stats(x: torch.Tensor, *more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and unbiased variance over tokens, of up to three tensors in one pass.

    Each is [rows, tokens, heads, d], all of one shape and type; strides may differ, the last dimension is contiguous.
    Returns two fp32 tensors: [rows, heads, d] for one tensor, [tensors, rows, heads, d] for several. Raises
    InvalidRequest, a ValueError, for other shapes, types or strides, and if there are no tokens.
    """
    tensors = [x, *more]
    checks.shape("x", x, rows=-1, tokens=-1, heads=-1, d=-1)
    checks.floating("x", x)
    if not 1 <= len(tensors) <= 3:
        raise InvalidRequest(f"token_stats takes 1 to 3 tensors, not {len(tensors)}")
    if x.shape[1] == 0:
        raise InvalidRequest(f"token_stats needs at least 1 token, but x has shape {list(x.shape)}")
    rows, tokens, heads, width = x.shape
    for i, other in enumerate(tensors):
        name = f"tensor {i}"
        checks.shape(name, other, rows=rows, tokens=tokens, heads=heads, d=width)
        checks.dtype(name, other, x.dtype)
        checks.dense_channels(**{name: other})
        checks.together("x", **{"x": x, name: other})
    mean, variance = operation.call(tensors)
    return (mean, variance) if more else (mean[0], variance[0])


def _refuse(form, arguments) -> str:
    width = arguments[0][0].shape[-1]
    return f"head size {width} is not a multiple of 8" if form == "cpp" and width % 8 else ""


def _outputs(tensors):
    rows, _, heads, width = tensors[0].shape
    shape = (len(tensors), rows, heads, width)
    return tuple(torch.empty(shape, dtype=torch.float32, device=tensors[0].device) for _ in range(2))


def _torch(tensors):
    if tensors[0].numel() == 0:
        return _outputs(tensors)
    exact, correction = torch.promote_types(tensors[0].dtype, torch.float32), min(1, tensors[0].shape[1] - 1)
    pairs = [torch.var_mean(x.to(exact), dim=1, correction=correction) for x in tensors]
    mean, variance = torch.stack([mean for _, mean in pairs]), torch.stack([variance for variance, _ in pairs])
    return mean.float(), variance.float()


def _cpp(tensors, mean, variance):
    require_extension().token_stats(tensors, mean, variance)


operation = Operation(
    "token_stats",
    "(Tensor[] tensors) -> (Tensor, Tensor)",
    outputs=_outputs,
    forms={"triton": "token_stats", "cpp": _cpp, "torch": _torch},
    refuse=_refuse,
)
