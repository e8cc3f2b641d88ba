"""What an export will take of memory and disk, told before it starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from stylefast.errors import InvalidRequest
from stylefast.export.manifest import KINDS
from stylefast.models.unet import UNet

# what a process takes beside weights: Python, PyTorch, the traced graph
_BASE = 600_000_000
# bytes of memory at the peak per byte of the UNet's weights; see `estimate_export`
_MEMORY = {"onnx": 1.0, "triton-repo": 1.0, "tensorrt": 3.25, "aoti": 3.0}
# files hold the weights and little more
_DISK = 1.02


@dataclass(frozen=True)
class Estimate:
    """Bytes: memory at the peak, disk for the folder and what is written on the way, and weights that are loaded."""

    memory: int
    disk: int
    weights: int

    def warning(self, free: int | None) -> str | None:
        """What to say if it may not fit in the `free` bytes of memory (weights already loaded); None if it does."""
        wanted = self.memory - self.weights
        if free is None or wanted <= free:
            return None
        return (
            f"the export may need {wanted / 1e9:.3g} GB more memory than is in use now, and {free / 1e9:.3g} GB are "
            "free: it may be slow or be stopped by the system; close other programs, export in a 16-bit type, or one "
            "flavour at a time"
        )


def estimate_export(
    unet_config: Mapping[str, Any],
    dtype: torch.dtype,
    flavours: Sequence[str],
    kind: str,
    other_weights: int = 0,
    from_onnx: bool = False,
) -> Estimate:
    """Memory and disk that an export of a UNet in these flavours takes, one flavour after the other.

    The UNet's parameters are counted without loading them. Memory rests on measurements of the peak of a whole
    process, taken as a base plus so many bytes per byte of weights:

        onnx      SDXL in float16 (2.57e9 parameters, 5.13 GB): 5.7 GB
        tensorrt  the same, TensorRT-RTX 1.7 for one chip: 17.3 GB, and an engine of 5.18 GB
        aoti      stacks of linear layers of 75 MB and 453 MB in float32 on a CPU: 0.68 and 1.82 GB. No UNet of full
                  size was measured, and the C++ compiler, a process of its own, is not counted.

    other_weights: bytes of text encoders, VAE and adapters, held beside and written once where they are exported too
    (kinds onnx and triton-repo). from_onnx: the ONNX files that TensorRT reads are there. Raises InvalidRequest.
    """
    if kind not in KINDS:
        raise InvalidRequest(f"kind is {kind!r}; there are {', '.join(KINDS)}")
    unet = _parameters(_frozen(unet_config)) * dtype.itemsize
    written = unet * len(flavours)
    if kind in ("onnx", "triton-repo"):
        written += other_weights
    if kind == "tensorrt" and not from_onnx:
        written += unet  # the ONNX file of one flavour, until its engine is built
    memory = _BASE + round(_MEMORY[kind] * unet) + other_weights
    return Estimate(memory, round(_DISK * written), unet + other_weights)


def _frozen(value: Any) -> Any:
    """A config that can be a key."""
    if isinstance(value, Mapping):
        return tuple((name, _frozen(value[name])) for name in sorted(value))
    return tuple(_frozen(one) for one in value) if isinstance(value, list | tuple) else value


@lru_cache(maxsize=8)
def _parameters(config: tuple) -> int:
    with torch.device("meta"):
        unet = UNet(dict(config))
    return sum(parameter.numel() for parameter in unet.parameters())
