"""Conversion of a traced UNet to an ONNX model: each traced node is written by the function registered for its name.

PyTorch's own exporter could do this, and does for the model's other parts, but its passes over symbolic shapes take
minutes for a UNet where this takes seconds. This writer also keeps names: initialisers are called like the parameters
they hold, so that a TensorRT engine can be refitted by name, and nodes like the modules they come from.

Matrices of linear layers are stored transposed, [in, out], as ONNX's MatMul requires.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stylefast.errors import ExportError, InvalidRequest
from stylefast.export.onnx_operations import OnnxOperations
from stylefast.values import quoted

LATEST_OPSET = 23
_OPSETS = {torch.float32: 20, torch.float16: 20, torch.bfloat16: 22}  # the first whose operators support the type
_PREFIX = "unet."  # prefix of the UNet's modules in the trace
_ONNX_TYPES = {
    torch.float32: 1,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}


def check_opset(opset: int | None, dtype: torch.dtype) -> int:
    """Return the opset to write; None: the oldest that supports `dtype`. Raises InvalidRequest."""
    least = _OPSETS[dtype]
    if opset is None:
        return least
    if isinstance(opset, bool) or not isinstance(opset, int) or not least <= opset <= LATEST_OPSET:
        kind = str(dtype).removeprefix("torch.")
        raise InvalidRequest(
            f"opset is {quoted(opset)}; graphs in {kind} are written in opsets {least} to {LATEST_OPSET}"
        )
    return opset


def onnx_model(
    program: torch.export.ExportedProgram,
    inputs: Sequence,
    output: Any,
    opset: int,
    weights: Mapping[str, torch.Tensor] | None = None,
    operations: type[OnnxOperations] = OnnxOperations,
):
    """Return the ONNX model (an `onnx_ir.Model`) of a traced graph.

    inputs, output: their names and varying dimensions, as `unet_graph.Tensor`; weights: the UNet's parameters by name,
    if the trace was made on the meta device and has none; they are read when the model is saved. operations: how
    stylefast's own ops are written. Raises ExportError for an unsupported operation.
    """
    return _Writer(program, opset, weights, operations).write(inputs, output)


def weight_array(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Return a parameter in the layout of its initialiser."""
    return weight.detach().t().contiguous() if transposed else weight.detach().contiguous()


class NodeMaker:
    """ONNX's operators as methods: each call adds a node and returns its output, or its outputs.

    Equal constants share one initialiser.
    """

    def __init__(self, opset: int):
        import onnx_ir as ir

        self._ir, self._opset = ir, opset
        self.nodes: list = []
        self.initializers: dict[str, Any] = {}
        self.place = ""  # module that new nodes are named after
        self._constants: dict[tuple, Any] = {}

    def __getattr__(self, kind: str) -> Callable:
        if kind.startswith("_"):
            raise AttributeError(kind)

        def make(*inputs, **attributes):
            ir = self._ir
            count = 2 if kind == "Split" else 1
            made = ir.node(
                kind,
                inputs=[self._value(x) for x in inputs],
                attributes=attributes,
                num_outputs=count,
                name=f"{self.place}/{kind}_{len(self.nodes)}",
            )
            for i, value in enumerate(made.outputs):
                value.name = f"v{len(self.nodes)}" + (f"_{i}" if i else "")
            self.nodes.append(made)
            return made.outputs[0] if count == 1 else tuple(made.outputs)

        return make

    def Constant(
        self, value_int: int | None = None, value_ints: Sequence[int] | None = None, value_float: float | None = None
    ):
        if value_float is not None:
            return self.constant(torch.tensor(value_float, dtype=torch.float32))
        return self.constant(torch.tensor(value_int if value_ints is None else value_ints, dtype=torch.int64))

    def constant(self, value: torch.Tensor):
        """Return an initialiser of a small tensor."""
        key = (value.dtype, tuple(value.shape), tuple(value.flatten().tolist()))
        if key not in self._constants:
            self._constants[key] = self.initializer(
                f"constant_{len(self._constants)}", value.shape, value.dtype, lambda: value
            )
        return self._constants[key]

    def initializer(self, name: str, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], torch.Tensor]):
        """Return an initialiser whose content is read when the model is saved."""
        from onnx_ir.tensor_adapters import TorchTensor

        ir, kind = self._ir, self._ir.DataType(_ONNX_TYPES[dtype])
        held = ir.LazyTensor(lambda: TorchTensor(read(), name=name), dtype=kind, shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=held)
        self.initializers[name] = value
        return value

    def _value(self, x):
        return self.Constant(value_int=x) if isinstance(x, int) else x


