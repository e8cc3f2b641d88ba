"""Model parts around the UNet as graphs of flat tensors: text encoders, VAE decoder, image encoder and projections.

A `Component` is a module whose forward takes tensors in the order of `inputs` and returns those of `outputs`.
`text_graphs` and `image_graphs` create the modules; here they are traced and written as ONNX. The written weights
include LoRAs, but not learned vectors and strengths.

    text_encoder       ids, extra                  -> hidden
    text_encoder_2     ids, extra, position        -> hidden, pooled
    text_projector     states                      -> text_kv_<level>
    image_encoder      pixels                      -> embeds, patches
    image_projector    features                    -> image_kv_<level>
    vae_decoder        latents (unscaled)          -> pictures around -1..1
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from stylefast.errors import InvalidRequest, MissingDependency
from stylefast.export.manifest import GraphEntry
from stylefast.export.onnx_file import require_onnx, save_model, write_weights
from stylefast.export.onnx_writer import check_opset
from stylefast.export.unet_graph import Tensor

# protobuf files are limited to 2 GB, so larger weights go into a separate file, which leaves room for the graph
LARGEST_FILE = 10**9

# name of a dimension that may vary -> (least, most) that a graph without profiles is exported for
DIMENSIONS = {
    "prompts": (1, 256),
    "vectors": (0, 4096),
    "text_pages": (1, 4096),
    "pictures": (1, 256),
    "image_pages": (1, 4096),
    "patches": (1, 4096),
    "height": (2, 1024),
    "width": (2, 1024),
}
# for tracing: all different and above 1, so that no dimension is mistaken for another or for 1
_EXAMPLES = {
    "prompts": 3,
    "vectors": 5,
    "text_pages": 3,
    "pictures": 2,
    "image_pages": 3,
    "patches": 11,
    "height": 6,
    "width": 10,
}


@dataclass(frozen=True, eq=False)
class Component:
    """One module to export, with its inputs and outputs.

    dtype: of its weights and floating inputs. limits: input name -> exclusive upper bound of its integers. facts: what
    a loader needs besides shapes, for the manifest; plain values.
    """

    name: str
    module: nn.Module
    dtype: torch.dtype
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    limits: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, int | str] = field(default_factory=dict)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Return the names of its inputs' dimensions that may vary."""
        return tuple(dict.fromkeys(d for tensor in self.inputs for d in tensor.dims if isinstance(d, str)))

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def sizes(self, fixed: Mapping[str, int] | None = None) -> dict[str, int]:
        """Return sizes to trace with: those in `fixed`, else examples. Raises InvalidRequest for unfit ones."""
        fixed = dict(fixed or {})
        for name, value in fixed.items():
            if name not in self.dimensions:
                known = ", ".join(self.dimensions)
                raise InvalidRequest(f"the {self.name} has no dimension {name!r} that may be fixed; it has {known}")
            low, high = DIMENSIONS[name]
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InvalidRequest(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
        return {name: _EXAMPLES[name] for name in self.dimensions} | fixed

    def example_inputs(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
        """Return random inputs by name; numbers are drawn on the CPU from `seed`."""
        draw, made = torch.Generator().manual_seed(seed), {}
        for tensor in self.inputs:
            dims = tuple(sizes[d] if isinstance(d, str) else d for d in tensor.dims)
            if tensor.dtype.is_floating_point:
                value = torch.randn(dims, generator=draw)
            else:
                value = torch.randint(0, self.limits[tensor.name], dims, generator=draw)
            made[tensor.name] = value.to(tensor.dtype).to(self.device)
        return made

    def dynamic_shapes(self, fixed: Mapping[str, int] | None = None) -> tuple[dict, ...]:
        """Return, for `torch.export`, the dimensions of every input that may vary; those in `fixed` don't."""
        named = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in DIMENSIONS.items()}
        return tuple(
            {i: named[d] for i, d in enumerate(tensor.dims) if isinstance(d, str) and d not in (fixed or {})}
            for tensor in self.inputs
        )

    def trace(self, fixed: Mapping[str, int] | None = None) -> torch.export.ExportedProgram:
        """Return the graph in PyTorch's own operations; `fixed` are sizes that don't vary."""
        inputs = tuple(self.example_inputs(self.sizes(fixed)).values())
        with torch.no_grad():
            return torch.export.export(
                self.module.eval(), inputs, dynamic_shapes=self.dynamic_shapes(fixed), strict=False
            )


def export_component(
    component: Component,
    folder: Path,
    *,
    opset: int | None = None,
    fixed: Mapping[str, int] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> GraphEntry:
    """Write `<component>.onnx` to a folder, with `<component>.onnx.data` for weights beyond LARGEST_FILE.

    opset: version of ONNX's operators; None: the oldest that supports the component's type. fixed: dimensions that get
    one size. metadata: strings that go into the file. Returns its entry for the manifest, with the component's facts in
    `extra`.

    Raises MissingDependency without onnx and onnxscript, ExportError, InvalidRequest for sizes that can't be fixed, and
    OSError from the file system.
    """
    require_onnx()
    if find_spec("onnxscript") is None:
        raise MissingDependency(
            "onnxscript is not installed, without which no ONNX model can be written; "
            "`pip install 'stylefast[export]'` brings it"
        )
    fixed, opset = dict(fixed or {}), check_opset(opset, component.dtype)
    program = component.trace(fixed)
    inputs, outputs = ([_fixed(t, fixed) for t in tensors] for tensors in (component.inputs, component.outputs))
    model = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        verbose=False,
        optimize=True,
        input_names=[t.name for t in inputs],
        output_names=[t.name for t in outputs],
    ).model
    _name_dimensions(model, inputs, outputs)
    path, weights = Path(folder) / f"{component.name}.onnx", None
    if sum(value.const_value.nbytes for value in model.graph.initializers.values()) > LARGEST_FILE:
        weights = write_weights(model, path.with_name(f"{path.name}.data"))
    files = save_model(model, path, {"component": component.name, **(metadata or {})}, weights)
    return GraphEntry(
        component.name,
        path.name,
        files,
        {},
        _described(inputs),
        _described(outputs),
        fixed,
        opset,
        dict(component.facts),
    )


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of tensors with their names, types and shapes, which identifies the weights of a graph."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def in_type(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the module itself if its weights are of this type, else a copy in it."""
    if all(p.dtype == dtype for p in module.parameters()):
        return module
    return copy.deepcopy(module).to(dtype)


def _fixed(tensor: Tensor, fixed: Mapping[str, int]) -> Tensor:
    """Replace the names of fixed dimensions by numbers; an output's may have a factor, as in "4*height"."""

    def known(dim: int | str) -> int | str:
        factor, _, name = str(dim).rpartition("*")
        return int(factor or 1) * fixed[name] if name in fixed else dim

    return replace(tensor, dims=tuple(map(known, tensor.dims)))


def _described(tensors: Sequence[Tensor]) -> tuple[tuple, ...]:
    return tuple((t.name, str(t.dtype).removeprefix("torch."), t.dims) for t in tensors)


def _name_dimensions(model, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Give the graph's inputs and outputs their dimensions' names in place of the tracer's."""
    import onnx_ir as ir

    for values, tensors in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            value.shape = ir.Shape(tensor.dims)


__all__ = ["DIMENSIONS", "LARGEST_FILE", "Component", "export_component", "in_type", "weights_digest"]
