"""ONNX models on disk: weights in a separate file, which the graphs of one model share.

A protobuf can't exceed 2 GB, and a UNet's three flavours have the same weights. `write_weights` writes them once,
tensor by tensor, and `save_model` writes graphs that refer to that file.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from stylefast.errors import ExportError, MissingDependency

# smaller tensors stay in the graph, where shape inference can see them
INLINE_BYTES = 4096
_ALIGN = 4096  # so that readers can memory-map every tensor
WeightProgress = Callable[[int, int], None]  # bytes written, bytes in all


class StoredTensor(NamedTuple):
    """Position of a tensor in a weight file."""

    offset: int
    length: int


class WeightFile(NamedTuple):
    """A file of tensors that graphs in the same folder refer to by name."""

    path: Path
    tensors: Mapping[str, StoredTensor]


def require_onnx() -> None:
    """Raise MissingDependency if ONNX models can't be written."""
    for package in ("onnx", "onnx_ir"):
        try:
            __import__(package)
        except ImportError:
            raise MissingDependency(
                f"{package} is not installed, without which no ONNX model can be written; "
                "`pip install 'stylefast[export]'` brings it"
            ) from None


def write_weights(model, path: Path, progress: WeightProgress | None = None) -> WeightFile:
    """Write the large initialisers of a model, one at a time. Raises OSError from the file system."""
    large = [value.const_value for value in _large(model)]
    total, done, stored = sum(tensor.nbytes for tensor in large), 0, {}
    with path.open("wb") as file:
        for tensor in large:
            file.write(b"\0" * (-file.tell() % _ALIGN))
            stored[tensor.name] = StoredTensor(file.tell(), tensor.nbytes)
            file.write(_bytes(tensor))
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
    return WeightFile(path, stored)


def save_model(model, path: Path, metadata: Mapping[str, str], weights: WeightFile | None = None) -> tuple[str, ...]:
    """Write and check a graph. Returns the names of the files that it needs, its own first.

    model: an `onnx_ir.Model`; weights: a file in the same folder that holds its large initialisers; None: the graph
    holds them all. Raises ExportError for a graph that ONNX's checker refuses, and OSError from the file system.
    """
    import onnx
    import onnx_ir as ir

    model.metadata_props.update({f"stylefast.{key}": value for key, value in metadata.items()})
    if weights is not None:
        for value in _large(model):
            held, place = value.const_value, weights.tensors.get(value.name)
            if place is None or place.length != held.nbytes:
                raise ExportError(f"{weights.path.name} holds no {value.name} of {held.nbytes} bytes")
            value.const_value = ir.ExternalTensor(
                weights.path.name,
                place.offset,
                place.length,
                held.dtype,
                shape=held.shape,
                name=value.name,
                base_dir=weights.path.parent,
            )
    path.write_bytes(ir.to_proto(model).SerializeToString())
    try:
        onnx.checker.check_model(str(path), full_check=weights is None)
    except onnx.checker.ValidationError as error:
        path.unlink(missing_ok=True)
        raise ExportError(f"the graph {path.name} is not valid ONNX: {' '.join(str(error).split())[:600]}") from error
    return (path.name,) if weights is None else (path.name, weights.path.name)


def _large(model) -> Iterable:
    return [v for v in model.graph.initializers.values() if v.const_value.nbytes > INLINE_BYTES]


def _bytes(tensor) -> memoryview | bytes:
    made = tensor.raw() if callable(tensor.raw) else tensor  # read a lazy tensor now, and don't keep it
    held = made.raw
    if isinstance(held, torch.Tensor):
        # no copy on the host for any type
        return memoryview(held.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return made.tobytes()
