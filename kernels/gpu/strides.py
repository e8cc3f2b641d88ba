"""Strides of [rows, tokens, heads, d] tensors in units that keep their alignment known to the compiler.

Triton specialises an argument at most on divisibility by 16, which a head of 40 channels does not have. A stride passed
in units of ALIGN and multiplied in the kernel is known to be a multiple, so 8 to 16 bytes are loaded at a time. Tensors
of a contiguous projection always qualify, because heads have 32, 40, 64, 80 or 128 channels; others are copied.
"""

import torch

ALIGN = 8  # elements: 16 bytes of a 16-bit type, 8 of fp8


def strides(x: torch.Tensor) -> list[int]:
    """Return the strides of rows, tokens and heads; 0 for size-1 dimensions."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3])]


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x if it is aligned, else an aligned copy.

    Aligned: x starts on 16 bytes, and every token of every head at a multiple of ALIGN elements.
    """
    return x if is_aligned(x) else aligned_like(x).copy_(x)


def aligned_like(x: torch.Tensor) -> torch.Tensor:
    """Return an empty, aligned tensor of x's shape and type."""
    return x.new_empty(*x.shape[:3], -(-x.shape[3] // ALIGN) * ALIGN)[..., : x.shape[3]]


def is_aligned(*tensors: torch.Tensor) -> bool:
    """Return whether `aligned` takes all of them without a copy."""
    return all(x.data_ptr() % 16 == 0 and all(stride % ALIGN == 0 for stride in strides(x)) for x in tensors)


def span(*tensors: torch.Tensor) -> int:
    """Return the bytes from the lowest first element to the highest last element of the tensors."""
    ends = [x.data_ptr() + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) * x.element_size() for x in tensors]
    return max(ends) - min(x.data_ptr() for x in tensors)
