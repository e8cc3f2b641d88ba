"""Layer norm in every form, alone and after a residual."""

import pytest
import torch
import torch.nn.functional as F

from stylefast.errors import InvalidRequest
from stylefast.kernels.layer_norm import add_operation, layer_norm_ref, operation
from tests.kernels.conformance import (
    FLOATS,
    GPU,
    NAN,
    Draw,
    assert_as_near_as_pytorch,
    captured,
    each,
    each_type,
    equal,
    forms,
    normal,
)

EPS = 1e-5
FORMS = forms(layer_norm_ref, small={"elements": 128, "num_warps": 4}, committed=None)
FAST = "torch cpp triton"
CORE = [form for form in FORMS if form.name != "triton-committed"]
EXAMPLES = {"torch": 20, "cpp": 20, "triton": 4}


def check(found, x, weight, bias, **bound):
    exact = layer_norm_ref(x.double(), weight.double(), bias.double(), EPS)
    assert_as_near_as_pytorch(found, F.layer_norm(x, x.shape[-1:], weight, bias, EPS), exact, **bound)


def affine(channels, dtype=torch.float32):
    return normal(channels, seed=8, dtype=dtype), normal(channels, seed=9, dtype=dtype)


@each_type(FORMS, FAST)
def test_drawn_calls_are_as_near_to_the_formula_as_pytorch_and_round_the_sum_first(form, dtype):
    for seed in range(EXAMPLES[form.kind]):
        draw = Draw(seed)
        lead, channels = [draw.one((1, 2, 3, 5)) for _ in range(draw.one(range(4)))], draw.one((1, 5, 40, 64, 77, 129))
        centre = draw.one((0.0, 30.0))
        x, residual = ((draw.normal(*lead, channels) * 2 + centre).to(dtype) for _ in range(2))
        if draw.one((True, False)):  # as slices of wider rows
            x, residual = (x.new_full((*lead, channels + 3), NAN)[..., 1:-2].copy_(part) for part in (x, residual))
        parameters = affine(channels, dtype)
        # the mean is known to a unit of its own size, and dividing by the deviation makes more of it
        bound = {"logits": 8 * centre}
        check(form(operation, x, *parameters, EPS), x, *parameters, **bound)
        total, out = form(add_operation, x, residual, *parameters, EPS)
        if form.name.startswith("triton") and dtype == torch.bfloat16:  # the interpreter truncates
            torch.testing.assert_close(total, x + residual, rtol=8e-3, atol=0)
        else:
            assert equal(total, x + residual)
        check(out, total, *parameters, **bound)


@each(CORE, FAST)
def test_rows_far_from_zero_keep_their_digits(form):
    x = normal(5, 640) + 1e5 * torch.arange(5)[:, None]
    out = form(operation, x, *affine(640), EPS)
    check(out, x, *affine(640), size=2e3 if form.kind == "triton" else None)


@each(CORE)
def test_constant_rows_give_the_bias(form):
    weight, bias = affine(77)
    assert equal(form(operation, torch.full((2, 77), 3.0), weight, bias, EPS), bias.expand(2, 77))


@each(CORE, FAST)
def test_strided_rows_that_are_not_evenly_spaced_and_strided_parameters_are_taken(form):
    x, residual = normal(4, 6, 90, seed=1)[::2, 1:4, 5:82], normal(3, 2, 77, seed=2).transpose(0, 1)
    weight, bias = normal(77, 2, seed=3).unbind(1)
    total, out = form(add_operation, x, residual, weight, bias, EPS)
    assert equal(total, x + residual)
    check(out, total, weight, bias)


@each(CORE)
def test_a_nan_stays_in_its_row(form):
    x = normal(3, 40)
    x[1, 7] = NAN
    out = form(operation, x, *affine(40), EPS)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@each(CORE, FAST)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_zero_sizes_do_nothing(form, shape):
    assert form(operation, torch.empty(shape), *affine(8), EPS).shape == shape


@each(CORE[-2:-1])
def test_the_kernel_writes_rows_that_lie_apart_and_takes_parameters_that_are_absent(form):
    from stylefast.kernels.gpu.layer_norm import MAX_COLUMNS, add_layer_norm, layer_norm

    x, residual, wide = normal(3, 40, seed=1), normal(3, 40, seed=2), torch.full((2, 3, 60), NAN)
    weight, bias = affine(40)
    total, out = wide[:, :, 10:50]
    add_layer_norm(x, residual, weight, bias, EPS, total, out, config=form.config)
    assert equal(total, x + residual)
    check(out, total, weight, bias)
    assert wide[:, :, :10].isnan().all() and wide[:, :, 50:].isnan().all()
    for given in ((None, None), (weight, None), (None, bias)):
        layer_norm(x, *given, EPS, out, config=form.config)
        ones = torch.ones(40) if given[0] is None else weight
        check(out, x, ones, torch.zeros(40) if given[1] is None else bias)
    with pytest.raises(InvalidRequest, match=f"at most {MAX_COLUMNS} columns, not {MAX_COLUMNS + 1}"):
        layer_norm(torch.empty(1, MAX_COLUMNS + 1), None, None, EPS, torch.empty(1, MAX_COLUMNS + 1))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 4096, 640), (8, 1024, 1280), (3, 77, 2048), (5, 7, 333), (2, 8192)], ids=str)
def test_sdxls_sizes_on_a_gpu_are_as_near_as_pytorch_and_follow_new_values_in_a_graph(shape):
    for dtype in FLOATS:
        x, residual = (normal(*shape, seed=i, dtype=dtype) * 2 + 1 for i in range(2))
        parameters = affine(shape[-1], dtype)
        check(GPU(operation, x, *parameters, EPS), x, *parameters)
        total, out = GPU(add_operation, x, residual, *parameters, EPS)
        assert equal(total, x + residual)
        check(out, total, *parameters)
    replay, given = captured(add_operation, x, residual, *parameters, EPS)
    given[0].mul_(-0.5)
    total, out = replay()
    assert equal(total, -0.5 * x + residual)
    check(out, total, *parameters)
