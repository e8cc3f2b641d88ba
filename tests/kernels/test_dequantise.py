"""Stored fp8 back to floats: every form writes what the formula says, rounded once, wherever it is told to."""

import pytest
import torch

from stylefast import kernels
from stylefast.kernels.dequantise import FP8, dequantise_ref, operation
from tests.kernels.conformance import FLOATS, NAN, Draw, each, each_type, equal, forms

FORMS = forms(triton=None)


def written(form, values, scale, dtype=torch.float32):
    out = torch.full(values.shape, NAN, dtype=dtype)
    form(operation, scale, values.view(torch.uint8), out)
    return out


@each_type(FORMS)
def test_every_code_equals_the_formula_rounded_once_and_bit_for_bit_in_fp32(form, dtype):
    if form.name.startswith("triton") and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16 where a GPU rounds")
    for shape in ((2, 3, 256), (3, 9, 40), (1, 17, 7), (2, 1, 1)):
        codes = torch.arange(torch.Size(shape).numel(), dtype=torch.int64).remainder(256).to(torch.uint8)
        codes = torch.where(codes & 0x7F == 0x7F, 0, codes)  # a bank holds no NaN
        values, scale = codes.view(shape).view(FP8), Draw(1).uniform(shape[0], shape[2]) + 1e-3
        assert equal(written(form, values, scale, dtype), dequantise_ref(values, scale).to(dtype))


@each(FORMS)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_zero_sizes_do_nothing(form, shape):
    assert written(form, torch.zeros(shape).to(FP8), torch.ones(shape[0], shape[2])).shape == shape


def test_the_public_function_allocates_or_writes_into_a_given_tensor():
    values, scale = (torch.randn(4, 6, 33) * 90).to(FP8), torch.rand(4, 33)
    assert equal(kernels.dequantise(values, scale), dequantise_ref(values, scale))
    for dtype in FLOATS:
        out = torch.empty(values.shape, dtype=dtype)
        assert kernels.dequantise(values, scale, out) is out
        assert equal(out, dequantise_ref(values, scale).to(dtype))
