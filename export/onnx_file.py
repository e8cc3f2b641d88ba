"""ONNX models on disk: weights in a separate file, which the graphs of one model share.

A protobuf can't exceed 2 GB, and a UNet's three flavours have the same weights. `write_weights` writes them once,
tensor by tensor, and `save_model` writes graphs that refer to that file. `export_unet` does both for a UNet.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stylefast.errors import ExportError, MissingDependency
from stylefast.export.manifest import GraphEntry
from stylefast.export.onnx_operations import OnnxOperations
from stylefast.export.onnx_writer import check_opset, onnx_model, weight_array
from stylefast.export.unet_graph import GraphShape, Tensor, graph_inputs, graph_output, short_name, trace, with_tokens
from stylefast.models.digests import tensor_bytes
from stylefast.models.unet import UNet

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


def write_weights(model: Any, path: Path, progress: WeightProgress | None = None) -> WeightFile:
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


def save_model(
    model: Any, path: Path, metadata: Mapping[str, str], weights: WeightFile | None = None
) -> tuple[str, ...]:
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
    import onnx_ir as ir

    made = tensor.raw() if isinstance(tensor, ir.LazyTensor) else tensor  # read a lazy tensor now, and don't keep it
    return tensor_bytes(made.raw) if isinstance(made.raw, torch.Tensor) else made.tobytes()


WEIGHTS = "unet.weights"

# (done, total, step) of the graph being written
Phase = Callable[[int, int, str], None]


def export_unet(
    unet: UNet,
    shape: GraphShape,
    folder: Path,
    *,
    weights: WeightFile | None = None,
    opset: int | None = None,
    fixed: Mapping[str, int] | None = None,
    metadata: Mapping[str, str] | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
    operations: type[OnnxOperations] = OnnxOperations,
    phase: Phase = lambda done, total, what: None,
) -> tuple[GraphEntry, WeightFile]:
    """Write `unet-<flavour>.onnx` to a folder. Returns its entry for the manifest, and the file of weights.

    weights: the file that another flavour wrote to the same folder; None: write `unet.weights`. opset: version of
    ONNX's operators; None: the oldest that supports the UNet's type. fixed: dimensions that get one size. metadata:
    strings that go into the file. state: the parameters by name if the UNet is on the meta device; they are read one by
    one. operations: how style attention is written.

    Raises MissingDependency without onnx, ExportError, and OSError from the file system.
    """
    require_onnx()
    opset = check_opset(opset, unet.dtype)
    phase(0, 0, "tracing")
    program = trace(unet, shape, fixed)
    inputs, output, known = graph_inputs(unet, shape), graph_output(unet), with_tokens(unet, fixed or {})
    model = onnx_model(program, [t.fixed(known) for t in inputs], output.fixed(known), opset, state, operations)
    if weights is None:
        weights = write_weights(
            model, folder / WEIGHTS, lambda done, total: phase(done >> 20, total >> 20, "writing weights (MiB)")
        )
    phase(0, 0, "writing the graph")
    path = folder / f"unet-{shape.flavour}.onnx"
    facts = {"component": "unet", **{k: str(v) for k, v in shape.to_dict().items()}, **(metadata or {})}
    files = save_model(model, path, facts, weights)
    entry = GraphEntry(
        "unet", path.name, files, shape.to_dict(), described(inputs), described([output]), dict(fixed or {}), opset
    )
    return entry, weights


def refit_weights(unet: UNet, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the UNet's current weights (LoRAs included) in the layout of its graphs' initialisers, by name.

    names: of initialisers; those that are not parameters, such as constants, are ignored.
    """
    held = unet.state_dict()
    matrices = {f"{n}.weight" for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear)}
    return {name: weight_array(held[name], name in matrices) for name in names if name in held}


def described(tensors: Sequence[Tensor]) -> tuple[tuple, ...]:
    """Return inputs or outputs in the manifest's form: name, type, dimensions."""
    return tuple((t.name, short_name(t.dtype), t.dims) for t in tensors)
