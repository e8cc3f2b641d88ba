"""GEGLU and the norms in C++ against their formulas, on every instruction set that this CPU has."""

import math

import pytest
import torch
import torch.nn.functional as F

from stylefast._extension import extension
from tests.kernels.cpp_streaming_cases import (
    DTYPES,
    EPS,
    LAYOUTS,
    NAN,
    add_layer_norm,
    assert_near,
    geglu,
    geglu_formula,
    group_norm,
    group_norm_formula,
    layer_norm,
    layer_norm_formula,
    norm_case,
    normal,
    poisoned,
)
from tests.kernels.near_fp64 import NEEDS_EXTENSION

pytestmark = NEEDS_EXTENSION


@pytest.mark.parametrize("inner", [1, 7, 16, 33, 160])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu_of_any_width_equals_the_formula(instruction_set, dtype, inner):
    x = 2 * normal(2, 5, 2 * inner, seed=inner, dtype=dtype)
    assert_near(geglu(x), geglu_formula(x))


def test_gelu_errs_no_more_than_pytorchs_over_all_sizes_of_gate(instruction_set):
    gate = torch.cat([torch.linspace(-14, 14, 40001), torch.tensor([-1e-30, 1e-30, 1e-3, -1e-3, 30.0, -30.0])])
    found = geglu(torch.stack([torch.ones_like(gate), gate], -1).transpose(0, 1).reshape(1, -1))[0]
    exact = F.gelu(gate.double())
    limit = 2 * (F.gelu(gate).double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= limit
    # the negative tail keeps its digits, which 1 + erf can't
    tail = (gate > -5) & (gate < 0)
    assert ((found.double() - exact).abs() <= 2e-6 * exact.abs())[tail].all()


def test_geglu_of_infinities_and_nan_follows_the_formula(instruction_set):
    gate = torch.tensor([math.inf, -math.inf, NAN, 0.0, -0.0, 1e30, -1e30])
    expected = gate * (1 + torch.erf(gate / 2**0.5)) / 2
    assert torch.equal(geglu(torch.cat([torch.ones(7), gate])).nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def test_geglu_takes_slices_transposed_rows_and_single_rows(instruction_set):
    wide = normal(6, 4, 50, seed=1)
    for x in (wide[1::2, :, 3:29], wide.transpose(0, 1)[..., :26], wide[0, 0, :26], wide[:, 1:3, :26]):
        assert_near(geglu(x), geglu_formula(x))


@pytest.mark.parametrize("channels", [1, 5, 64, 77, 320])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_any_width_equals_the_formula(instruction_set, dtype, channels):
    x, weight, bias = (normal(*s, channels, seed=i, dtype=dtype) for i, s in enumerate(((3, 4), (), ())))
    assert_near(layer_norm(x, weight, bias), layer_norm_formula(x, weight, bias), factor=2)


@pytest.mark.parametrize("channels", [5, 64, 77])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_rounded_to_its_type_and_then_normalised(instruction_set, dtype, channels):
    x, residual = (normal(3, 4, channels, seed=i, dtype=dtype) for i in range(2))
    weight, bias = (normal(channels, seed=i, dtype=dtype) for i in (2, 3))
    total, out = add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    assert_near(out, layer_norm_formula(total, weight, bias), factor=2)


def test_layer_norm_of_rows_far_from_zero_keeps_its_digits(instruction_set):
    x = normal(5, 640, seed=1) + 1e5 * torch.arange(5)[:, None]
    weight, bias = torch.ones(640), torch.zeros(640)
    assert_near(layer_norm(x, weight, bias), layer_norm_formula(x, weight, bias), factor=2)


def test_layer_norm_of_constant_rows_is_the_bias(instruction_set):
    bias = normal(77, seed=1)
    assert torch.equal(layer_norm(torch.full((2, 77), 3.7), normal(77, seed=2), bias), bias.expand(2, 77))


def test_layer_norm_takes_strided_rows_and_parameters(instruction_set):
    x, residual = normal(4, 6, 90, seed=1)[::2, 1:4, 5:82], normal(3, 2, 77, seed=2).transpose(0, 1)
    weight, bias = normal(77, 2, seed=3).unbind(1)
    total, out = add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    assert_near(out, layer_norm_formula(total, weight, bias), factor=2)


def test_a_nan_stays_in_its_row(instruction_set):
    x = normal(3, 40, seed=1)
    x[1, 7] = NAN
    out = layer_norm(x, torch.ones(40), torch.zeros(40))
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "no silu"])
@pytest.mark.parametrize(
    ("channels", "groups", "height", "width"),
    [(4, 2, 1, 1), (6, 3, 5, 7), (32, 32, 8, 8), (40, 4, 9, 13), (64, 1, 3, 131), (1, 1, 4, 5)],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_of_any_shape_equals_the_formula(
    instruction_set, dtype, layout, channels, groups, height, width, silu
):
    x, weight, bias = norm_case(2, channels, height, width, layout, dtype)
    found = group_norm(x, groups, weight, bias, silu)
    assert_near(found, group_norm_formula(x, groups, weight, bias, silu), factor=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_group_of_many_blocks_equals_the_formula(instruction_set, layout):
    x, weight, bias = norm_case(1, 24, 71, 73, layout)
    assert_near(group_norm(x, 2, weight, bias), group_norm_formula(x, 2, weight, bias), factor=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_pool_with_rows_and_pool_entries(instruction_set, dtype, layout):
    x, weight, bias = norm_case(5, 12, 6, 7, layout, dtype)
    x = x + torch.arange(5).to(dtype)[:, None, None, None]  # means that differ
    pool = normal(2, 3, seed=4), normal(2, 3, seed=5).abs()
    case = dict(page=[-1, 0, 1, 5, 6], pool=pool, elements=50)
    assert_near(group_norm(x, 3, weight, bias, **case), group_norm_formula(x, 3, weight, bias, **case), factor=4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_rows_and_pages_that_nobody_names_may_be_nan(instruction_set, layout):
    x, weight, bias = norm_case(4, 8, 5, 5, layout)
    x[3] = NAN
    pool = torch.zeros(2, 2), torch.ones(2, 2)
    pool[0][1], pool[1][1] = NAN, NAN
    out = group_norm(x, 2, weight, bias, page=[-1, 0, 4, 1], pool=pool, elements=9)
    assert out[:3].isfinite().all() and out[3].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_far_from_zero_keeps_its_digits(instruction_set, layout):
    x, weight, bias = norm_case(2, 16, 16, 17, layout)
    x = x + torch.tensor([1e4, -1e5])[:, None, None, None]
    assert_near(group_norm(x, 4, weight, bias), group_norm_formula(x, 4, weight, bias), factor=5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_constant_group_is_the_bias(instruction_set, layout):
    x, weight, bias = norm_case(2, 8, 9, 9, layout)
    found = group_norm(torch.full_like(x, 0.3), 2, weight, bias, silu=False)
    assert_near(found, bias[:, None, None].expand(x.shape), factor=5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_takes_slices_of_rows(instruction_set, layout):
    x, weight, bias = norm_case(6, 8, 5, 7, layout)
    out = poisoned(x)
    extension().group_norm_silu(x[1::2], 2, weight, bias, EPS, True, None, None, None, 0, out[::2])
    assert_near(out[::2], group_norm_formula(x[1::2], 2, weight, bias), factor=2)
    assert out[1::2].isnan().all()


def test_silu_neither_overflows_nor_loses_its_tail(instruction_set):
    bias = torch.tensor([-200.0, -80.0, -20.0, -1.0, 0.0, 1.0, 80.0, 200.0, 1e30, -1e30])
    x = torch.zeros(1, 10, 2, 2)
    found = group_norm(x, 10, torch.ones(10), bias)[0, :, 0, 0]
    torch.testing.assert_close(found.double(), F.silu(bias.double()), rtol=2e-5, atol=1e-36)
