"""New weights for engines that are stood in for on the CPU, and for a real one where there is a GPU."""

import json

import numpy as np
import pytest
import torch

from stylefast.errors import EngineMismatch, ExportError, InvalidRequest
from stylefast.export.tensorrt import package_of, present_target, refit
from stylefast.export.tensorrt_build import build_engine
from tests.export.fake_tensorrt import fake_tensorrt, plan

WEIGHTS = {"w": [1.0, 2.0, 3.0], "b": [4.0]}


@pytest.fixture
def engine_file(tmp_path):
    (tmp_path / "a.engine").write_bytes(plan(weights=WEIGHTS, refittable=True))
    return tmp_path / "a.engine"


def weights_of(path):
    return json.loads(path.read_bytes()[32:])["weights"]


def test_weights_by_name_go_into_the_engine_and_others_stay(engine_file, tmp_path):
    new = torch.tensor([[5.0, 6.0, 7.0]]).T  # not contiguous, and of another shape with as many elements
    assert refit(engine_file, {"w": new}, tmp_path / "b.engine", trt=fake_tensorrt()) == ("w", "b")
    assert weights_of(tmp_path / "b.engine") == {"w": [5.0, 6.0, 7.0], "b": [4.0]}
    assert weights_of(engine_file) == WEIGHTS
    refit(engine_file, {"b": torch.tensor([8.0])}, trt=fake_tensorrt())
    assert weights_of(engine_file) == WEIGHTS | {"b": [8.0]}


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"v": torch.zeros(3)}, "no weights 'v'; it has 2, such as 'w'"),
        ({"w": torch.zeros(4)}, "w takes 3 elements"),
        ({"w": torch.zeros(3).half()}, "not 3 of torch.float16"),
        ({"w": torch.zeros(3, dtype=torch.int64)}, "torch.int64"),
    ],
)
def test_weights_that_do_not_fit_leave_the_engine_as_it_was(engine_file, weights, named):
    before = engine_file.read_bytes()
    with pytest.raises(InvalidRequest, match=named):
        refit(engine_file, weights, trt=fake_tensorrt())
    assert engine_file.read_bytes() == before


def test_weights_that_others_hang_on_are_named(tmp_path):
    (tmp_path / "a.engine").write_bytes(plan(weights=WEIGHTS, refittable=True, tied=["w", "b"]))
    with pytest.raises(ExportError, match="others must change too: b"):
        refit(tmp_path / "a.engine", {"w": torch.zeros(3)}, trt=fake_tensorrt())


def test_an_engine_that_was_not_built_for_it_is_refused(tmp_path):
    (tmp_path / "a.engine").write_bytes(plan(weights=WEIGHTS))
    with pytest.raises(EngineMismatch, match="refittable=True"):
        refit(tmp_path / "a.engine", {"w": torch.zeros(3)}, trt=fake_tensorrt())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs")
def test_a_machine_without_a_gpu_says_so(engine_file):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineMismatch, match="on a GPU"):
        refit(engine_file, {"w": torch.zeros(3)})


def test_a_missing_graph_of_new_weights_is_refused(engine_file, tmp_path):
    with pytest.raises(ExportError, match="there is no graph at"):
        refit(engine_file, tmp_path / "b.onnx", trt=fake_tensorrt())


@pytest.mark.gpu
def test_a_real_engine_takes_new_weights_on_a_gpu(tmp_path):
    pytest.importorskip("onnx")
    from stylefast.export.tensorrt_session import TensorRTSession
    from tests.export.test_tensorrt_build import HEADS, SHAPES, D, attention, projection

    target = present_target()
    pytest.importorskip(package_of([target]))
    path = tmp_path / "a.engine"
    build_engine(attention(tmp_path / "a.onnx"), path, [target], [SHAPES], refittable=True)
    x = {name: torch.randn(2, HEADS, 64, D, device="cuda", dtype=torch.float16) for name in "qkv"}
    x["mask"] = torch.zeros(2, 1, 1, 64, device="cuda", dtype=torch.float16)
    before = TensorRTSession(path).run(x)["out"]
    doubled = 2 * projection().astype(np.float16)
    assert "weight" in refit(path, {"weight": torch.from_numpy(doubled)})
    torch.testing.assert_close(TensorRTSession(path).run(x)["out"], 2 * before, rtol=1e-2, atol=1e-1)
