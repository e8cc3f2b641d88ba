"""ONNX Runtime on torch tensors: every type and shape where it lies, and errors that say what is wrong."""

import sys

import pytest
import torch

from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, MissingDependency, OutOfMemory
from stylefast.export.sessions import OrtSession
from tests.support.fp64 import close, measured

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

WIDTH = 300
TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16, torch.int64: 7, torch.bool: 9}


def save(path, nodes, inputs, outputs, weights=(), opset=20, ir=10):
    """Write a graph; inputs and outputs are (name, torch type, dims), weights go to a file beside it."""

    def info(name, dtype, dims):
        return onnx.helper.make_tensor_value_info(name, TYPES[dtype], dims)

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, sources, targets, **attributes) for op, sources, targets, attributes in nodes],
        "graph",
        [info(*one) for one in inputs],
        [info(*one) for one in outputs],
        [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in weights],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=ir)
    onnx.save(model, path, save_as_external_data=bool(weights), location=f"{path.name}.data", size_threshold=0)
    return path


@pytest.fixture
def product(tmp_path):
    """y = a @ w [rows, WIDTH], and w."""
    weight = torch.randn(WIDTH, WIDTH)
    path = save(
        tmp_path / "product.onnx",
        [("MatMul", ["a", "w"], ["y"], {})],
        [("a", torch.float32, ["rows", WIDTH])],
        [("y", torch.float32, ["rows", WIDTH])],
        [("w", weight)],
    )
    return path, weight


def copier(path, dtype, dims=("rows", "columns")):
    return save(path, [("Identity", ["x"], ["y"], {})], [("x", dtype, dims)], [("y", dtype, dims)])


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (0, 4), (7, 0)], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_tensors_of_every_type_and_shape_go_in_and_out(tmp_path, dtype, shape):
    session = OrtSession(copier(tmp_path / "copy.onnx", dtype))
    x = (4 * torch.randn(shape)).to(dtype)
    given = torch.zeros(shape, dtype=dtype)
    assert session.run({"x": x}, {"y": given})["y"] is given and torch.equal(given, x)
    made = session.run({"x": x})["y"]
    assert made.dtype == dtype and torch.equal(made, x)


def test_outputs_are_written_where_they_are_wanted_however_many_rows(product):
    path, weight = product
    session = OrtSession(path, threads=1)
    for rows in (1, 4, 2, 9):
        a, y = torch.randn(rows, WIDTH), torch.full((rows, WIDTH), torch.nan)
        session.run({"a": a}, {"y": y})
        close(y, measured(torch.matmul, a, weight))


def test_threads_of_the_runtime_spin_shortly_while_they_wait(product):
    options = OrtSession(product[0])._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == "30"


def test_inputs_that_are_not_contiguous_are_read_right(product):
    path, weight = product
    a = torch.randn(WIDTH, 6)
    y = OrtSession(path).run({"a": a[:, ::2].T})["y"]
    close(y, measured(torch.matmul, a[:, ::2].T, weight))


def test_an_output_whose_shape_follows_from_values_is_made_by_the_runtime(tmp_path):
    path = save(
        tmp_path / "nonzero.onnx",
        [("NonZero", ["x"], ["y"], {})],
        [("x", torch.float32, ["rows"])],
        [("y", torch.int64, [1, "found"])],
    )
    assert OrtSession(path).run({"x": torch.tensor([0.0, 2.0, 0.0, 3.0])})["y"].tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("inputs", "outputs", "error", "message"),
    [
        ({}, {}, InvalidRequest, "needs input 'a'; its inputs are a"),
        ({"a": (2, WIDTH), "b": (1,)}, {}, InvalidRequest, "has no input 'b'"),
        ({"a": (2, WIDTH - 1)}, {}, EngineMismatch, r"shape \[2, 299\].*exported for \['rows', 300\]"),
        ({"a": (2, 1, WIDTH)}, {}, EngineMismatch, r"shape \[2, 1, 300\]"),
        ({"a": (2, WIDTH)}, {"z": (2, WIDTH)}, InvalidRequest, "no output 'z'; it has y"),
        ({"a": (2, WIDTH)}, {"y": (3, WIDTH)}, InvalidRequest, r"it must be float32 \[2, 300\] on cpu"),
    ],
    ids=["missing", "unknown", "width", "dimensions", "unknown output", "output's shape"],
)
def test_tensors_that_do_not_fit_are_refused(product, inputs, outputs, error, message):
    session = OrtSession(product[0])
    with pytest.raises(error, match=message):
        session.run(*({name: torch.zeros(shape) for name, shape in part.items()} for part in (inputs, outputs)))


def test_other_types_and_outputs_that_are_not_contiguous_are_refused(product):
    session = OrtSession(product[0])
    with pytest.raises(EngineMismatch, match="input a is float16.*exported for float32"):
        session.run({"a": torch.zeros(2, WIDTH, dtype=torch.float16)})
    with pytest.raises(InvalidRequest, match="not contiguous"):
        session.run({"a": torch.zeros(2, WIDTH)}, {"y": torch.zeros(WIDTH, 2).T})
    with pytest.raises(InvalidRequest, match="on meta"):
        session.run({"a": torch.zeros(2, WIDTH, device="meta")})


