"""Shared attention at SDXL's sizes on a GPU; the same checks at small sizes in the interpreter where there is none."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package")

from stylefast.kernels.gpu.adain_affine import adain_affine
from stylefast.kernels.gpu.shared_attention import form_for
from stylefast.kernels.gpu.token_stats import token_stats
from stylefast.kernels.shared_attention import CONCAT, SWAP
from tests.support.shared_attention_cases import expected, grouped, make_case, run, sdpa_error

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where a CUDA device is")
# two layers of SDXL at 1024 x 1024 pixels, and one of 1152 x 896, whose token count no tile divides
SIZES = {
    "cuda": [(4096, 4096, 10), (1024, 1024, 20), (1008, 1008, 20)],
    "cpu": [(32, 32, 1), (16, 32, 2), (19, 13, 1)],
}
MARKS = {"cuda": pytest.mark.gpu, "cpu": INTERPRETED}
CASES = [
    pytest.param(device, *size, id=f"{device} {size[0]} tokens", marks=MARKS[device])
    for device, sizes in SIZES.items()
    for size in sizes
]
every_size = pytest.mark.parametrize("device, tokens, page_tokens, heads", CASES)
on_each_device = pytest.mark.parametrize("device, tokens, page_tokens, heads", [CASES[1], CASES[4]])
SMALL = {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 2, "exp2": 4}


def _config(device, form):
    """The committed configuration on a GPU, small tiles in the interpreter."""
    return None if device == "cuda" else SMALL | {"form": form}


def _form(case):
    q, k, v, references, _, pool = grouped(case)
    return form_for(q, k, v, references, pool, torch.empty_like(q))[0]


def _types(device):
    return (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float16,)


@every_size
@pytest.mark.parametrize("affine", [0, 2, 3], ids=["no AdaIN", "AdaIN of queries and keys", "AdaIN of values too"])
def test_16_bit_errors_are_at_most_twice_those_of_pytorch(device, tokens, page_tokens, heads, affine):
    for dtype in _types(device):
        case = make_case(
            tokens=tokens, page_tokens=page_tokens, heads=heads, width=64, dtype=dtype, affine=affine, device=device
        )
        form = _form(case)
        if device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
            assert form == ("pointers" if tokens % 128 else "warp_specialised")
        exact = expected(case)
        for chosen in {form, "pointers"}:
            config = _config(device, chosen)
            if device == "cuda" and chosen != form:
                config = {
                    "form": chosen,
                    "block_m": 128,
                    "block_n": 64,
                    "num_warps": 8,
                    "num_stages": 3,
                    "exp2": 8,
                }
            error = (run(case, config).double() - exact).abs().max().item()
            assert error <= 2 * sdpa_error(case, exact), (dtype, chosen)


@every_size
def test_fp32_is_exact_to_twice_pytorchs_error(device, tokens, page_tokens, heads):
    case = make_case(tokens=tokens, page_tokens=page_tokens, heads=heads, width=64, device=device)
    exact = expected(case)
    config = None if device == "cuda" else SMALL | {"form": "pointers", "exp2": 0}
    error = (run(case, config).double() - exact).abs().max().item()
    assert error <= 2 * sdpa_error(case, exact) + 1e-6


@on_each_device
@pytest.mark.parametrize("width", [32, 40, 80, 128])
def test_every_head_size_is_right(device, tokens, page_tokens, heads, width):
    case = make_case(
        "two references, some missing", tokens, page_tokens, heads, width, torch.float16, bias=True, device=device
    )
    torch.testing.assert_close(run(case, _config(device, "pointers")).double(), expected(case), rtol=5e-3, atol=5e-3)


@on_each_device
def test_fp8_pages_are_right(device, tokens, page_tokens, heads):
    case = make_case(
        tokens=tokens, page_tokens=page_tokens, heads=heads, width=64, dtype=torch.float16, fp8=True, device=device
    )
    torch.testing.assert_close(run(case, _config(device, "pointers")).double(), expected(case), rtol=5e-3, atol=5e-3)


@on_each_device
def test_pages_and_modes_that_see_little_are_right(device, tokens, page_tokens, heads):
    case = make_case(tokens=tokens, page_tokens=page_tokens, heads=heads, width=64, dtype=torch.float16, device=device)
    case["mode"] = torch.tensor([CONCAT, SWAP, SWAP, CONCAT], device=device)
    case["shift"] = torch.tensor([[-math.inf], [-math.inf], [0.5], [0.0]], device=device)
    want = expected(case)
    case["page"] = torch.tensor([[4], [5], [0], [77]], device=device)
    case["pool_k"][0], case["pool_v"][1] = math.nan, math.nan
    for form in {_form(case), "pointers"}:
        got = run(case, _config(device, form))
        torch.testing.assert_close(got[[0, 2]].double(), want[[0, 2]], rtol=5e-3, atol=5e-3)
        assert (got[1] == 0).all() and got[3].isnan().all()


@on_each_device
def test_statistics_and_affine_give_adain(device, tokens, page_tokens, heads):
    fused = torch.randn(4, tokens, 3, heads, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    q, k, _ = (fused * 2 + 1).unbind(2)
    mean, variance = (torch.full((2, 4, heads, 64), math.nan, device=device) for _ in range(2))
    token_stats([q, k], mean, variance)
    gain, offset = torch.full_like(mean, math.nan), torch.full_like(mean, math.nan)
    page, strength = torch.tensor([1, -1, 0, 2], device=device), torch.ones(4, 2, device=device)
    adain_affine(mean, variance, page, strength, None, None, gain, offset)
    for i, x in enumerate((q.double(), k.double())):
        moved = x * gain[i, :, None] + offset[i, :, None]
        for row, target in ((0, 1), (2, 0), (3, 2)):
            torch.testing.assert_close(moved[row].mean(0), x[target].mean(0), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(moved[row].var(0), x[target].var(0), rtol=1e-3, atol=1e-3)
        assert torch.equal(moved[1], x[1])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1024, 1008])
def test_a_captured_graph_follows_pages_scales_and_shifts(tokens):
    case = make_case(tokens=tokens, page_tokens=tokens, heads=4, width=64, dtype=torch.bfloat16, device="cuda")
    run(case)  # compiles outside the capture
    out = torch.empty(case["q"].shape, dtype=case["q"].dtype, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(case, out=out)
    case["page"].copy_(torch.tensor([[0], [-1], [5], [4]]))
    case["scale"].fill_(0.7)
    case["shift"].fill_(0.2)
    graph.replay()
    torch.testing.assert_close(out.double(), expected(case), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31_elements_reach_their_page():
    pages, tokens, heads, width = 420, 4096, 10, 128
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GB of device memory")
    case = make_case(tokens=128, page_tokens=tokens, heads=heads, width=width, dtype=torch.float16, device="cuda")
    pool = torch.zeros(2, pages, tokens, heads, width, dtype=torch.float16, device="cuda")
    pool[:, -2:] = torch.stack([case["pool_k"], case["pool_v"]])
    want = expected(case)
    page = torch.where(case["page"] > 3, case["page"] + pages - 2, case["page"])
    case |= {"pool_k": pool[0], "pool_v": pool[1], "page": page}
    torch.testing.assert_close(run(case).double(), want, rtol=5e-3, atol=5e-3)
