"""Layer norm in Triton, alone and after a residual, run in its interpreter, against PyTorch in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="needs the triton package")

from stylefast.errors import InvalidRequest
from stylefast.kernels.gpu.layer_norm import MAX_COLUMNS, add_layer_norm, layer_norm

SMALL = {"elements": 128, "num_warps": 4}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where a CUDA device is")


def _affine(columns, dtype=torch.float32):
    return torch.randn(columns).to(dtype), torch.randn(columns).to(dtype)


def _exact(x, weight, bias, eps=1e-5):
    weight, bias = (None if v is None else v.double() for v in (weight, bias))
    return F.layer_norm(x.double(), x.shape[-1:], weight, bias, eps)


def _run(x, weight, bias, eps=1e-5, config=SMALL):
    out = torch.full(x.shape, math.nan, dtype=x.dtype)
    layer_norm(x, weight, bias, eps, out, config=config)
    return out


def _run_added(x, residual, weight, bias, config=SMALL):
    total, out = torch.full((2, *x.shape), math.nan, dtype=x.dtype)
    add_layer_norm(x, residual, weight, bias, 1e-5, total, out, config=config)
    return total, out


@pytest.mark.parametrize("shape", [(3, 5, 40), (7, 64), (1, 1), (9, 129), (33,)], ids=str)
@pytest.mark.parametrize("config", [SMALL, None], ids=["small tiles", "as committed"])
def test_every_shape_equals_fp64(shape, config):
    x, affine = torch.randn(shape) * 3 + 1, _affine(shape[-1])
    torch.testing.assert_close(_run(x, *affine, config=config).double(), _exact(x, *affine), rtol=1e-5, atol=1e-5)


def test_weight_and_bias_may_be_absent():
    x, (weight, bias) = torch.randn(3, 40), _affine(40)
    for parts in ((None, None), (weight, None), (None, bias)):
        torch.testing.assert_close(_run(x, *parts).double(), _exact(x, *parts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_rounded_once(dtype):
    x, affine = torch.randn(5, 64).to(dtype), _affine(64, dtype)
    # half an ulp, and a whole one in bfloat16, which the interpreter truncates to
    bound = {torch.float16: 6e-4, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(_run(x, *affine).double(), _exact(x, *affine), rtol=bound, atol=2e-6)


def test_a_mean_far_larger_than_the_deviation_costs_no_accuracy():
    x, affine = torch.randn(4, 100) + 1e4, _affine(100)
    # an ulp of the mean is a thousandth of a deviation
    torch.testing.assert_close(_run(x, *affine).double(), _exact(x, *affine), rtol=4e-3, atol=4e-3)


def test_a_constant_row_gives_the_bias():
    weight, bias = _affine(40)
    assert torch.equal(_run(torch.full((2, 40), 3.0), weight, bias), bias.expand(2, -1))


@pytest.mark.parametrize("shape", [(3, 5, 40), (9, 129)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_sum_is_rounded_before_it_is_normalised(shape, dtype):
    x, residual, affine = torch.randn(shape).to(dtype), (torch.randn(shape) * 9).to(dtype), _affine(shape[-1], dtype)
    total, out = _run_added(x, residual, *affine)
    bound = {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(total, x + residual, rtol=bound if dtype == torch.bfloat16 else 0, atol=0)
    torch.testing.assert_close(out.double(), _exact(total, *affine), rtol=bound, atol=1e-5)


def test_rows_may_lie_apart():
    wide = torch.full((4, 5, 60), math.nan)
    wide[:, :, 10:50] = torch.randn(4, 5, 40)
    x, residual, affine = wide[0, :, 10:50], wide[1, :, 10:50], _affine(40)
    wide[2:] = math.nan
    total, out = wide[2, :, 10:50], wide[3, :, 10:50]
    add_layer_norm(x, residual, *affine, 1e-5, total, out, config=SMALL)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(out.double(), _exact(total, *affine), rtol=1e-5, atol=1e-5)
    assert wide[2:, :, :10].isnan().all() and wide[2:, :, 50:].isnan().all()


def test_rows_too_long_for_registers_are_refused_by_name():
    columns = MAX_COLUMNS + 1
    with pytest.raises(InvalidRequest, match=f"at most {MAX_COLUMNS} columns, not {columns}"):
        _run(torch.randn(1, columns), None, None)


def test_rows_that_are_not_evenly_spaced_and_strided_parameters_are_taken():
    x, residual, (weight, bias) = (
        torch.randn(4, 3, 8),
        torch.randn(3, 4, 8).transpose(0, 1),
        torch.randn(8, 2).unbind(1),
    )
    total, out = _run_added(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(out.double(), _exact(total, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_zero_sizes_do_nothing(shape):
    assert _run(torch.randn(shape), None, None).shape == shape
