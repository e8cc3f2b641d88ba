"""Gated cross-attention in Triton, run in its interpreter: both forms against the literal reference."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package")

from stylefast.errors import InvalidRequest
from stylefast.kernels.gated_cross_attention import ImageSegments, gated_cross_attention_ref
from stylefast.kernels.gpu.gated_cross_attention import gated_cross_attention, one_tile_columns

FORMS = {
    "one tile": {"queries": 16, "columns": 128, "segments": 3, "keys": 16, "num_warps": 4, "num_stages": 1},
    "online": {"queries": 16, "columns": 0, "segments": 0, "keys": 16, "num_warps": 4, "num_stages": 1},
}
ROWS, HEADS = 4, 2
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

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where a CUDA device is")
each_form = pytest.mark.parametrize("form", FORMS)


def _case(tokens=7, text_tokens=21, d=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "q": draw(ROWS, tokens, HEADS, d).to(dtype),
        "text_k": draw(3, text_tokens, HEADS, d).to(dtype),
        "text_v": draw(3, text_tokens, HEADS, d).to(dtype),
        "text_page": torch.tensor([0, 2, 1, 1]),
        "image_k": draw(3, 5, HEADS, d).to(dtype),
        "image_v": draw(3, 5, HEADS, d).to(dtype),
        "image_lengths": torch.tensor([4, 5, 2]),
        "image_page": torch.tensor([[0, 1, 2], [2, -1, 2], [-1, -1, -1], [1, 2, 0]]),
        "strength": torch.tensor([[0.6, 1.2, 0.3], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [-0.5, 2.0, 0.7]]),
        "group": torch.arange(3).repeat(ROWS, 1),
        "masks": draw(2, tokens).abs(),
        "mask_index": torch.tensor([[-1, 0, 1], [1, -1, 0], [-1, -1, -1], [0, 1, -1]]),
    }


def grouped(case):
    images = ImageSegments(*(case.get(name) for name in NAMES[4:])) if case.get("image_k") is not None else None
    return *(case[name] for name in NAMES[:4]), images


def _run(form, case):
    out = torch.full_like(case["q"], math.nan)
    gated_cross_attention(*grouped(case), out, config=FORMS[form])
    return out


def _check(form, case, tolerance=1e-5):
    torch.testing.assert_close(_run(form, case), gated_cross_attention_ref(**case), rtol=tolerance, atol=tolerance)


@each_form
@pytest.mark.parametrize("groups", [[0, 1, 2], [7, 7, 7], [3, 0, 3]], ids=["separate", "one for all", "first and last"])
@pytest.mark.parametrize("masked", [False, True], ids=["without masks", "with masks"])
def test_segments_and_their_softmaxes_equal_the_reference(form, groups, masked):
    case = _case(tokens=19)  # two tiles of queries, the second not full
    case["group"] = torch.tensor([groups]).repeat(ROWS, 1)
    if not masked:
        case["masks"] = case["mask_index"] = None
    _check(form, case)


@each_form
@pytest.mark.parametrize("d", [40, 80, 128])
def test_head_sizes_from_odd_to_large_equal_the_reference(form, d):
    _check(form, _case(d=d))


@each_form
def test_float16_stays_within_its_rounding(form):
    _check(form, _case(d=64, dtype=torch.float16), tolerance=4e-3)


def test_bfloat16_in_the_interpreter_is_refused_by_name():
    with pytest.raises(InvalidRequest, match="no bfloat16 matrices"):
        _run("one tile", _case(dtype=torch.bfloat16))


@each_form
def test_text_alone_equals_the_reference(form):
    case = _case()
    _check(form, {name: case[name] for name in NAMES[:4]})
    no_segments = {name: case[name][:, :0] for name in ("image_page", "strength", "group")}
    assert torch.equal(
        _run(form, {**case, **no_segments, "masks": None, "mask_index": None}),
        _run(form, {name: case[name] for name in NAMES[:4]}),
    )


def test_more_keys_than_a_tile_holds_take_the_online_form():
    case = _case(text_tokens=131)
    assert one_tile_columns(131, 3, 5) == (256, 8)
    _check("one tile", case)


def test_sdxl_prompts_with_sixteen_image_tokens_fill_one_tile():
    assert one_tile_columns(77, 1, 16) == (128, 16)
    assert one_tile_columns(112, 1, 16) == (128, 16)


@each_form
def test_strength_zero_is_text_alone_to_the_bit_and_lets_no_nan_through(form):
    case = _case()
    text_only = _run(form, {name: case[name] for name in NAMES[:4]})
    case["strength"] = torch.zeros(ROWS, 3)
    for name in ("image_k", "image_v", "masks"):
        case[name] = torch.full_like(case[name], math.nan)
    assert torch.equal(_run(form, case), text_only)


@each_form
def test_a_segment_of_strength_zero_takes_no_part_in_its_softmax(form):
    case = _case()
    case["group"] = torch.zeros(ROWS, 3, dtype=torch.long)
    case["strength"] = torch.tensor([[0.0, 1.2, 0.3]]).repeat(ROWS, 1)
    case["image_page"] = torch.tensor([[0, 1, 2]]).repeat(ROWS, 1)
    case["image_k"][0] = case["image_v"][0] = math.nan
    _check(form, case)


@each_form
def test_padding_beyond_a_pages_length_has_no_effect(form):
    case = _case()
    expected = _run(form, case)
    for page, length in enumerate(case["image_lengths"].tolist()):
        case["image_k"][page, length:] = case["image_v"][page, length:] = math.nan
    assert torch.equal(_run(form, case), expected)


@each_form
def test_an_empty_page_adds_nothing(form):
    case = _case()
    case["image_lengths"] = torch.zeros(3, dtype=torch.long)
    assert torch.equal(_run(form, case), _run(form, {name: case[name] for name in NAMES[:4]}))


@each_form
def test_strided_views_of_projections_and_tables_are_taken_as_they_are(form):
    case = _case(tokens=19)
    for name in ("q", "text_k", "text_v", "image_k", "image_v"):
        wide = torch.full((*case[name].shape[:3], 3, case[name].shape[3]), math.nan)
        wide[:, :, :, 1] = case[name]
        case[name] = wide[:, :, :, 1]
    for name in ("text_page", "image_lengths", "image_page", "strength", "group", "masks", "mask_index"):
        spread = case[name].unsqueeze(-1).repeat(*[1] * case[name].ndim, 3)
        case[name] = spread[..., 1]
        assert not case[name].is_contiguous()
    _check(form, case)


@each_form
def test_output_may_be_strided(form):
    case = _case(tokens=19)
    wide = torch.full((ROWS, 19, HEADS, 40), math.nan)
    gated_cross_attention(*grouped(case), wide[..., :32], config=FORMS[form])
    torch.testing.assert_close(wide[..., :32], gated_cross_attention_ref(**case), rtol=1e-5, atol=1e-5)
    assert wide[..., 32:].isnan().all()


@each_form
@pytest.mark.parametrize("name, index", [("text_page", (1,)), ("image_page", (1, 0)), ("mask_index", (1, 0))])
def test_an_index_out_of_range_makes_its_row_nan_and_no_other(form, name, index):
    case = _case()
    expected = gated_cross_attention_ref(**case)
    case[name][index] = 3
    out = _run(form, case)
    assert out[1].isnan().all()
    others = [0, 2, 3]
    torch.testing.assert_close(out[others], expected[others], rtol=1e-5, atol=1e-5)


@each_form
@pytest.mark.parametrize("rows, tokens", [(0, 5), (4, 0)])
def test_zero_sizes_do_nothing(form, rows, tokens):
    case = _case(tokens=tokens)
    tables = {name: case[name][:rows] for name in ("q", "text_page", "image_page", "strength", "group", "mask_index")}
    assert _run(form, {**case, **tables}).shape == (rows, tokens, HEADS, 32)


def test_the_committed_configuration_is_found_without_being_given():
    case = _case(tokens=3)
    out = torch.full_like(case["q"], math.nan)
    gated_cross_attention(*grouped(case), out)
    torch.testing.assert_close(out, gated_cross_attention_ref(**case), rtol=1e-5, atol=1e-5)
