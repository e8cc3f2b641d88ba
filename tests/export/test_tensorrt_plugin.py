"""Shared attention as a TensorRT plugin: what it registers, and its nodes in ONNX."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from stylefast.errors import EngineMismatch, ExportError, MissingDependency
from stylefast.export import onnx_writer, tensorrt_plugin
from stylefast.export.onnx_operations import OnnxOperations
from stylefast.export.tensorrt_plugin import PLUGINS, CompiledKernel, PluginOperations, plugin_api, register_plugin
from stylefast.export.unet_graph import Tensor
from stylefast.kernels.shared_attention import Affine, shared_attention
from tests.export.tensorrt_stand_in import TensorDesc, stand_in

# registration


@pytest.fixture
def tensorrt(monkeypatch):
    trt, trtp = stand_in()
    monkeypatch.setitem(sys.modules, trt.__name__, trt)
    monkeypatch.setitem(sys.modules, trtp.__name__, trtp)
    monkeypatch.setattr(tensorrt_plugin, "_registered", {})
    return trt, trtp


class Compiler:
    """Counts what it is asked for, and gives a kernel of 64 queries a block."""

    def __init__(self):
        self.asked = []

    def __call__(self, chip, dtype, d, **more):
        self.asked.append((chip, dtype, d, more))
        sizes = ("rows", "tokens", "heads", "references") + ("pages", "page_tokens") * more["banked"]
        inputs = PLUGINS["shared_attention_banked" if more["banked"] else "shared_attention"]
        return CompiledKernel("ptx", "kernel", 4096, 4, (*inputs, *sizes, "out"), 64, {})


def tensors(trt, plugin, kind="HALF", rows=4, tokens=1024, page_tokens=1024, d=64):
    """Descriptions of a plugin's inputs, whose sizes may be names."""
    native, i32, f32 = trt.DataType[kind], trt.DataType.INT32, trt.DataType.FLOAT
    own = [TensorDesc(native, (rows, tokens, 10, d))] * 3
    tables = [TensorDesc(i32, (rows, 1)), TensorDesc(i32, (rows,))] + [TensorDesc(f32, (rows, 1))] * 2
    affine = [TensorDesc(f32, (3, rows, 10, d))] * 2
    pools = [TensorDesc(native, ("pages", page_tokens, 10, d))] * 2
    return own + tables + affine + pools * plugin.endswith("banked")


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_output_is_like_the_queries_of(tensorrt, plugin):
    trt, trtp = tensorrt
    assert register_plugin(trt, "sm89", compiler=Compiler()) == tuple(PLUGINS)
    found = trtp.plugins[f"stylefast::{plugin}"]
    assert found["inputs"] == list(PLUGINS[plugin])
    out = found["register"](*tensors(trt, plugin))
    assert out.dtype is trt.DataType.HALF and out.shape == (4, 1024, 10, 64)


@pytest.mark.parametrize("kind, word", [("HALF", "FP16"), ("BF16", "BF16"), ("FLOAT", "FP32")])
def test_types_follow_the_queries_and_tables_stay(tensorrt, kind, word):
    trt, trtp = tensorrt
    register_plugin(trt, "sm89", configs=[{"block_m": 64}, {"block_m": 128}], compiler=Compiler())
    given = tensors(trt, "shared_attention_banked", kind)
    (found,) = trtp.plugins["stylefast::shared_attention_banked"]["autotune"](*given, given[:1])
    expected = [word] * 3 + ["INT32"] * 2 + ["FP32"] * 4 + [word] * 3
    assert (found.io_types.split(","), found.layouts, found.tactics) == (expected, "LINEAR", [1, 2])


def test_a_launch_covers_every_query_of_every_row_and_head(tensorrt):
    trt, trtp = tensorrt
    compiler = Compiler()
    register_plugin(trt, "sm89", compiler=compiler)
    given = tensors(trt, "shared_attention_banked", rows=3, tokens=1000, page_tokens=600)
    name, ptx, launch, numbers = trtp.plugins["stylefast::shared_attention_banked"]["aot_impl"](*given, given[:1], 1)
    assert (name, ptx, launch.block_x, launch.shared_mem) == ("kernel", "ptx", 128, 4096)
    assert launch.grid_x.value == 16 * 3 * 10
    assert [number.value for number in numbers.items] == [3, 1000, 10, 1, "pages", 600]
    ((chip, dtype, d, more),) = compiler.asked
    assert (chip, dtype, d, more["parts"], more["even"]) == ("sm89", torch.float16, 64, 3, 200)


