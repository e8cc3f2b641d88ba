"""Strides of [rows, tokens, heads, d] tensors as kernels take them: in units that keep their alignment known.

Triton learns from an argument at most whether it is a multiple of 16, which a head of 40 channels is not; a stride
that is passed in eighths and multiplied by 8 inside is one that loads 16 bytes at a time.
"""

import torch


def strides(x: torch.Tensor) -> list[int]:
    """Of rows, tokens and heads; 0 where there is only one."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3])]


def shared_alignment(*tensors: torch.Tensor) -> int:
    """How many elements the start of every token of every head is a multiple of: 16 (bytes only), 8 or 1."""
    largest = 16 if all(x.element_size() == 1 for x in tensors) else 8
    aligned = all(x.data_ptr() % 16 == 0 for x in tensors)
    steps = [stride for x in tensors for stride in strides(x)]
    return next(a for a in (largest, 8, 1) if a == 1 or (aligned and all(step % a == 0 for step in steps)))
