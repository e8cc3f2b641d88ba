"""Group norm with SiLU, and with statistics pooled with a reference."""

import pytest
import torch
import torch.nn.functional as F

from stylefast.kernels.group_norm_silu import group_norm_silu, group_norm_silu_ref

GROUPS, CHANNELS = 4, 16


def _case(memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, CHANNELS, 5, 7, generator=generator) * torch.tensor([1.0, 2.0, 0.5, 3.0])[:, None, None, None]
    x = (x + torch.arange(4.0)[:, None, None, None]).contiguous(memory_format=memory_format)
    return x, GROUPS, torch.randn(CHANNELS, generator=generator), torch.randn(CHANNELS, generator=generator), 1e-5


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_without_a_reference_it_is_pytorchs_group_norm(silu, memory_format):
    x, groups, weight, bias, eps = _case(memory_format)
    expected = F.group_norm(x, groups, weight, bias, eps)
    expected = F.silu(expected) if silu else expected
    torch.testing.assert_close(group_norm_silu(x, groups, weight, bias, eps, silu), expected)
    nobody = torch.full((4,), -1)
    shared = group_norm_silu(x, groups, weight, bias, eps, silu, nobody)
    torch.testing.assert_close(shared, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(group_norm_silu_ref(x, groups, weight, bias, eps, silu), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pooling_by_two_floats_equals_concatenating_the_feature_maps(memory_format):
    page = torch.tensor([-1, 0, 0, 2])
    arguments = (*_case(memory_format), True, page)
    torch.testing.assert_close(group_norm_silu(*arguments), group_norm_silu_ref(*arguments), rtol=1e-5, atol=1e-5)


def test_pooling_with_itself_changes_nothing():
    x, *rest = _case()
    itself = group_norm_silu(x, *rest, True, torch.arange(4))
    torch.testing.assert_close(itself, group_norm_silu(x, *rest, True), rtol=1e-5, atol=1e-5)


def test_a_pool_entry_of_another_size_is_weighted_by_its_elements():
    x, groups, weight, bias, eps = _case()
    other = torch.randn(1, CHANNELS, 9, 9, generator=torch.Generator().manual_seed(1)) * 2 - 1
    flat = other.reshape(1, groups, -1)
    stats = (flat.mean(-1), flat.var(-1, unbiased=False), flat.shape[-1])
    page = torch.tensor([4, -1, -1, -1])
    out = group_norm_silu(x, groups, weight, bias, eps, False, page, *stats)
    both = torch.cat([x[0].reshape(groups, -1), flat[0]], -1)
    deviation = (both.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    expected = (x[0].reshape(groups, -1) - both.mean(-1, True)) / deviation
    expected = expected.reshape(x[0].shape) * weight[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        out, group_norm_silu_ref(x, groups, weight, bias, eps, False, page, *stats), rtol=1e-5, atol=1e-5
    )
