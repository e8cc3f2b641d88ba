"""Strides of [rows, tokens, heads, d] tensors as kernels take them: in units that keep their alignment known.

Triton learns from an argument at most whether it is a multiple of 16, which a head of 40 channels is not; a stride
that is passed in units of ALIGN and multiplied inside is known to be a multiple, so 8 to 16 bytes are loaded at a time.
Tensors of a contiguous projection always qualify, as heads have 32, 40, 64, 80 or 128 channels; others are copied.
"""

import torch

ALIGN = 8  # elements: 16 bytes of a 16-bit type, 8 of fp8


def strides(x: torch.Tensor) -> list[int]:
    """Of rows, tokens and heads; 0 where there is only one."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3])]


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x if the start of every token of every head is a multiple of ALIGN elements and x starts on 16 bytes, else a
    copy of which that holds."""
    return x if is_aligned(x) else aligned_like(x).copy_(x)


def aligned_like(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor of x's shape and type that is aligned."""
    return x.new_empty(*x.shape[:3], -(-x.shape[3] // ALIGN) * ALIGN)[..., : x.shape[3]]


def is_aligned(*tensors: torch.Tensor) -> bool:
    """Whether `aligned` takes all of them as they are."""
    return all(x.data_ptr() % 16 == 0 and all(stride % ALIGN == 0 for stride in strides(x)) for x in tensors)


def span(*tensors: torch.Tensor) -> int:
    """Bytes from the first element of any of the tensors to the last one of any."""
    ends = [x.data_ptr() + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) * x.element_size() for x in tensors]
    return max(ends) - min(x.data_ptr() for x in tensors)
