"""The Triton kernels of token_stats and adain_affine: interpreted on the CPU, or compiled where there is a GPU."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package")

import triton

from stylefast.kernels.gpu.adain_affine import adain_affine
from stylefast.kernels.gpu.token_stats import token_stats

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
CONFIG = {"block_t": 16, "stretch": 64, "num_warps": 4, "num_stages": 2}
AFFINE_CONFIG = {"block": 64, "num_warps": 4}


def _statistics(xs, config=CONFIG):
    shape = (len(xs), xs[0].shape[0], *xs[0].shape[2:])
    mean, variance = (torch.full(shape, math.nan, device=xs[0].device) for _ in range(2))
    token_stats(xs, mean, variance, config=config)
    return mean, variance


def _expected(xs):
    pairs = [torch.var_mean(x.double(), 1, correction=min(1, x.shape[1] - 1)) for x in xs]
    return torch.stack([mean for _, mean in pairs]), torch.stack([variance for variance, _ in pairs])


@pytest.mark.parametrize("width", [12, 40, 64])
@pytest.mark.parametrize("tokens", [1, 2, 16, 37, 64, 65, 300])
def test_mean_and_variance_are_those_of_fp64_for_any_number_of_tokens(tokens, width):
    xs = [torch.randn(2, tokens, 2, width, device=DEVICE) * 3 + i for i in range(2)]
    for got, expected in zip(_statistics(xs), _expected(xs)):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_fp32(dtype):
    xs = [torch.randn(1, 150, 1, 32, device=DEVICE).to(dtype)]
    for got, expected in zip(_statistics(xs), _expected(xs)):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


def test_a_mean_a_thousand_deviations_away_costs_the_variance_no_digits():
    xs = [torch.randn(1, 200, 1, 32, device=DEVICE) + 1000]
    mean, variance = _statistics(xs)
    expected = _expected(xs)
    torch.testing.assert_close(mean.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), expected[1], rtol=2e-4, atol=0)


def test_three_strided_views_of_one_projection_are_taken_in_one_launch():
    fused = torch.randn(3, 70, 3, 2, 40, device=DEVICE)
    xs = [*fused.unbind(2)[:2], torch.randn(3, 2, 70, 40, device=DEVICE).transpose(1, 2)]
    for got, expected in zip(_statistics(xs), _expected(xs)):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


def test_views_at_an_odd_offset_are_taken():
    xs = [torch.randn(2, 33, 2, 43, device=DEVICE)[..., 3:35]]
    for got, expected in zip(_statistics(xs), _expected(xs)):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


def test_a_rows_statistics_do_not_depend_on_its_batch():
    x = torch.randn(5, 130, 2, 32, device=DEVICE)
    together, alone = _statistics([x]), _statistics([x[3:4]])
    for a, b in zip(together, alone):
        assert torch.equal(a[:, 3:4], b)


def test_no_rows_is_no_work():
    mean, variance = _statistics([torch.zeros(0, 8, 2, 32, device=DEVICE)])
    assert mean.shape == variance.shape == (1, 0, 2, 32)


def _affine(mean, variance, page, strength, pool_mean=None, pool_variance=None):
    gain, offset = (torch.full(mean.shape, math.nan, device=DEVICE) for _ in range(2))
    adain_affine(mean, variance, page, strength, pool_mean, pool_variance, gain, offset, config=AFFINE_CONFIG)
    return gain, offset


def _reference_affine(mean, variance, page, strength, pool_mean, pool_variance):
    gain, offset = torch.ones_like(mean), torch.zeros_like(mean)
    for row, p in enumerate(page.tolist()):
        for i, s in enumerate(strength[row].tolist()):
            if p < 0 or s == 0:
                continue
            live = p < mean.shape[1]
            target_mean = mean[i, p] if live else pool_mean[i, p - mean.shape[1]]
            target_variance = variance[i, p] if live else pool_variance[i, p - mean.shape[1]]
            ratio = ((target_variance + 1e-5) / (variance[i, row] + 1e-5)).sqrt()
            gain[i, row], offset[i, row] = 1 + s * (ratio - 1), s * (target_mean - mean[i, row] * ratio)
    return gain, offset


@pytest.mark.parametrize("width", [32, 40], ids=["32 channels", "40 channels"])
def test_rows_follow_live_rows_and_pages_of_a_pool_by_their_strength(width):
    mean, variance = torch.randn(2, 4, 3, width, device=DEVICE), torch.rand(2, 4, 3, width, device=DEVICE)
    # a bank's slice of one layer, as a strided view
    bank_mean = torch.randn(2, 5, 2, 3, width, device=DEVICE)[:, :, 1]
    bank_variance = torch.rand(2, 5, 2, 3, width, device=DEVICE)[:, :, 1]
    page = torch.tensor([-1, 0, 8, 6], device=DEVICE)
    strength = torch.tensor([[1.0, 0.0, 0.4, 1.0], [1.0, 0.7, 1.0, 0.0]], device=DEVICE).T
    got = _affine(mean, variance, page, strength, bank_mean, bank_variance)
    expected = _reference_affine(mean, variance, page, strength, bank_mean, bank_variance)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_strength_0_and_page_minus_1_are_the_identity_whatever_the_statistics_hold():
    mean, variance = torch.full((1, 3, 1, 32), math.nan, device=DEVICE), torch.full((1, 3, 1, 32), -1.0, device=DEVICE)
    strength = torch.tensor([[0.0], [1.0], [0.0]], device=DEVICE)
    gain, offset = _affine(mean, variance, torch.tensor([1, -1, 99], device=DEVICE), strength)
    assert (gain == 1).all() and (offset == 0).all()


def test_a_page_out_of_range_gives_nan_in_its_row_alone():
    mean, variance = torch.randn(1, 4, 1, 32, device=DEVICE), torch.rand(1, 4, 1, 32, device=DEVICE)
    page = torch.tensor([4, -2, 2**40, 1], device=DEVICE)
    gain, offset = _affine(mean, variance, page, torch.ones(4, 1, device=DEVICE))
    assert gain[:, :3].isnan().all() and offset[:, :3].isnan().all()
    assert gain[:, 3].isfinite().all() and offset[:, 3].isfinite().all()


def test_a_constant_channel_stays_finite():
    mean, variance = torch.ones(1, 2, 1, 32, device=DEVICE), torch.zeros(1, 2, 1, 32, device=DEVICE)
    gain, offset = _affine(mean, variance, torch.tensor([1, 0], device=DEVICE), torch.ones(2, 1, device=DEVICE))
    assert gain.isfinite().all() and offset.isfinite().all()
