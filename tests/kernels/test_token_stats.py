"""Token statistics: one pass, any strides, large means, a single token."""

import torch

from stylefast.kernels.token_stats import token_stats, token_stats_ref


def test_the_variance_is_unbiased_and_taken_over_tokens():
    x = torch.randn(3, 13, 2, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for stats in (token_stats, token_stats_ref):
        mean, variance = stats(x)
        torch.testing.assert_close(mean, x.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(variance, x.var(1, unbiased=True), rtol=1e-5, atol=1e-5)


def test_a_large_mean_does_not_drown_the_variance():
    x = torch.randn(2, 4096, 1, 4, generator=torch.Generator().manual_seed(1)) * 0.01 + 100
    exact = x.double().var(1, unbiased=True).float()
    torch.testing.assert_close(token_stats(x)[1], exact, rtol=1e-3, atol=0)


def test_a_single_token_has_no_variance_and_no_nan():
    mean, variance = token_stats(torch.ones(2, 1, 2, 4))
    assert mean.eq(1).all() and variance.eq(0).all()
    assert token_stats_ref(torch.ones(2, 1, 2, 4))[1].eq(0).all()


def test_half_precision_input_gives_fp32_statistics_of_strided_views():
    fused = torch.randn(2, 9, 3, 2, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    view = fused[:, :, 1]
    mean, variance = token_stats(view)
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(variance, view.float().var(1, unbiased=True), rtol=1e-5, atol=1e-6)
