"""Token statistics in C++, and the instruction sets that the kernels find."""

import pytest
import torch

from stylefast._extension import extension
from tests.kernels.cpp_attention_cases import DTYPES, PLAIN, WIDTHS, normal, shared, statistics
from tests.kernels.near_fp64 import NEEDS_EXTENSION

pytestmark = NEEDS_EXTENSION


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("width", WIDTHS, ids="{} wide".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_equal_the_formula(instruction_set, dtype, width, tokens):
    xs = normal(2, tokens, 3, 3, width, seed=0, dtype=dtype).unbind(2)
    mean, variance = statistics(*xs)
    for i, x in enumerate(xs):
        torch.testing.assert_close(mean[i].double(), x.double().mean(1), rtol=1e-6, atol=1e-6)
        expected = x.double().var(1) if tokens > 1 else torch.zeros(2, 3, width, dtype=torch.float64)
        torch.testing.assert_close(variance[i].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_mean_far_from_zero_and_a_first_token_far_from_the_mean_keep_the_variance(instruction_set):
    x = normal(1, 4096, 1, 64, seed=0) * 0.01 + 1000.0
    mean, variance = statistics(x)
    torch.testing.assert_close(variance[0].double(), x.double().var(1), rtol=1e-4, atol=0)
    x = normal(1, 4096, 1, 64, seed=1)
    x[:, 0] = 1e4
    mean, variance = statistics(x)
    torch.testing.assert_close(variance[0].double(), x.double().var(1), rtol=1e-5, atol=0)


def test_statistics_of_a_constant_channel_are_exact(instruction_set):
    mean, variance = statistics(torch.full((1, 333, 1, 40), 0.1))
    torch.testing.assert_close(mean, torch.full_like(mean, 0.1), rtol=3e-7, atol=0)
    assert (variance < 1e-14).all()


def test_the_features_found_contain_what_the_kernels_use():
    features = extension().cpu_features()
    assert set(features) <= {"avx2", "fma", "f16c", "avx512", "avx512_bf16"}
    assert extension().instruction_set() in ("", *features)


@pytest.mark.parametrize("name", ["sse", "avx512_bf17", "AVX2"])
def test_an_unknown_instruction_set_is_refused_with_those_there_are(monkeypatch, name):
    usable = extension().instruction_set()
    monkeypatch.setenv("STYLEFAST_CPU", name)
    with pytest.raises(ValueError, match=f"STYLEFAST_CPU is '{name}'.*{usable or 'none'}"):
        extension().instruction_set()
    q = torch.zeros(1, 1, 1, 32)
    with pytest.raises(ValueError, match="STYLEFAST_CPU"):
        shared(q, q, q, [[-1]], [PLAIN])
