"""Shared attention as a TensorRT plugin: its PTX, what it registers, and its nodes in ONNX."""

import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, MissingDependency
from stylefast.export import onnx_writer, tensorrt_plugin
from stylefast.export.onnx_operations import OnnxOperations
from stylefast.export.tensorrt_plugin import PLUGINS, PluginOperations, plugin_api, register_plugin
from stylefast.export.triton_ptx import CompiledKernel, compile_ptx, without_scratch
from stylefast.export.unet_graph import Tensor
from stylefast.kernels.shared_attention import Affine, shared_attention
from tests.export.tensorrt_stand_in import TensorDesc, stand_in

SIZES = {"shared_attention": 4, "shared_attention_banked": 6}  # whole numbers between inputs and output

# in a process of its own, as kernels are interpreted in this one; the bundled assembler stands for the driver's
COMPILE = """
import json, re, subprocess, tempfile
from pathlib import Path
import torch, triton
from stylefast.export.triton_ptx import compile_ptx

tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

def assembled(kernel):
    target = re.search(r"[.]target (\\S+)", kernel.ptx)[1]
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(kernel.ptx)
        file.flush()
        command = [tools / "ptxas", "-v", "--gpu-name", target, file.name, "-o", file.name + ".cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    Path(file.name + ".cubin").unlink(missing_ok=True)
    return done.returncode, done.stderr

found = {}
for case, (chip, dtype, d, more) in json.loads(input()).items():
    try:
        kernel = compile_ptx(chip, getattr(torch, dtype), d, **more)
    except Exception as error:
        found[case] = {"error": type(error).__name__, "message": str(error)}
        continue
    code, said = assembled(kernel)
    fields = {name: getattr(kernel, name) for name in kernel.__dataclass_fields__}
    found[case] = fields | {"code": code, "said": said}
print(json.dumps(found))
"""
CASES = {
    **{f"{chip} banked": (chip, "float16", 64, {"banked": True, "even": 1024}) for chip in
       ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")},
    "live, two parts": ("sm89", "bfloat16", 64, {"parts": 2}),
    "fp32, odd heads": ("sm89", "float32", 40, {"banked": True}),
    "little shared memory": ("sm89", "float16", 64, {"even": 1024, "shared_limit": 24 * 1024}),
    "no shared memory": ("sm89", "float16", 64, {"shared_limit": 100}),
    "an older PTX": ("sm89", "float16", 64, {"ptx_version": 86}),
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(checkout):
    pytest.importorskip("triton", reason="needs the triton package")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(checkout)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], input=json.dumps(CASES), capture_output=True, text=True, env=environment,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# PTX


@pytest.mark.parametrize("chip", ["sm80", "sm86", "sm89", "sm90", "sm100", "sm120"])
def test_ptx_of_sdxls_heads_assembles_without_spilling_for(compiled, chip):
    kernel = compiled[f"{chip} banked"]
    assert kernel["code"] == 0, kernel["said"]
    assert "0 bytes stack frame" in kernel["said"] and "0 bytes spill stores" in kernel["said"]
    assert f".target {chip.replace('sm', 'sm_')}" in kernel["ptx"]
    assert f".reqntid {32 * kernel['warps']}" in kernel["ptx"]
    assert 0 < kernel["shared"] <= 48 * 1024


def test_the_entry_takes_inputs_then_numbers_then_the_output_and_nothing_else(compiled):
    kernel = compiled["sm89 banked"]
    numbers = ["rows", "tokens", "heads", "references", "pages", "page_tokens"]
    assert kernel["arguments"] == [*PLUGINS["shared_attention_banked"], *numbers, "out"]
    head = kernel["ptx"].split(f".entry {kernel['name']}(")[1].split(")")[0]
    kinds = [line.split()[1] for line in head.strip().split(",\n")]
    assert kinds == [".u64"] * 11 + [".u32"] * 6 + [".u64"]


def test_a_live_kernel_has_no_arguments_for_a_pool(compiled):
    kernel = compiled["live, two parts"]
    assert kernel["code"] == 0, kernel["said"]
    numbers = ["rows", "tokens", "heads", "references"]
    assert kernel["arguments"] == [*PLUGINS["shared_attention"], *numbers, "out"]


def test_fp32_and_heads_of_40_channels_compile(compiled):
    assert compiled["fp32, odd heads"]["code"] == 0, compiled["fp32, odd heads"]["said"]


def test_a_lower_limit_of_shared_memory_takes_fewer_stages_or_smaller_tiles(compiled):
    kernel, usual = compiled["little shared memory"], compiled["sm89 banked"]
    assert kernel["shared"] <= 24 * 1024 < usual["shared"]
    assert kernel["config"] != usual["config"] and kernel["block_m"] == kernel["config"]["block_m"]


def test_a_limit_that_nothing_fits_is_an_error_that_names_both(compiled):
    found = compiled["no shared memory"]
    assert found["error"] == "ExportError" and "the limit is 100" in found["message"]


def test_the_version_of_ptx_is_that_asked_for(compiled):
    assert ".version 8.8" in compiled["sm89 banked"]["ptx"] and ".version 8.6" in compiled["an older PTX"]["ptx"]


def test_ptx_names_no_files_of_the_machine_that_compiled_it(compiled, checkout):
    assert all(str(checkout) not in kernel["ptx"] for kernel in compiled.values() if "ptx" in kernel)


@pytest.mark.parametrize(
    "arguments, more, error, words",
    [
        (("sm75", torch.float16, 64), {}, EngineMismatch, "7.5"),
        (("hopper", torch.float16, 64), {}, InvalidRequest, "hopper"),
        (("sm89", torch.float64, 64), {}, InvalidRequest, "float64"),
        (("sm89", torch.float16, 48), {}, InvalidRequest, "48 channels"),
        (("sm89", torch.float16, 64), {"parts": 4}, InvalidRequest, "parts is 4"),
        (("sm89", torch.float16, 64), {"even": -1}, InvalidRequest, "even is -1"),
    ],
    ids=["an old chip", "no chip", "fp64", "heads of no known size", "four parts", "a negative divisor"],
)
def test_ptx_is_refused_for(arguments, more, error, words):
    with pytest.raises(error, match=words):
        compile_ptx(*arguments, **more)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
def test_interpreted_kernels_have_no_ptx():
    with pytest.raises(ExportError, match="TRITON_INTERPRET"):
        compile_ptx("sm89", torch.float16, 64)


ENTRY = ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 f_param_1\n)\n{{ ld.param.b64 %a, [{}]; }}"