def test_sizes_that_vary_are_left_to_the_launch_and_assumed_to_divide_by_nothing(tensorrt):
    trt, trtp = tensorrt
    compiler = Compiler()
    register_plugin(trt, "sm89", compiler=compiler)
    given = tensors(trt, "shared_attention", rows="rows", tokens="tokens")
    _, _, launch, numbers = trtp.plugins["stylefast::shared_attention"]["aot_impl"](*given, given[:1], 1)
    assert launch.grid_x.value == "(((tokens cdiv 64) * rows) * 10)"
    assert [number.value for number in numbers.items] == ["rows", "tokens", 10, 1]
    assert compiler.asked[0][-1]["even"] == 0


def test_layers_of_equal_shape_share_one_compile_and_tactics_do_not(tensorrt):
    trt, trtp = tensorrt
    compiler = Compiler()
    register_plugin(trt, "sm89", configs=[{"block_m": 64}, {"block_m": 128}], compiler=compiler)
    given = tensors(trt, "shared_attention")
    for tactic in (1, 1, 2, 1, 2):
        trtp.plugins["stylefast::shared_attention"]["aot_impl"](*given, given[:1], tactic)
    assert [more["config"]["block_m"] for *_, more in compiler.asked] == [64, 128]


def test_registering_twice_does_nothing_and_for_another_chip_is_an_error(tensorrt):
    trt, _ = tensorrt
    compiler = Compiler()
    register_plugin(trt, "sm89", compiler=compiler)
    register_plugin(trt, "sm89", compiler=compiler)
    with pytest.raises(ExportError, match="already registered for sm89"):
        register_plugin(trt, "sm120", compiler=compiler)


def test_queries_of_a_type_without_a_kernel_are_an_error(tensorrt):
    trt, trtp = tensorrt
    register_plugin(trt, "sm89", compiler=Compiler())
    given = tensors(trt, "shared_attention", "INT64")
    with pytest.raises(ExportError, match="FP16, BF16, FP32"):
        trtp.plugins["stylefast::shared_attention"]["autotune"](*given, given[:1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device names its chip")
def test_without_a_gpu_the_chip_must_be_named(tensorrt):
    with pytest.raises(ExportError, match="name the chip"):
        register_plugin(tensorrt[0])


def test_a_tensorrt_without_plugins_compiled_ahead_says_what_to_use():
    with pytest.raises(EngineMismatch, match='old 8.6 .*attention="standard"'):
        old = ModuleType("old")
        old.__version__ = "8.6"
        plugin_api(old)


def test_tensorrt_rtx_has_no_plugins_compiled_ahead():
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx package")
    with pytest.raises(EngineMismatch, match='tensorrt_rtx .*attention="standard"'):
        plugin_api(rtx)


def test_a_missing_tensorrt_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match="tensorrt 10.9 or later"):
        register_plugin(chip="sm89")


# ONNX


class Layer(nn.Module):
    def forward(self, *inputs):
        q, k, v, page, mode, scale, shift, *rest = inputs
        affine = Affine(*rest[:2]) if rest else None
        return shared_attention(q, k, v, page, mode, scale, shift, affine, *rest[2:])


def _inputs(banked=True, references=1, d=32, adain=True):
    """A layer's inputs by name, with rows of every mode."""
    rows, tokens, heads, pages = 4, 15, 2, 3
    page = torch.tensor([[-1], [0], [0], [rows if banked else 2]])[:, :references]
    values = [torch.randn(rows, tokens, heads, d) for _ in range(3)] + [page, torch.tensor([0, 1, 2, 1])]
    values += [torch.full((rows, references), 1.2), torch.full((rows, references), 0.3)]
    values += [torch.rand(3, rows, heads, d) + 0.5, torch.rand(3, rows, heads, d)] * adain
    values += [torch.randn(pages, tokens, heads, d) for _ in range(2)] * banked
    return dict(zip(PLUGINS["shared_attention_banked"], values))


def _model(inputs, operations=PluginOperations):
    """A layer's ONNX graph."""
    program = torch.export.export(Layer().eval(), tuple(inputs.values()), strict=False)
    described = [Tensor(name, x.dtype, tuple(x.shape)) for name, x in inputs.items()]
    output = Tensor("output", torch.float32, tuple(inputs["q"].shape))
    return onnx_writer.onnx_model(program, described, output, 20, operations=operations)


@pytest.mark.parametrize("banked", [False, True], ids=["live", "banked"])
def test_a_layer_becomes_one_node_that_tensorrts_parser_finds_the_plugin_by(banked):
    onnx = pytest.importorskip("onnx", reason="needs the onnx package")
    ir = pytest.importorskip("onnx_ir", reason="needs the onnx_ir package")
    inputs = _inputs(banked)
    proto = ir.to_proto(_model(inputs))
    onnx.checker.check_model(proto)
    plugin = "shared_attention_banked" if banked else "shared_attention"
    (node,) = [node for node in proto.graph.node if node.domain == "stylefast"]
    assert node.op_type == plugin and list(node.output) == ["output"]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"plugin_namespace": b"stylefast", "plugin_version": b"1", "aot": 1}

    # page and mode come through casts to int32
    casts = {cast.output[0]: cast for cast in proto.graph.node if cast.op_type == "Cast"}
    assert len(proto.graph.node) == 3 and len(casts) == 2
    assert all(onnx.helper.get_attribute_value(cast.attribute[0]) == onnx.TensorProto.INT32 for cast in casts.values())
    assert [casts[x].input[0] if x in casts else x for x in node.input] == list(inputs) == list(PLUGINS[plugin])


