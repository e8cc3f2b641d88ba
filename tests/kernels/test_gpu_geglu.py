"""GEGLU in Triton on a GPU at SDXL's sizes, against PyTorch in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs the triton package")

from stylefast.kernels.gpu.geglu import geglu
from tests.kernels.cuda_graphs import capture_and_replay

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SHAPES = [(2, 4096, 5120), (8, 1024, 10240), (3, 77, 2562), (5, 2 * 24)]


def _peer(x):
    hidden, gate = x.chunk(2, -1)
    return hidden * F.gelu(gate)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_error_is_at_most_twice_that_of_pytorch(shape, dtype):
    torch.manual_seed(0)
    x = (torch.randn(shape, device=DEVICE) * 2).to(dtype)
    out = torch.full((*shape[:-1], shape[-1] // 2), math.nan, dtype=dtype, device=DEVICE)
    geglu(x, out)
    exact = _peer(x.double())
    ours, peer = (out.double() - exact).abs(), (_peer(x).double() - exact).abs()
    assert ours.mean() <= 2 * peer.mean() + 1e-9
    assert ours.max() <= 2 * peer.max() + 1e-6


def test_captured_in_a_graph_it_follows_new_values():
    x = torch.randn(SHAPES[0], device=DEVICE)
    out = torch.empty(*x.shape[:-1], x.shape[-1] // 2, device=DEVICE)
    graph = capture_and_replay(lambda: geglu(x, out), out)
    torch.testing.assert_close(out, _peer(x), rtol=1e-5, atol=1e-5)
    x.mul_(-0.5)
    graph.replay()
    torch.testing.assert_close(out, _peer(x), rtol=1e-5, atol=1e-5)
