"""GEGLU in Triton, run in its interpreter, against PyTorch in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs the triton package")

from stylefast.kernels.gpu.geglu import geglu

SMALL = {"rows": 2, "columns": 16, "num_warps": 4}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where a CUDA device is")


def _exact(x):
    hidden, gate = x.double().chunk(2, -1)
    return hidden * F.gelu(gate)


def _run(x, config=SMALL):
    out = torch.full((*x.shape[:-1], x.shape[-1] // 2), math.nan, dtype=x.dtype)
    geglu(x, out, config=config)
    return out


@pytest.mark.parametrize("shape", [(3, 5, 34), (7, 64), (2,), (1, 1, 1, 2), (130,)], ids=str)
@pytest.mark.parametrize("config", [SMALL, None], ids=["small tiles", "as committed"])
def test_every_shape_equals_fp64(shape, config):
    x = torch.randn(shape) * 2
    torch.testing.assert_close(_run(x, config).double(), _exact(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_rounded_once(dtype):
    x = (torch.randn(5, 64) * 2).to(dtype)
    # half an ulp, and a whole one in bfloat16, which the interpreter truncates to
    bound = {torch.float16: 5e-4, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(_run(x).double(), _exact(x), rtol=bound, atol=1e-6)


def test_far_gates_close_or_open_all_the_way():
    x = torch.tensor([[1.0, 1.0, 2.0, 2.0, -60.0, 60.0, -3e38, 1e38]])
    assert torch.equal(_run(x), torch.tensor([[0.0, 60.0, 0.0, 2e38]]))


def test_rows_may_lie_apart():
    wide = torch.full((5, 50), math.nan)
    wide[:, 7:41] = torch.randn(5, 34)
    out = torch.full((5, 40), math.nan)
    geglu(wide[:, 7:41], out[:, 3:20], config=SMALL)
    torch.testing.assert_close(out[:, 3:20].double(), _exact(wide[:, 7:41]), rtol=1e-5, atol=1e-6)
    assert out[:, :3].isnan().all() and out[:, 20:].isnan().all()


@pytest.mark.parametrize("x", [torch.randn(3, 4, 8).transpose(0, 1), torch.randn(8, 4).t()], ids=["rows", "columns"])
def test_rows_that_are_not_evenly_spaced_are_taken(x):
    torch.testing.assert_close(_run(x).double(), _exact(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_zero_sizes_do_nothing(shape):
    assert _run(torch.randn(shape)).shape == (shape[0], shape[1] // 2)
