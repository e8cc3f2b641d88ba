"""Digests of tensors. Manifests, banks and records store them, so their values must not change."""

import hashlib
from collections.abc import Mapping

import torch

_SAMPLES = 256


def tensor_bytes(x: torch.Tensor) -> memoryview:
    """Return a tensor's bytes in the order of its elements, without a copy if it is dense and in host memory."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def sampled_bytes(x: torch.Tensor) -> bytes:
    """Return up to 256 evenly spaced elements of a tensor, as float32."""
    flat = x.detach().reshape(-1)
    return flat[:: max(flat.numel() // _SAMPLES, 1)][:_SAMPLES].float().cpu().numpy().tobytes()


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
