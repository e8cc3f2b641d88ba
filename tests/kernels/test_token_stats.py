"""Token statistics in every form: one pass, any strides, large means, a single token."""

import pytest
import torch

from stylefast.kernels.adain import stats_operation as operation
from stylefast.kernels.adain import token_stats, token_stats_ref
from stylefast.kernels.shared_attention import HEAD_SIZES
from tests.kernels.conformance import (
    LAYOUTS,
    Draw,
    assert_as_near_as_pytorch,
    captured,
    each,
    each_type,
    equal,
    forms,
    laid_out,
    normal,
    same_bits_on_any_number_of_threads,
)


def reference(tensors):
    return tuple(torch.stack(parts) for parts in zip(*map(token_stats_ref, tensors), strict=True))


FORMS = forms(reference, small={"block_t": 16, "stretch": 64, "num_warps": 4, "num_stages": 2}, committed=None)
FAST = "torch cpp triton"
CORE = [form for form in FORMS if form.name != "triton-committed"]
EXAMPLES = {"torch": 40, "cpp": 40, "triton": 4}
TOKENS = (1, 2, 7, 16, 37, 63, 64, 65, 129, 300)


def check(form, tensors, **bound):
    mean, variance = form(operation, tensors)
    correction, whole = min(1, tensors[0].shape[1] - 1), torch.stack(tensors)
    exact_variance, exact_mean = torch.var_mean(whole.double(), 2, correction=correction)
    own_variance, own_mean = torch.var_mean(whole.float(), 2, correction=correction)
    assert_as_near_as_pytorch(mean, own_mean, exact_mean, **bound)
    assert (variance >= 0).all()
    # a running mean costs the kernels a few roundings more than two passes
    assert_as_near_as_pytorch(variance, own_variance, exact_variance, ulps=16 if form.kind == "triton" else 4)


@each_type(FORMS, FAST)
def test_drawn_calls_are_as_near_to_double_precision_as_pytorch(form, dtype):
    for seed in range(EXAMPLES[form.kind]):
        draw = Draw(seed)
        widths = (8, 24, *HEAD_SIZES) if form.kind != "triton" else (12, 32, 40)
        shape = (draw.one((1, 2, 3)), draw.one(TOKENS), draw.one((1, 2)), draw.one(widths))
        centre, spread = draw.one((0.0, -3.0, 200.0)), draw.one((0.0, 0.01, 1.0, 50.0))
        tensors = [(draw.normal(*shape) * spread + centre).to(dtype) for _ in range(draw.one((1, 2, 3)))]
        views = [laid_out(x, draw.one(LAYOUTS)) for x in tensors]
        check(form, views, size=abs(centre) + 4 * spread)


@each(CORE)
def test_the_variance_is_unbiased_and_that_of_one_token_is_0(form):
    x = normal(3, 13, 2, 40) * 3 + 1
    mean, variance = form(operation, [x])
    torch.testing.assert_close(mean[0].double(), x.double().mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance[0].double(), x.double().var(1, unbiased=True), rtol=1e-5, atol=1e-5)
    mean, variance = form(operation, [torch.ones(2, 1, 2, 40)])
    assert mean.eq(1).all() and variance.eq(0).all()


@each(CORE)
def test_a_mean_far_from_zero_and_a_first_token_far_from_the_mean_cost_no_digits(form):
    centre, rtol = (1000, 1e-4) if form.kind == "cpp" else (100, 1e-3)
    x = normal(1, 600, 1, 64) * 0.01 + centre
    torch.testing.assert_close(form(operation, [x])[1][0].double(), x.double().var(1), rtol=rtol, atol=0)
    x = normal(1, 600, 1, 64, seed=1)
    x[:, 0] = 1e4
    torch.testing.assert_close(form(operation, [x])[1][0].double(), x.double().var(1), rtol=1e-5, atol=0)


@each(CORE, FAST)
def test_statistics_of_a_constant_channel_are_exact(form):
    mean, variance = form(operation, [torch.full((1, 333, 1, 40), 0.1)])
    torch.testing.assert_close(mean, torch.full_like(mean, 0.1), rtol=3e-7, atol=0)
    assert (variance < 1e-13).all()


@each_type(FORMS, "cpp")
def test_sums_err_no_more_than_in_double_precision_and_the_same_on_any_number_of_threads(form, dtype):
    x = normal(2, 1030, 3, 40, dtype=dtype)
    exact_variance, exact_mean = torch.var_mean(x.double(), dim=1)
    mean, variance = form(operation, [x])
    for found, exact in ((mean[0], exact_mean), (variance[0], exact_variance)):
        limit = 2 * (exact.float().double() - exact).abs().max()
        assert (found.double() - exact).abs().max() <= limit
    same_bits_on_any_number_of_threads(form, operation, [normal(3, 600, 8, 40, dtype=dtype)])


@each(CORE, FAST)
def test_a_rows_statistics_do_not_depend_on_its_batch_and_no_rows_is_no_work(form):
    x = normal(5, 130, 2, 32)
    together, alone = form(operation, [x]), form(operation, [x[3:4]])
    assert equal(tuple(part[:, 3:4] for part in together), alone)
    assert form(operation, [x[:0]])[1].shape == (1, 0, 2, 32)


def test_the_public_function_returns_fp32_for_one_tensor_or_several():
    x = normal(2, 9, 3, 2, 40, dtype=torch.bfloat16).unbind(2)
    mean, variance = token_stats(x[1])
    assert mean.dtype == variance.dtype == torch.float32 and mean.shape == (2, 2, 40)
    torch.testing.assert_close(variance.double(), x[1].double().var(1, unbiased=True), rtol=1e-5, atol=1e-6)
    assert token_stats(*x)[0].shape == (3, 2, 2, 40)


@pytest.mark.gpu
def test_a_captured_call_follows_new_values():
    x = [normal(4, 1024, 10, 64, seed=i) for i in range(2)]
    replay, given = captured(operation, x)
    for there in given[0]:
        there.mul_(-0.5)
    for found, expected in zip(replay(), reference([-0.5 * part.double() for part in x]), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
