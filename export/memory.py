"""Estimates of the memory and disk space that an export will take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from stylefast.errors import InvalidRequest
from stylefast.export.manifest import KINDS
from stylefast.models.unet import UNet

# process overhead besides weights: Python, PyTorch, the traced graph
_BASE = 600_000_000
# memory of TensorRT's builder process per byte of the UNet's weights; see `estimate_export`
_BUILDER = 3.25
# files contain weights and little else
_DISK = 1.02
# per UNet graph or engine besides its weights
_GRAPH = 40_000_000


@dataclass(frozen=True)
class Estimate:
    """Bytes: peak memory, disk for the folder and temporary files, and weights that are already loaded."""

    memory: int
    disk: int
    weights: int

    def warning(self, free: int | None) -> str | None:
        """Return a warning if the rest may not fit in `free` bytes (weights already loaded), else None."""
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
    """Estimate the memory and disk of exporting a UNet in these flavours, one flavour after the other.

    The UNet's parameters are counted without loading them. Memory is a base per process plus a factor per byte of
    weights, based on measured peaks:

        onnx      SDXL in float16 (2.57e9 parameters, 5.13 GB): 5.7 GB; flavours share one file of weights
        tensorrt  graphs as above; then the weights are freed, and the builder takes 17.3 GB for the same UNet, banked
                  (TensorRT-RTX 1.7, one chip); its engine has 4.6 GB (benchmarks/results/export-sdxl.json)
        aoti      UNets of 4 MB and 1 GB of weights in float32 on a CPU: 0.53 and 1.53 GB, packages of 3.5 MB without
                  weights. The C++ compiler, a separate process, is not counted.

    other_weights: bytes of text encoders, VAE and adapters; they stay in memory and are written once if exported too
    (kinds onnx and triton-repo). from_onnx: whether the ONNX files to build from exist. Raises InvalidRequest for an
    unknown kind.
    """
    if kind not in KINDS:
        raise InvalidRequest(f"kind is {kind!r}; there are {', '.join(KINDS)}")
    unet = _parameters(_frozen(unet_config)) * dtype.itemsize
    memory = _BASE + unet + other_weights
    count = len(flavours)
    shared = (unet if count else 0) + other_weights  # in a folder of graphs
    if kind == "onnx":
        written = shared
    elif kind == "triton-repo":
        written = shared if from_onnx else 2 * shared  # the graphs are copied
    elif kind == "tensorrt":
        written = unet * count if from_onnx else unet * (count + 1)  # plus the graphs, which share one file of weights
        # weights are freed before the builder, a separate process, starts
        memory = max(memory, 2 * _BASE + other_weights + round(_BUILDER * unet))
    else:
        written = 0
    return Estimate(memory, round(_DISK * written) + _GRAPH * count, unet + other_weights)


def _frozen(value: Any) -> Any:
    """Return a config as a hashable value."""
    if isinstance(value, Mapping):
        return tuple((name, _frozen(value[name])) for name in sorted(value))
    return tuple(_frozen(one) for one in value) if isinstance(value, list | tuple) else value


@lru_cache(maxsize=8)
def _parameters(config: tuple) -> int:
    with torch.device("meta"):
        unet = UNet(dict(config))
    return sum(parameter.numel() for parameter in unet.parameters())