def test_unread_parameters_go():
    assert "f_param_1" not in without_scratch(ENTRY.format("f_param_0"), "f", 1)


@pytest.mark.parametrize(
    "ptx, count, words",
    [(ENTRY.format("f_param_1"), 1, "scratch memory f_param_1"), (ENTRY, 3, "declares 2"), ("", 1, "no entry f")],
    ids=["read", "missing", "of another kernel"],
)
def test_parameters_are_an_error_that_are(ptx, count, words):
    with pytest.raises(ExportError, match=words):
        without_scratch(ptx, "f", count)


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


def _model(banked, references=1, d=32, operations=PluginOperations, adain=True):
    """A layer's ONNX graph, and the names of its inputs."""
    rows, tokens, heads, pages = 4, 15, 2, 3
    own = [torch.randn(rows, tokens, heads, d) for _ in range(3)]
    tables = [torch.full((rows, references), -1), torch.ones(rows, dtype=torch.int64)]
    tables += [torch.ones(rows, references), torch.zeros(rows, references)]
    inputs = own + tables + [torch.ones(3, rows, heads, d), torch.zeros(3, rows, heads, d)] * adain
    inputs += [torch.randn(pages, tokens, heads, d) for _ in range(2)] * banked
    names = PLUGINS["shared_attention_banked"][: len(inputs)]
    program = torch.export.export(Layer().eval(), tuple(inputs), strict=False)
    described = [Tensor(name, x.dtype, tuple(x.shape)) for name, x in zip(names, inputs)]
    output = Tensor("output", torch.float32, tuple(own[0].shape))
    return onnx_writer.onnx_model(program, described, output, 20, operations=operations), names


@pytest.mark.parametrize("banked", [False, True], ids=["live", "banked"])
def test_a_layer_becomes_one_node_that_tensorrts_parser_finds_the_plugin_by(banked):
    onnx = pytest.importorskip("onnx", reason="needs the onnx package")
    ir = pytest.importorskip("onnx_ir", reason="needs the onnx_ir package")
    model, names = _model(banked)
    proto = ir.to_proto(model)
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
    assert [casts[x].input[0] if x in casts else x for x in node.input] == list(names) == list(PLUGINS[plugin])


def test_a_layer_without_references_stays_in_standard_operators():
    pytest.importorskip("onnx_ir", reason="needs the onnx_ir package")
    nodes, standard = (
        [node.op_type for node in _model(False, references=0, operations=operations)[0].graph]
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
        _model(False, **more)
