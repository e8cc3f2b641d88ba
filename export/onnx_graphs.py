"""The UNet as ONNX files: one graph per flavour, all with one file of weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from stylefast.export.manifest import GraphEntry
from stylefast.export.onnx_file import WeightFile, require_onnx, save_model, write_weights
from stylefast.export.onnx_operations import OnnxOperations
from stylefast.export.onnx_writer import check_opset, onnx_model, weight_array
from stylefast.export.unet_graph import GraphShape, Tensor, graph_inputs, graph_output, trace
from stylefast.models.unet import UNet

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
    inputs, output = graph_inputs(unet, shape), graph_output(unet)
    model = onnx_model(
        program, [_fixed(t, unet, fixed) for t in inputs], _fixed(output, unet, fixed), opset, state, operations
    )
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
    return tuple((t.name, str(t.dtype).removeprefix("torch."), t.dims) for t in tensors)


def _fixed(tensor: Tensor, unet: UNet, fixed: Mapping[str, int] | None) -> Tensor:
    """Replace the names of fixed dimensions by numbers."""
    known = dict(fixed or {})
    if {"height", "width"} <= known.keys():
        sizes = unet.attention_sizes(known["height"], known["width"])
        known |= {f"tokens_{level}": h * w for level, (h, w) in enumerate(sizes)}
    return replace(tensor, dims=tuple(known.get(d, d) if isinstance(d, str) else d for d in tensor.dims))