class _Writer:
    def __init__(
        self,
        program: torch.export.ExportedProgram,
        opset: int,
        weights: Mapping[str, torch.Tensor] | None,
        operations: type[OnnxOperations],
    ):
        import onnx_ir as ir

        self.ir, self.program, self.opset = ir, program, opset
        self.op = NodeMaker(opset)
        self.styles = operations(self.op, opset)
        self.values: dict[torch.fx.Node, Any] = {}
        self.sizes: dict[tuple, Any] = {}
        self.weights = weights or {name.removeprefix(_PREFIX): x for name, x in program.state_dict.items()}
        self.parameters: dict[str, str] = {
            **program.graph_signature.inputs_to_parameters,
            **program.graph_signature.inputs_to_buffers,
        }
        self.constants = {
            spec.arg.name: constant
            for spec in program.graph_signature.input_specs
            if spec.kind == torch.export.graph_signature.InputKind.CONSTANT_TENSOR and spec.target is not None
            if isinstance(constant := program.constants[spec.target], torch.Tensor)
        }

    def write(self, inputs: Sequence, output):
        ir, given = self.ir, []
        names = iter(inputs)
        matrices = self._matrices()
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in self.parameters:
                    self._parameter(node, node.name in matrices)
                elif node.name in self.constants:
                    self.values[node] = self.op.constant(self.constants[node.name])
                else:
                    value = self._input(next(names))
                    given.append(value)
                    self.values[node] = value
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                (last,) = node.args[0]
                result = self.values[last]
        result.name = output.name
        result.shape, result.type = ir.Shape(output.dims), ir.TensorType(ir.DataType(_ONNX_TYPES[output.dtype]))
        graph = ir.Graph(
            given,
            [result],
            nodes=self.op.nodes,
            initializers=tuple(self.op.initializers.values()),
            opset_imports={"": self.opset} | self.styles.domains,
            name="unet",
        )
        # version 10 covers all written types, and the oldest runtimes in use can read it
        model = ir.Model(graph, ir_version=10, producer_name="stylefast")
        _tidy(model)
        return model

    def _matrices(self) -> set[str]:
        """Return the placeholders of parameters that linear layers multiply with."""
        return {node.args[1].name for node in self.program.graph.nodes if node.target is torch.ops.aten.linear.default}

    def _input(self, tensor):
        ir = self.ir
        kind = ir.TensorType(ir.DataType(_ONNX_TYPES[tensor.dtype]))
        return ir.Value(name=tensor.name, shape=ir.Shape(tensor.dims), type=kind)

    def _parameter(self, node: torch.fx.Node, transposed: bool) -> None:
        name = self.parameters[node.name].removeprefix(_PREFIX)
        weight = self.weights[name]
        shape = tuple(reversed(weight.shape)) if transposed else tuple(weight.shape)
        self.values[node] = self.op.initializer(name, shape, weight.dtype, lambda: weight_array(weight, transposed))

    def _call(self, node: torch.fx.Node) -> None:
        target = node.target
        stack = node.meta.get("nn_module_stack")
        self.op.place = list(stack.values())[-1][0].removeprefix(_PREFIX) if stack else ""
        arguments = [self._argument(x) for x in node.args]
        keywords = {name: self._argument(x) for name, x in node.kwargs.items()}
        operator = getattr(target, "__name__", target)
        name = str(target) if isinstance(target, torch._ops.OpOverload) else f"operator.{operator}"
        if name.startswith("stylefast."):
            form = getattr(self.styles, name.split(".")[1], None)
        else:
            form = _FORMS.get(name)
            arguments = [self, node, *arguments]
        if form is None:
            raise ExportError(f"the graph has an operation {name}, which has no form in ONNX here ({self.op.place})")
        result = form(*arguments, **keywords)
        mutable = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
        if mutable and name.startswith("stylefast."):  # it writes into its last argument
            self._replace(node.args[-1], result)
            return
        self.values[node] = result
        self._describe(node.meta.get("val"), result)

    def _replace(self, written, values) -> None:
        """Let all later nodes read the new values of what an operation wrote into."""
        for node, value in zip(written, values, strict=True):
            self.values[node] = value
            self._describe(node.meta["val"], value)

    def _describe(self, meta, value) -> None:
        """Set the element type and known dimensions, which later nodes read."""
        if isinstance(meta, (tuple, list)):
            for one, made in zip(meta, value, strict=True):
                self._describe(one, made)
        elif isinstance(meta, torch.Tensor) and value is not None and value.const_value is None:
            dims = [int(d) if isinstance(d, int) else None for d in meta.shape]
            if value.shape is None or value.producer() is not None:
                value.shape = self.ir.Shape(dims)
                value.type = self.ir.TensorType(self.ir.DataType(_ONNX_TYPES[meta.dtype]))

    def _argument(self, x):
        if isinstance(x, torch.fx.Node):
            return self.values[x]
        if isinstance(x, (list, tuple)):
            return [self._argument(one) for one in x]
        return x

    # used by the functions below

    def size(self, x, dim: int):
        key = (x, dim)
        if key not in self.sizes:
            self.sizes[key] = self.op.Shape(x, start=dim, end=dim + 1)
        return self.sizes[key]

    def length(self, x):
        """Return a number of the trace, known or not, as a tensor [1] of int64."""
        return self.op.Constant(value_ints=[x]) if isinstance(x, int) else x

    def lengths(self, sizes: Sequence):
        if all(isinstance(x, int) for x in sizes):
            return self.op.Constant(value_ints=list(sizes))
        return self.op.Concat(*(self.length(x) for x in sizes), axis=0)

    def scalar(self, x, dtype: torch.dtype):
        return self.op.constant(torch.tensor(x, dtype=dtype)) if isinstance(x, (int, float, bool)) else x


