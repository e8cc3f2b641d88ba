import pytest
import torch

from stylefast.errors import InvalidRequest
from stylefast.export.tensorrt_profiles import Profile, Range
from stylefast.export.unet_graph import GraphShape, Tensor, example_inputs, graph_inputs, shape_ranges, with_tokens
from stylefast.models.unet import UNet
from tests.support.small_sdxl import small_unet_config


@pytest.fixture(scope="module")
def unet() -> UNet:
    with torch.device("meta"):
        return UNet(small_unet_config())


def test_a_profile_is_read_from_text_and_written_back():
    profile = Profile.parse("rows=1:4:8, size=512x768:1024x1024:1024x1536,pages=2")
    assert profile.rows == Range(1, 4, 8)
    assert (profile.width, profile.height) == (Range(64, 128, 128), Range(96, 128, 192))
    assert profile.pages == Range(2, 2, 2)
    assert Profile.parse(str(profile)) == profile
    assert Profile.from_dict(profile.to_dict()) == profile


def test_a_size_counts_the_pixels_of_the_models_latents():
    assert Profile.parse("size=64x48", scale=4).width == Range(16, 16, 16)
    assert Profile.parse("latents=16x12") == Profile.parse("size=128x96")


def test_counts_that_are_not_named_follow_from_the_rows():
    profile = Profile.parse("rows=2:3:6")
    assert profile.text_pages == Range(1, 3, 6)
    assert profile.image_pages == Range(1, 3, 12)
    assert profile.masks.most == 12


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rows=4:2:8", "4:2:8"),
        ("rows=0:1:2", "0:1:2"),
        ("rows=1:2", "2 values"),
        ("rows=many", "many"),
        ("rows=1.5", "1.5"),
        ("rows", "rows"),
        ("", "not understood"),
        ("lines=3", "lines"),
        ("rows=1,rows=2", "twice"),
        ("size=512x512,height=64", "height twice"),
        ("size=512", "512"),
        ("size=500x512", "multiples of 8"),
        ("size=1024x1024:512x512:2048x2048", "128:64:256"),
        ("rows=1:4:1000", "256"),
        ("latents=4x64", "8 to 1024"),
        ("rows=-1:2:3", "-1"),
    ],
)
def test_text_that_is_no_profile_is_refused_by_name(text, named):
    with pytest.raises(InvalidRequest, match=named):
        Profile.parse(text)


@pytest.mark.parametrize("flavour", ["plain", "live", "banked"])
def test_every_input_of_the_unet_gets_shapes_that_its_example_inputs_have(unet, flavour):
    shape = GraphShape(flavour)
    profile = Profile.parse("rows=1:3:5,latents=9x8:12x16:17x16,text_pages=1:2:4,image_pages=1:5:6,masks=1:2:3")
    shapes = profile.shapes(graph_inputs(unet, shape), unet.attention_sizes)
    varying = {t.name for t in graph_inputs(unet, shape) if any(isinstance(d, str) for d in t.dims)}
    assert shapes.keys() == varying
    for corner, sizes in enumerate(profile.sizes()):
        inputs = {t.name: t.dims for t in graph_inputs(unet, shape)}
        sizes = with_tokens(unet, sizes)
        for name, found in shapes.items():
            assert found[corner] == tuple(sizes.get(dim, dim) for dim in inputs[name])
    assert shapes["latents"] == ((1, 4, 8, 9), (3, 4, 16, 12), (5, 4, 16, 17))


def test_token_counts_are_those_of_real_inputs():
    unet = UNet(small_unet_config())
    profile = Profile.parse("rows=2,latents=9x13,text_pages=2,image_pages=3,image_tokens=4,masks=2,pages=2")
    shape = GraphShape("banked")
    shapes = profile.shapes(graph_inputs(unet, shape), unet.attention_sizes)
    inputs = example_inputs(unet, shape, profile.sizes(unet.attention_sizes)[1])
    assert {name: tuple(inputs[name].shape) for name in shapes} == {name: found[1] for name, found in shapes.items()}


def test_tokens_and_units_of_loras_follow_from_the_shape():
    unet = UNet(small_unet_config())
    shape = GraphShape("plain", segments=0, text_chunks=3, lora_rank=48, lora_slots=2)
    inputs, layout = graph_inputs(unet, shape), unet.loras
    with pytest.raises(InvalidRequest, match="text_tokens"):
        Profile().shapes(inputs, unet.attention_sizes)
    shapes = Profile.parse("rows=1:2:4").shapes(inputs, unet.attention_sizes, shape_ranges(unet, shape))
    assert shapes.keys() == {t.name for t in inputs if any(isinstance(d, str) for d in t.dims)}
    assert [corner[3] for corner in shapes["text_kv_0"]] == [77, 77, 231]
    # a table has four units for three
    layers = len(layout.names)
    assert shapes["lora_unit"] == ((layers, 1, 1), (layers, 2, 4), (layers, 4, 8))
    for kind, (taps, inner, out) in enumerate(layout.kinds):
        if f"lora_down_{kind}" in shapes:
            least, usual, most = shapes[f"lora_down_{kind}"]
            assert least == (1, taps, inner, 16) and usual[0] == 4 * layout.kind_of.count(kind)
            assert most[0] * 16 * max(taps * inner, out) < 2**31


def test_a_dimension_that_profiles_do_not_know_is_refused():
    with pytest.raises(InvalidRequest, match="frames"):
        Profile().shapes([Tensor("video", torch.float32, ("rows", "frames"))])
