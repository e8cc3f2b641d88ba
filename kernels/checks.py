"""Argument checks of the operations: each raises InvalidRequest, a ValueError, naming the value and the limit."""

import torch

from stylefast.errors import InvalidRequest


def shape(name: str, tensor: torch.Tensor, **expected: int) -> None:
    """Raise InvalidRequest unless the tensor has these named dimensions in this order; -1 accepts any size."""
    sizes = tuple(expected.values())
    # no `in`: symbolic sizes under torch.compile support comparison with numbers but not membership tests
    if tensor.ndim != len(sizes) or any(want != -1 and want != have for want, have in zip(sizes, tensor.shape)):
        wanted = ", ".join(key if size == -1 else f"{key}={size}" for key, size in expected.items())
        raise InvalidRequest(f"{name} must have shape [{wanted}], not {list(tensor.shape)}")


def dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """Raise InvalidRequest unless the tensor has one of these types."""
    if tensor.dtype not in allowed:
        raise InvalidRequest(f"{name} must be {' or '.join(map(str, allowed))}, not {tensor.dtype}")


def floating(name: str, tensor: torch.Tensor) -> None:
    """Raise InvalidRequest unless the tensor holds floats of 16, 32 or 64 bits."""
    dtype(name, tensor, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def together(first: str, **tensors: torch.Tensor | None) -> None:
    """Raise InvalidRequest unless all tensors are on the device of the one called `first`."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    device = devices[first]
    for name, place in devices.items():
        if place != device:
            raise InvalidRequest(f"{name} is on {place}, but {first} is on {device}; move it there")


def dense_channels(**tensors: torch.Tensor) -> None:
    """Raise InvalidRequest unless the last dimension of each tensor is contiguous; other strides are free."""
    for name, tensor in tensors.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise InvalidRequest(
                f"{name} must have stride 1 in its last dimension, not {tensor.stride(-1)}; call .contiguous() on it"
            )


def integers_within(name: str, tensor: torch.Tensor, low: int, high: int, meaning: str) -> None:
    """Raise InvalidRequest unless low <= every value < high. Synchronises with the device."""
    if tensor.numel() == 0:
        return
    least, most = (int(value) for value in torch.aminmax(tensor))
    if least < low or most >= high:
        value = least if least < low else most
        raise InvalidRequest(f"{name} holds {value}, but {meaning} lie in [{low}, {high - 1}]")


def numbers_within(name: str, tensor: torch.Tensor, low: float, high: float) -> None:
    """Raise InvalidRequest unless every value is a number in [low, high]. Synchronises with the device."""
    if tensor.numel() == 0:
        return
    least, most = (float(value) for value in torch.aminmax(tensor.detach()))
    # a comparison with NaN is false, so NaN is refused here too
    if not (least >= low and most <= high):
        value = most if least >= low else least
        raise InvalidRequest(f"{name} holds {value}, but must lie in [{low:g}, {high:g}]")


def apart(out: torch.Tensor, **inputs: torch.Tensor) -> None:
    """Raise InvalidRequest if the bytes from the first to the last element of `out` overlap those of an input."""
    for name, tensor in inputs.items():
        if not disjoint(out, tensor):
            raise InvalidRequest(f"out overlaps {name} in memory; give it a buffer of its own")


def disjoint(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether the bytes from the first to the last element of one tensor end before those of the other begin."""
    if not one.numel() or not other.numel():
        return True
    return other.data_ptr() >= _end(one) or one.data_ptr() >= _end(other)


def _end(x: torch.Tensor) -> int:
    return x.data_ptr() + (1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride()))) * x.element_size()
