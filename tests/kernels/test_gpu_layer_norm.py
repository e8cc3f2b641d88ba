"""Layer norm in Triton, alone and after a residual, on a GPU at SDXL's sizes, against PyTorch in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs the triton package")

from stylefast.kernels.gpu.layer_norm import add_layer_norm, layer_norm
from tests.kernels.cuda_graphs import capture_and_replay

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SHAPES = [(2, 4096, 640), (8, 1024, 1280), (3, 77, 2048), (5, 7, 333), (2, 8192)]


def _case(shape, dtype):
    torch.manual_seed(0)
    x, residual = (torch.randn(2, *shape, device=DEVICE) * 2 + 1).to(dtype)
    weight, bias = torch.randn(2, shape[-1], device=DEVICE).to(dtype)
    return x, residual, weight, bias


def _normed(x, weight, bias, kind):
    return F.layer_norm(x.to(kind), x.shape[-1:], weight.to(kind), bias.to(kind), 1e-5).double()


def _check(out, x, weight, bias):
    exact = _normed(x, weight, bias, torch.float64)
    ours, peer = (out.double() - exact).abs(), (_normed(x, weight, bias, x.dtype) - exact).abs()
    assert ours.mean() <= 2 * peer.mean() + 1e-8
    assert ours.max() <= 2 * peer.max() + 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_error_is_at_most_twice_that_of_pytorch(shape, dtype):
    x, _, weight, bias = _case(shape, dtype)
    out = torch.full_like(x, math.nan)
    layer_norm(x, weight, bias, 1e-5, out)
    _check(out, x, weight, bias)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_after_a_residual_the_rounded_sum_is_normalised(shape, dtype):
    x, residual, weight, bias = _case(shape, dtype)
    total, out = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    add_layer_norm(x, residual, weight, bias, 1e-5, total, out)
    assert torch.equal(total, x + residual)
    _check(out, total, weight, bias)


def test_captured_in_a_graph_it_follows_new_values():
    x, residual, weight, bias = _case(SHAPES[0], torch.bfloat16)
    total, out = torch.empty_like(x), torch.empty_like(x)
    graph = capture_and_replay(lambda: add_layer_norm(x, residual, weight, bias, 1e-5, total, out), total, out)
    _check(out, x + residual, weight, bias)
    x.mul_(-0.5)
    graph.replay()
    _check(out, x + residual, weight, bias)