def test_dimensions_of_one_name_must_agree(tmp_path):
    sides = [("a", torch.float32, ["rows", 2]), ("b", torch.float32, ["rows", 2])]
    path = save(tmp_path / "sum.onnx", [("Add", ["a", "b"], ["y"], {})], sides, [("y", torch.float32, ["rows", 2])])
    with pytest.raises(EngineMismatch, match=r"input b has shape \[1, 2\].*with rows=3"):
        OrtSession(path).run({"a": torch.zeros(3, 2), "b": torch.zeros(1, 2)})


DAMAGES = {
    "no file": (lambda path, data: path.unlink(), ExportError, "there is no graph at"),
    "half a file": (lambda path, data: path.write_bytes(path.read_bytes()[:60]), ExportError, "truncated or damaged"),
    "an empty file": (lambda path, data: path.write_bytes(b""), ExportError, "truncated or damaged"),
    "another file": (lambda path, data: path.write_bytes(b"no graph " * 9), ExportError, "truncated or damaged"),
    "no data": (lambda path, data: data.unlink(), ExportError, "external data is missing or truncated"),
    "half of the data": (
        lambda path, data: data.write_bytes(data.read_bytes()[:999]),
        ExportError,
        "external data is missing or truncated",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_a_typed_error_of_one_line(product, damage, capfd):
    path, _ = product
    do, error, message = DAMAGES[damage]
    do(path, path.with_name("product.onnx.data"))
    with pytest.raises(error, match=message) as caught:
        OrtSession(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("version", [{"opset": 99}, {"ir": 99}], ids=str)
def test_a_graph_of_a_later_version_is_no_match(tmp_path, version):
    sides = [("x", torch.float32, [2])], [("y", torch.float32, [2])]
    path = save(tmp_path / "later.onnx", [("Identity", ["x"], ["y"], {})], *sides, **version)
    with pytest.raises(EngineMismatch, match="this onnxruntime can't run later.onnx.*lower opset"):
        OrtSession(path)


def test_an_operator_without_a_kernel_in_that_type_is_no_match(tmp_path):
    sides = [("x", torch.bfloat16, [2, 2])], [("y", torch.bfloat16, [2, 2])]
    path = save(tmp_path / "bf16.onnx", [("Gemm", ["x", "x"], ["y"], {})], *sides)
    with pytest.raises(EngineMismatch, match="lacks on this device.*export in another type"):
        OrtSession(path)


def test_what_fails_in_a_run_is_a_typed_error(tmp_path):
    nodes = [("Reshape", ["x", "shape"], ["y"], {})]
    sides = [("x", torch.float32, ["n"]), ("shape", torch.int64, [1])]
    session = OrtSession(save(tmp_path / "reshape.onnx", nodes, sides, [("y", torch.float32, ["m"])]))
    with pytest.raises(ExportError, match="reshape.onnx failed: .*[Rr]eshape") as caught:
        session.run({"x": torch.zeros(3), "shape": torch.tensor([4])})
    assert not isinstance(caught.value, OutOfMemory)
    assert session.run({"x": torch.zeros(3), "shape": torch.tensor([3])})["y"].shape == (3,)


def test_want_of_memory_is_told_as_such(tmp_path):
    nodes = [("Expand", ["x", "shape"], ["y"], {})]
    sides = [("x", torch.float32, ["n"]), ("shape", torch.int64, [2])]
    session = OrtSession(save(tmp_path / "expand.onnx", nodes, sides, [("y", torch.float32, ["a", "b"])]))
    with pytest.raises(OutOfMemory, match="expand.onnx ran out of memory"):
        session.run({"x": torch.zeros(1), "shape": torch.tensor([2**22, 2**22])})


def test_a_closed_session_says_so(product):
    session = OrtSession(product[0])
    session.close()
    session.close()
    with pytest.raises(ExportError, match="was closed"):
        session.run({"a": torch.zeros(1, WIDTH)})


def test_cuda_needs_a_runtime_that_has_it(product):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(MissingDependency, match="onnxruntime-gpu.*device='cpu'"):
        OrtSession(product[0], "cuda:0")
    with pytest.raises(InvalidRequest, match="'mps'"):
        OrtSession(product[0], "mps")


def test_without_onnxruntime_the_extra_is_named(product, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match=r"pip install 'stylefast\[export\]'"):
        OrtSession(product[0])


@pytest.mark.gpu
def test_on_a_gpu_tensors_stay_there_and_streams_wait_for_one_another(product):
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    path, weight = product
    session, weight = OrtSession(path, "cuda:0"), weight.cuda()
    y = torch.empty(2000, WIDTH, device="cuda")
    for _ in range(20):
        a = torch.randn(2000, WIDTH, device="cuda")
        # written right before and read right after, on a stream that the session does not know
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            a = a * 2 - 1
            session.run({"a": a}, {"y": y})
            found = y.clone()
        torch.cuda.current_stream().wait_stream(side)
        torch.testing.assert_close(found, a @ weight, rtol=2e-2, atol=2e-2)
    session.close()
