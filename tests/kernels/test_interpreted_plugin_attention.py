"""The plugin's form of shared attention in the interpreter: contiguous tensors, int32 tables, its argument order."""

import math
import os

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package")

from stylefast.kernels.gpu.plugin_attention import is_even, launch
from tests.support.shared_attention_cases import MIXES, expected, make_case

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
CONFIG = {"form": "pointers", "block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 1, "exp2": 0}
LIMITS = {torch.float32: 2e-6, torch.float16: 4e-3}  # of values up to 4


def run(case, config=CONFIG):
    """What the plugin makes of a case, which is copied dense as TensorRT's tensors are."""
    given = {name: x if x is None else x.contiguous() for name, x in case.items()}
    out = torch.full(given["q"].shape, math.nan, dtype=given["q"].dtype)
    names = ("scale", "shift", "gain", "offset", "pool_k", "pool_v")
    tables = (given["page"].int(), given["mode"].int())
    launch(*(given[name] for name in "qkv"), *tables, *(given[name] for name in names), out, config)
    return out


def check(case, config=CONFIG):
    found, exact = run(case, config), expected(case)
    assert (found.double() - exact).abs().max().item() < LIMITS[case["q"].dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "fp16"])
@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix != "no references"])
def test_banked_rows_agree_with_the_reference_where(mix, dtype):
    check(make_case(mix, dtype=dtype))


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "fp16"])
@pytest.mark.parametrize("mix", ["all rows plain", "concat, swap and plain rows of live references"])
def test_live_rows_need_no_pool_where(mix, dtype):
    check(make_case(mix, dtype=dtype) | {"pool_k": None, "pool_v": None})


@pytest.mark.parametrize("width", [40, 64])
def test_heads_that_fill_their_tile_and_heads_that_do_not(width):
    check(make_case(width=width, heads=3, tokens=21, page_tokens=7))


def test_values_that_adain_leaves_alone():
    check(make_case(affine=2))


def test_tiles_that_end_with_the_tokens_need_no_mask():
    case = make_case(tokens=48, page_tokens=32)
    assert is_even(CONFIG, 48, 32)
    check(case)


def test_a_page_that_is_not_there_makes_its_row_nan_and_no_other():
    case = make_case()
    case["page"] = case["page"].clone()
    case["page"][1] = 6  # rows 0 to 3, pages 4 and 5
    found = run(case)
    assert found[1].isnan().all() and not found[[0, 2, 3]].isnan().any()


def test_an_even_configuration_is_one_that_every_count_fits():
    assert is_even(CONFIG, 64) and not is_even(CONFIG, 64, 40)