def _dtype(node: torch.fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def _rank(node: torch.fx.Node) -> int:
    return node.meta["val"].ndim


def _binary(kind: str) -> Callable:
    def form(w: _Writer, node, a, b):
        # PyTorch promotes operand types; ONNX requires equal ones
        dtype = _dtype(node)
        parts = []
        for source, x in zip(node.args, (a, b), strict=True):
            if isinstance(source, torch.fx.Node) and source.meta["val"].dtype != dtype:
                x = w.op.Cast(x, to=_ONNX_TYPES[dtype])
            parts.append(w.scalar(x, dtype))
        return getattr(w.op, kind)(*parts)

    return form


def _unary(kind: str) -> Callable:
    return lambda w, node, x: getattr(w.op, kind)(x)


def _numbers(kind: str) -> Callable:
    return lambda w, node, a, b: getattr(w.op, kind)(w.length(a), w.length(b))


def _linear(w, node, x, weight, bias=None):
    out = w.op.MatMul(x, weight)
    return out if bias is None else w.op.Add(out, bias)


def _conv2d(w, node, x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    height, width = padding
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return w.op.Conv(
        *inputs,
        strides=list(stride),
        pads=[height, width, height, width],
        dilations=list(dilation),
        group=groups,
        kernel_shape=[int(side) for side in weight.shape[2:]],
    )


def _index(w, node, x, indices):
    axis = next(i for i, index in enumerate(indices) if index is not None)
    if len([i for i in indices if i is not None]) != 1:
        raise ExportError("the graph picks by several indices at once, which has no form in ONNX here")
    return w.op.Gather(x, indices[axis], axis=axis)


def _slice(w, node, x, dim=0, start=None, end=None, step=1):
    bounds = (w.lengths([start or 0]), w.lengths([2**31 - 1 if end is None else end]))
    return w.op.Slice(x, *bounds, w.op.Constant(value_ints=[dim]), w.op.Constant(value_ints=[step]))


def _flatten(w, node, x, start=0, end=-1):
    rank = _rank(node.args[0])
    if end % rank != rank - 1:
        raise ExportError(f"the graph flattens dimensions {start} to {end} of {rank}, which has no form in ONNX here")
    return w.op.Reshape(x, w.op.Constant(value_ints=[0] * (start % rank) + [-1]))


def _unflatten(w, node, x, dim, sizes):
    rank = _rank(node.args[0])
    if dim % rank == rank - 1:
        return w.op.Reshape(x, w.lengths([0] * (rank - 1) + list(sizes)))
    shape = [w.size(x, i) for i in range(rank)]
    return w.op.Reshape(x, w.lengths([*shape[: dim % rank], *sizes, *shape[dim % rank + 1 :]]))


def _transpose(w, node, x, a, b):
    order = list(range(_rank(node)))
    order[a], order[b] = order[b], order[a]
    return w.op.Transpose(x, perm=order)


def _resize(w, node, x, size, factors=None):
    shape = w.lengths([w.size(x, 0), w.size(x, 1), *size])
    nothing = None
    return w.op.Resize(
        x, nothing, nothing, shape, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )


def _filled(w, node, size, value=0, **_):
    dtype = _dtype(node)
    return w.op.Expand(w.op.constant(torch.tensor(value, dtype=dtype)), w.lengths(size))


def _where(w, node, condition, x, other):
    return w.op.Where(condition, w.scalar(x, _dtype(node)), w.scalar(other, _dtype(node)))


_FORMS: Mapping[str, Callable] = {
    "aten.sym_size.int": lambda w, node, x, dim: w.size(x, dim),
    "operator.add": _numbers("Add"),
    "operator.sub": _numbers("Sub"),
    "operator.mul": _numbers("Mul"),
    "operator.floordiv": _numbers("Div"),  # same as floor, as sizes are positive
    "operator.getitem": lambda w, node, x, i: x[i],
    "aten._assert_tensor_metadata.default": lambda w, node, *_, **__: None,
    "aten.linear.default": _linear,
    "aten.conv2d.default": _conv2d,
    "aten.silu.default": lambda w, node, x: w.op.Mul(x, w.op.Sigmoid(x)),
    "aten.add.Tensor": _binary("Add"),
    "aten.mul.Tensor": _binary("Mul"),
    "aten.div.Tensor": _binary("Div"),
    "aten.exp.default": _unary("Exp"),
    "aten.cos.default": _unary("Cos"),
    "aten.sin.default": _unary("Sin"),
    "aten.to.dtype": lambda w, node, x, dtype, *_: w.op.Cast(x, to=_ONNX_TYPES[dtype]),
    "aten.arange.default": lambda w, node, end, **_: w.op.constant(torch.arange(end)),
    "aten.cat.default": lambda w, node, parts, dim=0: w.op.Concat(*parts, axis=dim),
    "aten.select.int": lambda w, node, x, dim, i: w.op.Gather(x, w.op.Constant(value_int=i), axis=dim),
    "aten.index.Tensor": _index,
    "aten.slice.Tensor": _slice,
    "aten.unsqueeze.default": lambda w, node, x, dim: w.op.Unsqueeze(x, w.op.Constant(value_ints=[dim])),
    "aten.flatten.using_ints": _flatten,
    "aten.unflatten.int": _unflatten,
    "aten.view.default": lambda w, node, x, size: w.op.Reshape(x, w.lengths(size)),
    "aten.transpose.int": _transpose,
    "aten.numpy_T.default": lambda w, node, x: w.op.Transpose(x, perm=list(reversed(range(_rank(node))))),
    "aten.where.ScalarOther": _where,
    "aten.upsample_nearest2d.vec": _resize,
    "aten.empty.memory_format": _filled,
    "aten.full.default": _filled,
    "aten.zeros.default": _filled,
}


def _tidy(model) -> None:
    """Deduplicate equal nodes, and drop unused nodes and initialisers."""
    from onnx_ir.passes import PassManager, common

    PassManager([common.RemoveUnusedNodesPass(), common.CommonSubexpressionEliminationPass()])(model)
