"""Gated cross-attention: fast form against the literal one, and what strengths, masks and groups mean."""

import math

import pytest
import torch

from stylefast.kernels.gated_cross_attention import gated_cross_attention, gated_cross_attention_ref

ROWS, TOKENS, HEADS, WIDTH = 4, 9, 2, 8


def _case(seed=0, segments=2):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    q, text = draw(ROWS, TOKENS, HEADS, WIDTH), draw(2, 3, 7, HEADS, WIDTH)
    image = draw(2, 3, 5, HEADS, WIDTH)
    return {
        "q": q,
        "text_k": text[0],
        "text_v": text[1],
        "text_page": torch.tensor([0, 2, 1, 1]),
        "image_k": image[0],
        "image_v": image[1],
        "image_lengths": torch.tensor([4, 5, 2]),
        "image_page": torch.tensor([[0, 1], [2, -1], [-1, -1], [1, 2]])[:, :segments],
        "strength": torch.tensor([[0.6, 1.2], [1.0, 0.0], [1.0, 1.0], [-0.5, 2.0]])[:, :segments],
        "group": torch.arange(segments).expand(ROWS, -1),
        "masks": draw(2, TOKENS).abs(),
        "mask_index": torch.tensor([[-1, 0], [1, -1], [-1, -1], [0, 1]])[:, :segments],
    }


@pytest.mark.parametrize("group", ["separate softmaxes", "one softmax"])
@pytest.mark.parametrize("masked", [False, True], ids=["without masks", "with masks"])
def test_the_fast_form_equals_the_literal_one(group, masked):
    case = _case()
    if group == "one softmax":
        case["group"] = torch.zeros(ROWS, 2, dtype=torch.long)
    if not masked:
        case["masks"], case["mask_index"] = None, None
    expected = gated_cross_attention_ref(**case)
    torch.testing.assert_close(gated_cross_attention(**case), expected, rtol=1e-5, atol=1e-5)


def test_strength_zero_is_text_alone_and_lets_no_nan_through():
    case = _case()
    text_only = gated_cross_attention(*(case[name] for name in ("q", "text_k", "text_v", "text_page")))
    case["strength"] = torch.zeros(ROWS, 2)
    case["image_k"], case["image_v"] = case["image_k"] * math.nan, case["image_v"] * math.nan
    assert torch.equal(gated_cross_attention(**case), text_only)
    assert gated_cross_attention_ref(**case).isfinite().all()


def test_padding_tokens_beyond_a_pages_length_have_no_effect():
    case = _case()
    expected = gated_cross_attention(**case)
    for page, length in enumerate(case["image_lengths"].tolist()):
        case["image_k"][page, length:] = math.nan
        case["image_v"][page, length:] = math.nan
    assert torch.equal(gated_cross_attention(**case), expected)


def test_strength_weighs_the_segments_output_linearly():
    case = _case()
    outputs = []
    for factor in (0.0, 1.0, 2.0):
        outputs.append(gated_cross_attention(**{**case, "strength": case["strength"] * factor}))
    torch.testing.assert_close(outputs[2] - outputs[0], 2 * (outputs[1] - outputs[0]), rtol=1e-5, atol=1e-5)


def test_segments_of_one_group_share_a_softmax_so_a_duplicate_changes_nothing():
    case = _case() | {"masks": None, "mask_index": None}
    single = {**case, "image_page": torch.tensor([[0, -1]] * ROWS), "strength": torch.full((ROWS, 2), 0.7)}
    double = {**single, "image_page": torch.tensor([[0, 0]] * ROWS)}
    merged = {**double, "group": torch.zeros(ROWS, 2, dtype=torch.long)}
    expected = gated_cross_attention(**single)
    torch.testing.assert_close(gated_cross_attention(**merged), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(gated_cross_attention(**double), expected, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 16, 61])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 2.0, -1.0])
def test_any_query_count_and_strength_agrees_with_the_literal_form(tokens, strength):
    case = _case(segments=1) | {"masks": None, "mask_index": None}
    case["q"] = torch.randn(ROWS, tokens, HEADS, WIDTH, generator=torch.Generator().manual_seed(9))
    case["strength"] = torch.full((ROWS, 1), strength)
    expected = gated_cross_attention_ref(**case)
    torch.testing.assert_close(gated_cross_attention(**case), expected, rtol=1e-5, atol=1e-5)
