"""Gated cross-attention in C++ against its formula, on every instruction set that this CPU has."""

import math

import pytest
import torch

from tests.kernels.cpp_attention_cases import DTYPES, WIDTHS, assert_near, gated, gated_case, gated_formula
from tests.kernels.near_fp64 import NEEDS_EXTENSION

pytestmark = NEEDS_EXTENSION


@pytest.mark.parametrize("tokens", [1, 7, 65, 129])
@pytest.mark.parametrize("width", WIDTHS, ids="{} wide".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_groups_and_masks_together_equal_the_formula(instruction_set, dtype, width, tokens):
    case = gated_case(dtype, width, tokens)
    assert_near(gated(**case), gated_formula(**case), dtype)


@pytest.mark.parametrize(
    "text_tokens, image_tokens", [(1, 1), (64, 4), (95, 60), (96, 96), (97, 97), (154, 200), (2100, 257)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_text_and_image_tokens_equals_the_formula(instruction_set, dtype, text_tokens, image_tokens):
    case = gated_case(dtype, 40, 70, text_tokens, image_tokens)
    assert_near(gated(**case), gated_formula(**case), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_segments_it_is_attention_to_the_text(instruction_set, dtype):
    case = {name: x for name, x in gated_case(dtype).items() if name in ("q", "text_k", "text_v", "text_page")}
    assert_near(gated(**case), gated_formula(**case), dtype)
    case |= {name: gated_case(dtype)[name][:, :0] for name in ("image_page", "strength", "group")}
    case |= {name: gated_case(dtype)[name] for name in ("image_k", "image_v", "image_lengths")}
    assert_near(gated(**case), gated_formula(**case), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_segment_of_strength_zero_is_not_read_and_leaves_its_group(instruction_set, dtype):
    case = gated_case(dtype)
    case["strength"][:, 1] = 0.0
    case["image_page"][:] = torch.tensor([0, 1, 2])
    case["group"][:] = 0
    case["image_k"][1] = case["image_v"][1] = math.nan
    assert_near(gated(**case), gated_formula(**case), dtype)


def test_strided_tables_and_fused_keys_and_values_are_taken_as_they_are(instruction_set):
    case = gated_case(torch.float32)
    expected = gated(**case)
    for name in ("strength", "masks"):
        case[name] = case[name].repeat_interleave(2, 1)[:, ::2]
    for name in ("image_page", "group", "mask_index"):
        case[name] = case[name].t().contiguous().t()
    case["text_k"], case["text_v"] = torch.stack([case["text_k"], case["text_v"]], 2).unbind(2)
    case["q"] = case["q"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(gated(**case), expected)


def test_text_or_images_without_tokens_add_nothing(instruction_set):
    case = gated_case(torch.float32)
    case["image_lengths"][:] = 0
    assert_near(gated(**case), gated_formula(**(case | dict(image_page=torch.full((4, 3), -1)))))
    case = gated_case(torch.float32)
    with_text = gated_formula(**case)
    text_alone = gated_formula(**(case | dict(image_page=torch.full((4, 3), -1))))
    case["text_k"], case["text_v"] = case["text_k"][:, :0], case["text_v"][:, :0]
    assert_near(gated(**case), with_text - text_alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_attention_gives_the_same_bits_on_one_thread_and_on_many(instruction_set, dtype):
    case = gated_case(dtype, tokens=1000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gated(**case)
        torch.set_num_threads(5)
        together = gated(**case)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("text_page", 2, "text_page is 2, but it must be from 0 to 1"),
        ("image_page", 4, "image_page is 4, but it must be from -1 to 3"),
        ("image_lengths", 18, "image_lengths is 18, but it must be from 0 to 17"),
        ("mask_index", 2, "mask_index is 2, but it must be from -1 to 1"),
    ],
)
def test_gated_attention_refuses_an_index_out_of_range_with_its_limit(name, value, message):
    case = gated_case(torch.float32)
    case[name].view(-1)[-1] = value
    with pytest.raises(ValueError, match=message):
        gated(**case)
