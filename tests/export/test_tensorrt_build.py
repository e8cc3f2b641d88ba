"""Real TensorRT-RTX engines of small graphs, built without a GPU."""

import errno
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, StyleFastError
from stylefast.export import tensorrt_build
from stylefast.export.tensorrt import forwarder, load_package, open_engine, plan_header, read_layers, writing
from stylefast.export.tensorrt_build import build_engine
from stylefast.whole_files import write_whole

onnx = pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx")

HEADS, D = 2, 64
SHAPES = {name: ((1, HEADS, 16, D), (2, HEADS, 64, D), (4, HEADS, 128, D)) for name in "qkv"}
SHAPES |= {"mask": ((1, 1, 1, 16), (2, 1, 1, 64), (4, 1, 1, 128))}


def projection(kind=np.float16):
    return np.random.default_rng(0).standard_normal((D, D)).astype(kind)


def attention(path, kind=np.float16, external=False, op="Softmax"):
    """An attention with a mask, and a projection after it, as an ONNX file."""
    helper, number = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))

    def dims(name):
        return ["rows", 1, 1, "tokens"] if name == "mask" else ["rows", HEADS, "tokens", D]

    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["products"]),
        helper.make_node("Add", ["products", "mask"], ["scores"]),
        helper.make_node(op, ["scores"], ["weights"], name="attend", **({"axis": -1} if op == "Softmax" else {})),
        helper.make_node("MatMul", ["weights", "v"], ["found"]),
        helper.make_node("MatMul", ["found", "weight"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, number, dims(name)) for name in ("q", "k", "v", "mask")],
        [helper.make_tensor_value_info("out", number, dims("out"))],
        [onnx.numpy_helper.from_array(projection(kind), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save_model(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path


def left(folder):
    return sorted(file.name for file in folder.iterdir())


def test_one_engine_is_built_for_two_chips_with_its_attention_fused(tmp_path):
    graph, told = attention(tmp_path / "a.onnx", external=True), []
    report = build_engine(
        graph, tmp_path / "a.engine", ["sm89", "sm120"], [SHAPES], progress=lambda *state: told.append(state)
    )
    assert left(tmp_path) == ["a.engine", "a.onnx", "a.onnx.data"]
    assert report.bytes == (tmp_path / "a.engine").stat().st_size
    package, version, least = plan_header((tmp_path / "a.engine").read_bytes())
    assert (package, version) == (report.package, report.version) and least <= report.bytes
    assert report.network.attentions == report.layers.fused_attentions == 1
    assert report.network.plugins == report.layers.plugins == ()
    assert report.network.inputs[3] == ("mask", "HALF", (-1, 1, 1, -1))
    assert report.network.outputs == (("out", "HALF", (-1, HEADS, -1, D)),)
    assert report.layers.kernels >= 2 and report.peak_memory > 2**20
    assert told and all(0 <= done <= total and phase for done, total, phase in told)
    assert report.to_dict()["path"] == "a.engine" and report.to_dict()["layers"]["kernels"] == report.layers.kernels


def test_an_attention_in_float32_is_seen_not_to_be_fused(tmp_path):
    report = build_engine(attention(tmp_path / "a.onnx", np.float32), tmp_path / "a.engine", ["sm89"], [SHAPES])
    assert (report.network.attentions, report.layers.fused_attentions) == (1, 0)


def test_profiles_each_have_kernels_of_their_own(tmp_path):
    larger = {name: tuple((r, h, 4 * t, d) for r, h, t, d in SHAPES[name]) for name in "qkv"}
    larger["mask"] = tuple((r, h, q, 4 * t) for r, h, q, t in SHAPES["mask"])
    report = build_engine(attention(tmp_path / "a.onnx"), tmp_path / "a.engine", ["sm86"], [SHAPES, larger])
    assert report.layers.fused_attentions == 2


def test_a_timing_cache_is_written_read_and_if_damaged_made_anew(tmp_path, caplog):
    graph, cache = attention(tmp_path / "a.onnx"), tmp_path / "timing.cache"

    def again():
        return build_engine(graph, tmp_path / "a.engine", ["sm89"], [SHAPES], timing_cache=cache).timing_cache

    assert not again()
    written = cache.read_bytes()
    assert again()
    cache.write_bytes(b"no cache at all" * 20)
    with caplog.at_level(logging.WARNING, "stylefast.export.tensorrt"):
        assert not again()
    assert "made anew" in caplog.text
    assert cache.read_bytes() == written


def test_a_node_that_tensorrt_does_not_have_is_named(tmp_path):
    graph = attention(tmp_path / "a.onnx", op="NoSuchOperator")
    with pytest.raises(ExportError, match="NoSuchOperator 'attend'"):
        build_engine(graph, tmp_path / "a.engine", ["sm89"], [SHAPES])
    assert left(tmp_path) == ["a.onnx"]


def test_missing_graphs_and_missing_external_data_are_refused(tmp_path):
    with pytest.raises(ExportError, match="there is no graph at"):
        build_engine(tmp_path / "b.onnx", tmp_path / "b.engine", ["sm89"], [SHAPES])
    graph = attention(tmp_path / "a.onnx", external=True)
    (tmp_path / "a.onnx.data").unlink()
    with pytest.raises(ExportError, match=r"a\.onnx"):
        build_engine(graph, tmp_path / "a.engine", ["sm89"], [SHAPES])
    (tmp_path / "a.onnx").write_bytes(b"\x08\x0anonsense")
    with pytest.raises(ExportError, match=r"can't read a\.onnx"):
        build_engine(graph, tmp_path / "a.engine", ["sm89"], [SHAPES])
    assert left(tmp_path) == ["a.onnx"]


@pytest.mark.parametrize(
    ("profiles", "named"),
    [
        ([], "may vary"),
        ([{name: SHAPES[name] for name in "qkv"}], "says nothing of mask"),
        ([SHAPES | {"pages": SHAPES["q"]}], "has pages"),
        ([SHAPES | {"q": SHAPES["q"][::-1]}], "dimension 0 of q goes from 4 by 2 to 1"),
        ([SHAPES, SHAPES | {"q": SHAPES["q"][:2]}], "profile 1: q takes three shapes"),
        ([SHAPES | {"q": tuple((r, 3, t, d) for r, _, t, d in SHAPES["q"])}], "dimension 1 of q is 2 in the graph"),
    ],
)
def test_profiles_that_do_not_fit_the_graph_are_refused(tmp_path, profiles, named):
    with pytest.raises(InvalidRequest, match=named):
        build_engine(attention(tmp_path / "a.onnx"), tmp_path / "a.engine", ["sm89"], profiles)
    assert left(tmp_path) == ["a.onnx"]


def test_a_build_that_fails_tells_the_builders_last_lines(tmp_path):
    with pytest.raises(ExportError, match="could not build the engine: .*workspace limit"):
        build_engine(attention(tmp_path / "a.onnx"), tmp_path / "a.engine", ["sm89"], [SHAPES], memory_limit=2**10)
    assert left(tmp_path) == ["a.onnx"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_build_leaves_what_was_there(tmp_path, error):
    def interrupt(done, total, phase):
        raise error

    (tmp_path / "a.engine").write_bytes(b"older")
    with pytest.raises(error):
        build_engine(attention(tmp_path / "a.onnx"), tmp_path / "a.engine", ["sm89"], [SHAPES], progress=interrupt)
    assert left(tmp_path) == ["a.engine", "a.onnx"]
    assert (tmp_path / "a.engine").read_bytes() == b"older"


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed, most likely as memory ran out"),
        ("import sys; print('the ground shook', file=sys.stderr); sys.exit(7)", "ended with 7: the ground shook"),
        ('import sys; print(\'{"oserror": [28, "no space"]}\'); sys.stdout.flush()', "disk of .* is full"),
    ],
)
def test_a_builder_that_dies_is_an_error_that_says_how(tmp_path, monkeypatch, code, named):
    monkeypatch.setattr(tensorrt_build, "_START", code)
    with pytest.raises(ExportError, match=named):
        build_engine(attention(tmp_path / "a.onnx"), tmp_path / "a.engine", ["sm89"], [SHAPES])
    assert left(tmp_path) == ["a.onnx"]


def test_a_full_disk_and_a_missing_folder_leave_nothing(tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="can't be written"):
        build_engine(attention(tmp_path / "a.onnx"), tmp_path / "none" / "a.engine", ["sm89"], [SHAPES])
    (tmp_path / "b").write_bytes(b"older")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ExportError, match="is full; b was not written"), writing(tmp_path / "b"):
        write_whole(tmp_path / "b", b"newer")
    assert (tmp_path / "b").read_bytes() == b"older" and left(tmp_path) == ["a.onnx", "b"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is allowed")
def test_a_refittable_engine_is_refused_before_any_work(tmp_path):
    with pytest.raises(EngineMismatch, match="takes a GPU"):
        build_engine(attention(tmp_path / "a.onnx"), tmp_path / "a.engine", ["sm89"], [SHAPES], refittable=True)


def test_a_listing_of_layers_is_counted_by_kind():
    listing = """Layers:
Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: []
Name: __mye1_myl1_1, LayerType: wait, Inputs: [ { Name: x, Dimensions: [-1] }], Outputs: []
Name: _gemm_mha_v2_myl1_8, LayerType: kgen, Inputs: [ { Name: y, Dimensions: [-1] }], TacticName: _gemm_mha_v2_0x1
Name: node_MatMul_9+node_MatMul_10_myl1_9, LayerType: gemm, Inputs: []
Name: styled, LayerType: PluginV3, Inputs: []
"""
    found = read_layers(listing)
    assert found.kinds == {"ShapeHostToDevice": 1, "wait": 1, "kgen": 1, "gemm": 1, "PluginV3": 1}
    assert (found.fused_attentions, found.kernels, found.plugins) == (1, 4, ("styled",))
    assert read_layers("Engine generation completed in 2 seconds.") is None


def test_the_building_process_imports_no_pytorch():
    program = "import sys, stylefast.export.tensorrt_build; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_building_process_is_told_to_register_the_plugins(tmp_path):
    # tensorrt_rtx has none, and its process says so
    with pytest.raises(StyleFastError, match="plugin"):
        build_engine(attention(tmp_path / "a.onnx"), tmp_path / "a.engine", ["sm89"], [SHAPES], plugins=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it opens")
def test_a_real_engine_on_a_machine_without_a_gpu_is_refused_with_the_reason(tmp_path):
    build_engine(attention(tmp_path / "a.onnx"), tmp_path / "a.engine", ["sm89"], [SHAPES])
    trt = load_package("tensorrt_rtx")
    with pytest.raises(EngineMismatch, match=r"a\.engine can't run .* on a machine without a GPU"):
        open_engine(trt, forwarder(trt), tmp_path / "a.engine")
    (tmp_path / "a.engine").write_bytes((tmp_path / "a.engine").read_bytes()[:-300])
    with pytest.raises(ExportError, match="truncated"):
        open_engine(trt, forwarder(trt), tmp_path / "a.engine")
