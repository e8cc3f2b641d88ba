"""bfloat16 graphs on a runtime that has no bfloat16: every result is computed in float32 and rounded, as kernels do."""

import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, BFLOAT16 = TensorProto.FLOAT, TensorProto.BFLOAT16


def emulated(path) -> bytes:
    """An ONNX file in bfloat16 as a model in float32 that rounds each of its tensors to bfloat16."""
    model = onnx.load(str(path))
    kinds = _types(model)
    graph = model.graph
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == BFLOAT16:
            value.type.tensor_type.elem_type = FLOAT
    for tensor in graph.initializer:
        if tensor.data_type == BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
    nodes = []
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == BFLOAT16:
                attribute.i = FLOAT
        nodes.append(node)
        for i, name in enumerate(node.output):
            if kinds.get(name) == BFLOAT16:
                node.output[i] = f"{name}/exact"
                nodes.append(helper.make_node("Cast", [f"{name}/exact"], [f"{name}/rounded"], to=BFLOAT16))
                nodes.append(helper.make_node("Cast", [f"{name}/rounded"], [name], to=FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return model.SerializeToString()


def _types(model) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    values = (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    missing = [name for node in model.graph.node for name in node.output if name not in kinds]
    if missing:
        raise ValueError(f"the type of {missing[0]} is not known")
    return kinds
