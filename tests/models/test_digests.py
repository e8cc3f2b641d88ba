"""Digests of tensors keep their values, which are stored in manifests, banks and records."""

import pytest
import torch

from stylefast.models.digests import all_finite, sampled_digest, tensor_bytes, weights_digest

STATE = {
    "b": torch.arange(600, dtype=torch.float32).view(20, 30).T,
    "a": torch.tensor(1.5),
    "c": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "d": torch.tensor([True, False]),
    "e": torch.zeros(0, dtype=torch.int64),
}


def test_digests_of_the_same_tensors_are_those_of_earlier_versions():
    assert weights_digest(STATE) == "47ae0ffa43d50951d5ff6a2326bd039bf279b9eab8f77c9a39f5d2338b05ccdb"
    assert sampled_digest(STATE) == "c03febe0bce7dac6898c661f03f5294aae3e8646a04b9b9e3d164af287b8d990"


def test_a_dense_tensor_is_not_copied_and_a_view_is_put_in_order():
    x = torch.arange(6, dtype=torch.int16).view(2, 3)
    seen = tensor_bytes(x)
    x.zero_()
    assert bytes(seen) == bytes(12)
    assert bytes(tensor_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T)) == bytes([1, 3, 2, 4])


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_that_are_not_finite_are_found_in_every_type_and_layout(dtype):
    largest = torch.finfo(dtype).max
    sound = torch.tensor([[0.0, -0.0, 1.0], [largest, -largest, torch.finfo(dtype).tiny]], dtype=torch.float64).to(
        dtype
    )
    for x in (sound, sound.T, sound[:, 1:], sound[0, 0], sound[:0]):
        assert all_finite(x)
    odd = [float("nan")] if dtype == torch.float8_e4m3fn else [float("nan"), float("inf"), -float("inf")]
    for value in odd:
        for place in ((0, 0), (1, 2)):
            broken = sound.double()
            broken[place] = value
            assert not all_finite(broken.to(dtype)) and not all_finite(broken.to(dtype).T)
            assert not all_finite(broken.to(dtype)[place])
