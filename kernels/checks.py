"""Checks at the door of the operations: each raises InvalidRequest, a ValueError, naming the value and the limit."""

import torch

from stylefast.errors import InvalidRequest


def shape(name: str, tensor: torch.Tensor, **expected: int) -> None:
    """The tensor has these named dimensions in this order; a dimension given as -1 is free."""
    sizes = tuple(expected.values())
    if tensor.ndim != len(sizes) or any(want not in (-1, have) for want, have in zip(sizes, tensor.shape)):
        wanted = ", ".join(key if size == -1 else f"{key}={size}" for key, size in expected.items())
        raise InvalidRequest(f"{name} must have shape [{wanted}], not {list(tensor.shape)}")


def dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """The tensor has one of these types."""
    if tensor.dtype not in allowed:
        raise InvalidRequest(f"{name} must be {' or '.join(map(str, allowed))}, not {tensor.dtype}")


def floating(name: str, tensor: torch.Tensor) -> None:
    """The tensor holds floats of 16, 32 or 64 bits."""
    dtype(name, tensor, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def together(first: str, **tensors: torch.Tensor | None) -> None:
    """All tensors are on the device of the one called `first`."""
    device = tensors[first].device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise InvalidRequest(f"{name} is on {tensor.device}, but {first} is on {device}; move it there")


def dense_channels(**tensors: torch.Tensor) -> None:
    """The last dimension of each tensor is contiguous; any other strides do."""
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise InvalidRequest(
                f"{name} must have stride 1 in its last dimension, not {tensor.stride(-1)}; call .contiguous() on it"
            )


def integers_within(name: str, tensor: torch.Tensor, low: int, high: int, meaning: str) -> None:
    """low <= every value < high. Reads the tensor on the host."""
    if tensor.numel() == 0:
        return
    least, most = (int(value) for value in torch.aminmax(tensor))
    if least < low or most >= high:
        value = least if least < low else most
        raise InvalidRequest(f"{name} holds {value}, but {meaning} lie in [{low}, {high - 1}]")


def numbers_within(name: str, tensor: torch.Tensor, low: float, high: float) -> None:
    """Every value is a number in [low, high]. Reads the tensor on the host."""
    if tensor.numel() == 0:
        return
    least, most = (float(value) for value in torch.aminmax(tensor))
    # a comparison with NaN is false, so NaN is refused here too
    if not (least >= low and most <= high):
        value = most if least >= low else least
        raise InvalidRequest(f"{name} holds {value}, but must lie in [{low:g}, {high:g}]")


def apart(out: torch.Tensor, **inputs: torch.Tensor | None) -> None:
    """`out` shares no memory with an input, and no two of its elements share theirs."""
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride())):
        raise InvalidRequest(f"out overlaps itself: strides {out.stride()} for shape {list(out.shape)}")
    first, last = _extent(out)
    for name, tensor in inputs.items():
        if tensor is None or tensor.numel() == 0 or out.numel() == 0:
            continue
        low, high = _extent(tensor)
        if low < last and first < high:
            raise InvalidRequest(
                f"out overlaps {name} in memory (bytes {max(low, first)} to {min(high, last)}); give it its own buffer"
            )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one behind the last."""
    start = tensor.data_ptr()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return start, start + (reach + 1) * tensor.element_size()
