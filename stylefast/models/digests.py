"""Digests of tensors, and a check of their values.

Manifests, banks and records store the digests, so they must not change.
"""

import hashlib
from collections.abc import Mapping

import torch

_SAMPLES = 256
# type -> the integers of its bits, and which of them are the exponent
_EXPONENTS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def tensor_bytes(x: torch.Tensor) -> memoryview:
    """Return a tensor's bytes in the order of its elements, without a copy if it is dense and in host memory."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def sampled_bytes(x: torch.Tensor) -> bytes:
    """Return up to 256 evenly spaced elements of a tensor, as float32."""
    flat = x.detach().reshape(-1)
    return flat[:: max(flat.numel() // _SAMPLES, 1)][:_SAMPLES].float().cpu().numpy().tobytes()


def all_finite(x: torch.Tensor) -> bool:
    """Return whether a floating-point tensor holds neither NaN nor infinity: numbers whose exponent has all bits set.

    NumPy does it on the calling thread; handing thousands of small tensors to PyTorch's threads takes longer.
    """
    if x.dtype not in _EXPONENTS:
        return bool(torch.isfinite(x.float()).all())
    kind, mask = _EXPONENTS[x.dtype]
    bits = x.detach().cpu().contiguous().view(kind).numpy()
    return not bool(((bits & bits.dtype.type(mask)) == mask).any())


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of tensors with their names, types and shapes, 64 hex digits."""
    digest = hashlib.sha256()
    for name, x in sorted(state.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(tensor_bytes(x))
    return digest.hexdigest()


def sampled_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return a quick digest of tensors: of their names, shapes and types, and of samples of each."""
    digest = hashlib.sha256()
    for name, x in sorted(state.items()):
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}\n".encode())
        digest.update(sampled_bytes(x))
    return digest.hexdigest()
