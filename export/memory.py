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
# bytes that TensorRT's builder, a process of its own, takes per byte of the UNet's weights; see `estimate_export`
_BUILDER = 3.25
# files hold the weights and little more
_DISK = 1.02
# of a UNet's graph or engine beside its weights
_GRAPH = 40_000_000


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

    The UNet's parameters are counted without loading them. Memory is a base for each process, and so many bytes per
    byte of weights, which rests on peaks that were measured:

        onnx      SDXL in float16 (2.57e9 parameters, 5.13 GB): 5.7 GB; flavours share one file of weights
        tensorrt  graphs as above; then the weights are let go, and the builder takes 17.3 GB for the same UNet, banked
                  (TensorRT-RTX 1.7, one chip); its engine has 4.6 GB (benchmarks/results/export-sdxl.json)
        aoti      UNets of 4 MB and 1 GB of weights in float32 on a CPU: 0.53 and 1.53 GB, packages of 3.5 MB without
                  weights. The C++ compiler, a process of its own, is not counted.

    other_weights: bytes of text encoders, VAE and adapters, held beside and written once where they are exported too
    (kinds onnx and triton-repo). from_onnx: the ONNX files to build from are there. Raises InvalidRequest.
    """
    if kind not in KINDS:
        raise InvalidRequest(f"kind is {kind!r}; there are {', '.join(KINDS)}")
    unet = _parameters(_frozen(unet_config)) * dtype.itemsize
    memory = _BASE + unet + other_weights
    count = len(flavours)
    shared = (unet if count else 0) + other_weights  # graphs in a folder of their own
    if kind == "onnx":
        written = shared
    elif kind == "triton-repo":
        written = shared if from_onnx else 2 * shared  # the graphs are copied
    elif kind == "tensorrt":
        written = unet * count if from_onnx else unet * (count + 1)  # and one flavour's graph at a time
        # weights are let go before the builder starts, a process of its own
        memory = max(memory, 2 * _BASE + other_weights + round(_BUILDER * unet))
    else:
        written = 0
    return Estimate(memory, round(_DISK * written) + _GRAPH * count, unet + other_weights)


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
