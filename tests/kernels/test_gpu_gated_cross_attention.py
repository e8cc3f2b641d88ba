"""Gated cross-attention in Triton on a GPU at SDXL's sizes: no worse than PyTorch's own attention in the same type."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs the triton package")

from stylefast.kernels.gated_cross_attention import ImageSegments, gated_cross_attention_ref
from stylefast.kernels.gpu.gated_cross_attention import gated_cross_attention
from tests.kernels.cuda_graphs import capture_and_replay

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SHAPES = {
    "64 x 64 latents": (4096, 10, 64),
    "32 x 32 latents": (1024, 20, 64),
    "odd": (331, 5, 40),
    "wide": (515, 4, 128),
}
NAMES = (
    "q",
    "text_k",
    "text_v",
    "text_page",
    "image_k",
    "image_v",
    "image_lengths",
    "image_page",
    "strength",
    "group",
    "masks",
    "mask_index",
)


def _case(tokens, heads, d, dtype, segments=1, text_tokens=77, image_tokens=16):
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, device=DEVICE)

    def table(values):
        return torch.tensor(values, device=DEVICE)[:, :segments]

    return {
        "q": draw(4, tokens, heads, d).to(dtype),
        "text_k": draw(3, text_tokens, heads, d).to(dtype),
        "text_v": draw(3, text_tokens, heads, d).to(dtype),
        "text_page": torch.tensor([0, 2, 1, 1], device=DEVICE),
        "image_k": draw(3, image_tokens, heads, d).to(dtype),
        "image_v": draw(3, image_tokens, heads, d).to(dtype),
        "image_lengths": torch.tensor([image_tokens, 4, image_tokens - 1], device=DEVICE),
        "image_page": table([[0, 1, 2, 0], [2, -1, 1, 1], [-1, -1, -1, -1], [1, 2, 0, 2]]),
        "strength": table([[0.6, 1.2, 0.3, 1.0], [1.0, 1.0, 0.0, 0.5], [1.0, 1.0, 1.0, 1.0], [-0.5, 2.0, 0.7, 0.1]]),
        "group": table([[0, 1, 2, 3], [0, 1, 2, 2], [0, 0, 0, 0], [1, 0, 1, 0]]),
        "masks": draw(2, tokens).abs(),
        "mask_index": table([[-1, 0, 1, -1], [1, -1, 0, 0], [-1] * 4, [0, 1, -1, -1]]),
    }


def grouped(case):
    images = ImageSegments(*(case.get(name) for name in NAMES[4:])) if case.get("image_k") is not None else None
    return *(case[name] for name in NAMES[:4]), images


def _run(case, config=None):
    out = torch.full_like(case["q"], math.nan)
    gated_cross_attention(*grouped(case), out, config=config)
    return out


def _peer(case):
    # the two-call form in the case's own type, for one unmasked segment of full length
    def attend(k, v):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (case["q"], k, v))).transpose(1, 2)

    page, text = case["image_page"][:, 0], case["text_page"]
    image = attend(case["image_k"][page.clamp(min=0)], case["image_v"][page.clamp(min=0)])
    strength = torch.where(page >= 0, case["strength"][:, 0], 0.0).to(image.dtype)
    return attend(case["text_k"][text], case["text_v"][text]) + strength[:, None, None, None] * image


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_error_is_at_most_twice_that_of_two_sdpa_calls(shape, dtype):
    case = _case(*SHAPES[shape], dtype)
    case["image_lengths"].fill_(16)
    case["masks"] = case["mask_index"] = None
    sides = {name: case[name].float() for name in ("q", "text_k", "text_v", "image_k", "image_v")}
    exact = gated_cross_attention_ref(**{**case, **sides})
    ours, peer = (_run(case).float() - exact).abs(), (_peer(case).float() - exact).abs()
    assert ours.mean() <= 2 * peer.mean() + 1e-7
    assert ours.max() <= 2 * peer.max() + 1e-6


@pytest.mark.parametrize(
    "segments, text_tokens, image_tokens",
    [(0, 77, 16), (1, 77, 16), (3, 77, 16), (4, 77, 4), (4, 77, 16), (2, 154, 16), (1, 77, 257)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_mix_of_segments_equals_the_reference(segments, text_tokens, image_tokens, dtype):
    case = _case(*SHAPES["32 x 32 latents"], dtype, segments, text_tokens, image_tokens)
    bound = {torch.bfloat16: 2e-2, torch.float32: 2e-5}[dtype]
    torch.testing.assert_close(_run(case), gated_cross_attention_ref(**case), rtol=bound, atol=bound)


def test_strength_zero_lets_no_nan_through():
    case = _case(*SHAPES["64 x 64 latents"], torch.bfloat16)
    text_only = _run({name: case[name] for name in NAMES[:4]})
    case["strength"] = torch.zeros_like(case["strength"])
    case["image_k"], case["image_v"] = case["image_k"] * math.nan, case["image_v"] * math.nan
    torch.testing.assert_close(_run(case), text_only)


def test_an_index_out_of_range_makes_its_row_nan_and_no_other():
    case = _case(*SHAPES["64 x 64 latents"], torch.bfloat16)
    case["text_page"][0], case["image_page"][1, 0] = 2**40, 2**40
    finite = _run(case).isfinite().flatten(1)
    assert not finite[:2].any() and finite[2:].all()


def test_captured_in_a_graph_it_follows_new_strengths_and_pages():
    case = _case(*SHAPES["64 x 64 latents"], torch.bfloat16)
    out = torch.empty_like(case["q"])
    arguments = grouped(case)
    graph = capture_and_replay(lambda: gated_cross_attention(*arguments, out), out)
    torch.testing.assert_close(out, gated_cross_attention_ref(**case), rtol=2e-2, atol=2e-2)
    case["strength"].mul_(0.5)
    case["image_page"].fill_(2)
    graph.replay()
    torch.testing.assert_close(out, gated_cross_attention_ref(**case), rtol=2e-2, atol=2e-2)
