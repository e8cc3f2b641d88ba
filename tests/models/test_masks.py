import numpy as np
import pytest
import torch
from PIL import Image

from stylefast.errors import ImageError, InvalidRequest
from stylefast.models.masks import load_mask, mask_vectors
from stylefast.models.pictures import say_once
from stylefast.record_values import Store
from stylefast.styles.embeddings import StageEmbedding
from stylefast.styles.image_embeds import read_image_embeds
from stylefast.styles.instant_style import InstantStyle


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
    for mask in (
        edge(height, width, width * 503 // 1024),
        torch.rand(height, width, generator=torch.Generator().manual_seed(1)),
    ):
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


def drawn(mode, ground, shape, **options):
    """A mask whose left half is drawn and whose right half is the ground."""
    mask = Image.new(mode, (64, 48), ground)
    mask.paste(shape, (0, 0, 32, 48))
    mask.info.update(options)
    return mask


LEFT = np.zeros((48, 64))
LEFT[:, :32] = 1


def with_alpha(mode):
    """A mask in a palette that is white all over, and transparent in its right half."""
    mask = drawn("P", 0, 1)
    mask.putpalette([255] * 768)
    if mode == "PA":
        mask.putalpha(Image.fromarray((LEFT * 255).astype(np.uint8)))
    else:
        mask.info["transparency"] = 0
    return mask


HALVES = {
    "white on a transparent ground": drawn("RGBA", (0, 0, 0, 0), (255, 255, 255, 255)),
    "white on a transparent white ground": drawn("RGBA", (255, 255, 255, 0), (255, 255, 255, 255)),
    "grey with alpha": drawn("LA", (255, 0), (255, 255)),
    "a palette with alpha": with_alpha("P"),
    "a palette with alpha per pixel": with_alpha("PA"),
    "one bit": drawn("1", 0, 1),
    "16 bits": Image.fromarray((LEFT * 65535).astype(np.uint16)),
    "floating point pixels": Image.fromarray(LEFT.astype(np.float32)),
    "an array of bools": LEFT.astype(bool),
    "an array of floats": LEFT,
    "an array of bytes": (LEFT * 255).astype(np.uint8),
    "an array with alpha": np.dstack([np.full((48, 64, 3), 255), LEFT * 255]).astype(np.uint8),
    "a tensor of bools": torch.from_numpy(LEFT).bool(),
    "a tensor of bytes": torch.from_numpy(LEFT).byte(),
}


@pytest.mark.parametrize("kind", HALVES)
def test_what_is_drawn_acts_and_a_transparent_ground_does_not(kind):
    assert torch.equal(load_mask(HALVES[kind]), torch.from_numpy(LEFT).float())


def test_an_array_of_zeros_and_ones_out_of_255_is_refused_and_one_that_acts_nowhere_is_told_of(caplog):
    say_once.cache_clear()
    with pytest.raises(ImageError, match=r"only 0 and 1, but white is 255; pass mask.astype\(bool\)"):
        load_mask(LEFT.astype(np.uint8))
    for _ in range(2):
        load_mask(drawn("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)))
    assert [record.message for record in caplog.records if "has no effect" in record.message] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "mask, words",
    [
        (torch.zeros(1, 16, 16), r"\[height, width\]"),
        (torch.full((16, 16), 1.5), r"\[0, 1\]"),
        (torch.full((16, 16), float("nan")), "nan"),
        (torch.zeros(8, 9), "8 x 9.*16 x 16"),
        (torch.zeros(16, 16, dtype=torch.complex64), "real numbers"),
    ],
    ids=["three dimensions", "beyond one", "nan", "another size", "complex"],
)
def test_tensors_that_are_no_masks_are_refused(mask, words):
    with pytest.raises(ImageError, match=words):
        load_mask(mask, (16, 16))


WITHOUT_NUMBERS = {
    "meta": (torch.zeros(16, 16, device="meta"), "is a tensor on the device meta, which has no values; load them"),
    "sparse": (torch.ones(16, 16).to_sparse(), "is a tensor of layout sparse_coo; give it dense"),
    "quantised": (
        torch._empty_affine_quantized((16, 16), scale=1, zero_point=0, dtype=torch.quint8),
        r"is a quantised tensor \(quint8\)",
    ),
    "bits": (
        torch.zeros(16, 16, dtype=torch.uint8).view(torch.bits8),
        "a tensor of bits8, which are not plain numbers",
    ),
}


@pytest.mark.parametrize("mask, words", WITHOUT_NUMBERS.values(), ids=WITHOUT_NUMBERS)
def test_tensors_without_numbers_at_hand_are_refused_wherever_they_are_given(mask, words, tmp_path):
    for call in (
        lambda: load_mask(mask),
        lambda: load_mask(mask, (16, 16)),
        lambda: InstantStyle("a.png", mask=mask),
        lambda: InstantStyle("a.png", mask=[mask]),
        lambda: Store(tmp_path).tensor(mask),
        lambda: StageEmbedding("chalk", mask, mask),
    ):
        with pytest.raises(InvalidRequest, match=words):
            call()


def test_a_nested_tensor_is_no_mask():
    with pytest.raises(ImageError, match="is a nested tensor; give it dense"):
        load_mask(torch.nested.nested_tensor([torch.ones(16), torch.ones(9)], layout=torch.jagged))


def test_embeddings_without_numbers_at_hand_are_refused():
    for name in ("meta", "sparse"):
        with pytest.raises(InvalidRequest, match=f"image_embeds {WITHOUT_NUMBERS[name][1]}"):
            read_image_embeds(WITHOUT_NUMBERS[name][0])


def test_feature_maps_without_extent_are_refused():
    with pytest.raises(InvalidRequest, match="at least 1"):
        mask_vectors(torch.ones(8, 8), [(0, 4)])
