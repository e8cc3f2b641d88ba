import numpy as np
import pytest
import torch
from PIL import Image

from stylefast.errors import ImageError, InvalidRequest
from stylefast.models.masks import load_mask, mask_vectors


def diffusers_vector(mask, queries):
    from diffusers.image_processor import IPAdapterMaskProcessor

    return IPAdapterMaskProcessor.downsample(mask[None], 1, queries, 1)[0, :, 0]


def edge(height, width, at):
    mask = torch.zeros(height, width)
    mask[:, at:] = 1
    return mask


@pytest.mark.parametrize(
    "height, width, sizes",
    [
        (1024, 1024, [(64, 64), (32, 32)]),
        (1216, 832, [(76, 52), (38, 26)]),
        (832, 1216, [(52, 76), (26, 38)]),
        (912, 1144, [(57, 72), (29, 36)]),
        (1144, 912, [(72, 57), (36, 29)]),
        (128, 128, [(8, 8), (4, 4)]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_mask_vectors_equal_the_downsampling_of_diffusers(height, width, sizes):
    for mask in (edge(height, width, width * 503 // 1024), torch.rand(
        height, width, generator=torch.Generator().manual_seed(1)
    )):
        for vector, (h, w) in zip(mask_vectors(mask, sizes), sizes):
            assert vector.shape == (h * w,)
            assert torch.equal(vector, diffusers_vector(mask, h * w))


def test_hard_edges_overshoot_as_they_do_in_diffusers():
    both = torch.cat([mask_vectors(edge(1024, 1024, at), [(64, 64)])[0] for at in (503, 505)])
    assert both.min().item() == pytest.approx(-0.094, abs=1e-3)
    assert both.max().item() == pytest.approx(1.094, abs=1e-3)


def test_a_mask_of_ones_stays_ones():
    for vector in mask_vectors(torch.ones(912, 1144), [(57, 72), (29, 36)]):
        torch.testing.assert_close(vector, torch.ones_like(vector))


@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=["as it is", "scaled"])
def test_pictures_become_the_same_zeros_and_ones_as_in_diffusers(size):
    from diffusers.image_processor import IPAdapterMaskProcessor

    draw = np.random.default_rng(2)
    picture = Image.fromarray(draw.integers(0, 256, (64, 64), dtype=np.uint8))
    expected = IPAdapterMaskProcessor().preprocess(picture, height=size[0], width=size[1])[0, 0]
    mask = load_mask(picture, size)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(mask, expected)


def test_soft_tensors_are_kept_as_they_are():
    mask = torch.linspace(0, 1, 32 * 24).reshape(32, 24)
    assert torch.equal(load_mask(mask, (32, 24)), mask)


@pytest.mark.parametrize(
    "mask, words",
    [
        (torch.zeros(1, 16, 16), r"\[height, width\]"),
        (torch.full((16, 16), 1.5), r"\[0, 1\]"),
        (torch.full((16, 16), float("nan")), "nan"),
        (torch.zeros(8, 9), "8 x 9.*16 x 16"),
    ],
    ids=["three dimensions", "beyond one", "nan", "another size"],
)
def test_tensors_that_are_no_masks_are_refused(mask, words):
    with pytest.raises(ImageError, match=words):
        load_mask(mask, (16, 16))


def test_feature_maps_without_extent_are_refused():
    with pytest.raises(InvalidRequest, match="at least 1"):
        mask_vectors(torch.ones(8, 8), [(0, 4)])
