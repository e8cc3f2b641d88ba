"""Group norm with SiLU in Triton on a GPU at the sizes of SDXL's UNet and VAE, against PyTorch in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs the triton package")

from stylefast.kernels.gpu.group_norm_silu import group_norm_silu
from stylefast.kernels.group_norm_silu import group_norm_silu_ref
from tests.kernels.cuda_graphs import capture_and_replay

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SHAPES = [
    (2, 320, 128, 128),
    (4, 640, 64, 64),
    (2, 960, 64, 64),
    (8, 1280, 32, 32),
    (2, 2560, 32, 32),
    (1, 512, 128, 128),
    (1, 128, 512, 512),
    (3, 320, 37, 53),
]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def _case(shape, layout, dtype):
    torch.manual_seed(0)
    rows, channels = shape[:2]
    weight, bias = torch.randn(2, channels, device=DEVICE)
    return {
        "x": (torch.randn(shape, device=DEVICE) * 2 + 1).to(dtype).contiguous(memory_format=LAYOUTS[layout]),
        "groups": 32,
        "weight": weight.to(dtype),
        "bias": bias.to(dtype),
        "eps": 1e-5,
        "silu": True,
        "page": None,
        "pool_mean": None,
        "pool_variance": None,
        "pool_elements": 0,
    }


def _run(case):
    out = torch.full_like(case["x"], math.nan)
    group_norm_silu(**case, out=out)
    return out


@each_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_error_is_at_most_twice_that_of_pytorch(shape, layout, dtype):
    case = _case(shape, layout, dtype)

    def normed(kind):
        parts = (case[name].to(kind) for name in ("weight", "bias"))
        return F.silu(F.group_norm(case["x"].to(kind), 32, *parts, case["eps"])).double()

    exact = normed(torch.float64)
    ours, peer = (_run(case).double() - exact).abs(), (normed(dtype) - exact).abs()
    assert ours.mean() <= 2 * peer.mean() + 1e-8
    assert ours.max() <= 2 * peer.max() + 1e-6


@each_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pooled_statistics_equal_the_reference(layout, dtype):
    case = _case((4, 640, 64, 64), layout, dtype)
    case |= {
        "page": torch.tensor([-1, 0, 5, 4], device=DEVICE),
        "pool_mean": torch.randn(2, 32, device=DEVICE),
        "pool_variance": torch.rand(2, 32, device=DEVICE),
        "pool_elements": 20 * 1024,
    }
    bound = {torch.bfloat16: 2e-2, torch.float32: 2e-5}[dtype]
    torch.testing.assert_close(_run(case), group_norm_silu_ref(**case), rtol=bound, atol=bound)


@each_layout
def test_a_mean_far_larger_than_the_deviation_costs_no_accuracy(layout):
    case = _case((2, 320, 128, 128), layout, torch.float32)
    case["x"] += 1e4
    x, weight, bias = (case[name].double() for name in ("x", "weight", "bias"))
    exact = F.silu(F.group_norm(x, 32, weight, bias, case["eps"]))
    torch.testing.assert_close(_run(case).double(), exact, rtol=5e-3, atol=5e-3)


@each_layout
def test_a_page_out_of_range_makes_its_row_nan_and_no_other(layout):
    case = _case((3, 320, 64, 64), layout, torch.bfloat16)
    case["page"] = torch.tensor([-1, 2**40, 0], device=DEVICE)
    finite = _run(case).isfinite().flatten(1)
    assert finite[0].all() and not finite[1].any() and finite[2].all()


@each_layout
def test_captured_in_a_graph_it_follows_new_values_and_pages(layout):
    case = _case((4, 640, 64, 64), layout, torch.bfloat16)
    case["page"] = torch.tensor([-1, 0, 0, 0], device=DEVICE)
    out = torch.empty_like(case["x"])
    graph = capture_and_replay(lambda: group_norm_silu(**case, out=out), out)
    torch.testing.assert_close(out, group_norm_silu_ref(**case), rtol=2e-2, atol=2e-2)
    case["x"].mul_(0.3)
    case["page"].fill_(3)
    graph.replay()
    torch.testing.assert_close(out, group_norm_silu_ref(**case), rtol=2e-2, atol=2e-2)