def test_a_layer_without_references_stays_in_standard_operators():
    pytest.importorskip("onnx_ir", reason="needs the onnx_ir package")
    nodes, standard = (
        [node.op_type for node in _model(_inputs(False, references=0), operations).graph]
        for operations in (PluginOperations, OnnxOperations)
    )
    assert nodes == standard and "Softmax" in nodes


@pytest.mark.parametrize(
    "more, words",
    [({"d": 48}, "48 channels"), ({"adain": False}, "gain and offset")],
    ids=["heads of no known size", "no AdaIN"],
)
def test_a_layer_is_refused_with(more, words):
    pytest.importorskip("onnx_ir", reason="needs the onnx_ir package")
    with pytest.raises(ExportError, match=words):
        _model(_inputs(False, **more))


def test_the_parser_of_tensorrt_stops_at_nothing_but_the_plugin_that_is_not_registered():
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx package")
    ir = pytest.importorskip("onnx_ir", reason="needs the onnx_ir package")
    logger = rtx.Logger(rtx.Logger.INTERNAL_ERROR)
    builder = rtx.Builder(logger)
    network = builder.create_network(0)
    parser = rtx.OnnxParser(network, logger)
    assert not parser.parse(ir.to_proto(_model(_inputs())).SerializeToString())
    (error,) = [parser.get_error(i) for i in range(parser.num_errors)]
    assert error.node_operator() == "shared_attention_banked" and "Plugin not found" in error.desc()


@pytest.mark.gpu
def test_an_engine_with_the_plugin_computes_what_the_layer_does():
    trt = pytest.importorskip("tensorrt", reason="needs the tensorrt package")
    ir = pytest.importorskip("onnx_ir", reason="needs the onnx_ir package")
    register_plugin(trt)
    inputs = _inputs()
    exact = Layer()(*inputs.values())
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(ir.to_proto(_model(inputs)).SerializeToString())
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    bound = {name: x.cuda().contiguous() for name, x in inputs.items()}
    bound["output"] = torch.full_like(bound["q"], float("nan"))
    for name, x in bound.items():
        assert context.set_tensor_address(name, x.data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    assert (bound["output"].cpu() - exact).abs().max().item() < 1e-4
