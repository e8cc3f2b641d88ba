"""Packed weights: what the engine computes with on CPUs unless told otherwise."""

import pytest
import torch

import stylefast as sf
from stylefast.models import prepacked
from stylefast.models.checkpoint import from_pipeline
from tests.support.fp64 import close, measured
from tests.support.scene import RUN, SIZE, sharp_pipeline, small_picture

PICTURE = small_picture(1, (48, 40))
CALL = {"size": SIZE, "steps": RUN["steps"], "output": "latents", "seed": 3}


@pytest.fixture(scope="module")
def packed_engine(pipe):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stylefast.engine.pack", prepacked.pack)
        engine = sf.Engine.from_pipeline(pipe)
    assert prepacked.packed_bytes(engine.unet) == 0  # copies are made when a layer is first used
    engine.generate("a cat", **CALL)
    assert prepacked.packed_bytes(engine.unet) > 0
    return engine


@pytest.mark.parametrize("rows", [16, 33, 200])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_packed_linear_layer_errs_as_pytorch_does(rows, bias):
    torch.manual_seed(0)
    layer, x = prepacked.Linear(96, 40, bias=bias).requires_grad_(False), torch.randn(2, rows, 96)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), None if not bias else layer.bias.double())
    plain = (layer(x).double() - exact).abs().max()
    layer.pack()
    assert (layer(x).double() - exact).abs().max() <= 2 * plain
    assert layer.packed_bytes == layer.weight.nbytes


@pytest.mark.parametrize(("stride", "size"), [(1, (5, 9)), (2, (5, 9)), (1, (16, 16)), (2, (1, 1))], ids=str)
def test_a_packed_convolution_errs_by_rounding_only(stride, size):
    torch.manual_seed(0)
    layer = prepacked.Conv2d(96, 64, 3, stride=stride, padding=1).requires_grad_(False)
    x = torch.randn(2, 96, *size)
    exact = torch.nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double(), stride, 1)
    layer.pack()
    for given in (x, x.to(memory_format=torch.channels_last), x.repeat_interleave(2, 0)[::2]):
        out = layer(given)
        assert out.shape == exact.shape
        # 864 products in a row, each rounded: some ten times 2^-24 of the largest sum
        assert (out.double() - exact).abs().max() <= 2e-6 * exact.abs().max()


def test_weights_that_change_are_packed_again():
    torch.manual_seed(0)
    layer, x = prepacked.Linear(32, 32).requires_grad_(False), torch.randn(20, 32)
    layer.pack()
    layer(x)  # packs what is then changed
    layer.weight += 1
    close(layer(x), measured(torch.nn.functional.linear, x, layer.weight, layer.bias))
    layer.weight = torch.nn.Parameter(torch.zeros(32, 32), requires_grad=False)
    torch.testing.assert_close(layer(x), layer.bias.expand(20, 32))


def test_gradients_take_the_weights_themselves():
    layer, x = prepacked.Linear(32, 32), torch.randn(20, 32, requires_grad=True)
    layer.pack()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(20, 32))


def test_packed_pictures_stay_near_plain_ones(packed_engine, drawn):
    for style in (None, sf.StyleAligned(PICTURE, share_group_norm=True)):
        packed_latents = packed_engine.generate(["a cat", "a dog"], style, **CALL).latents
        close(packed_latents, drawn(["a cat", "a dog"], style, seed=3))


def test_cached_equals_batched_with_packed_weights(packed_engine, drawn):
    settings = {"size": SIZE, "steps": RUN["steps"]}
    for source in ({"reference": PICTURE}, {"prompt": "a dog", "seed": 2}):
        bank = packed_engine.bake(sf.StyleAligned(**source), **settings)
        live = drawn(["a cat", "a fish"], sf.StyleAligned(**source), seed=3, using=packed_engine)
        close(packed_engine.generate(["a cat", "a fish"], sf.StyleAligned(bank), **CALL).latents, live)


@pytest.mark.parametrize("room", [0, 10**9], ids=["no room", "room"])
def test_packing_keeps_to_its_room(room):
    from stylefast.models.unet import UNet

    pipe = sharp_pipeline()
    unet = UNet.from_state(dict(pipe.unet.config), pipe.unet.state_dict())
    assert prepacked.pack(unet, room) == bool(room)
    prepacked.unpack(unet)
    assert prepacked.packed_bytes(unet) == 0


def test_an_engine_whose_weights_are_not_to_be_packed_keeps_no_copies(pipe, monkeypatch):
    monkeypatch.setattr("stylefast.engine.pack", prepacked.pack)
    with sf.Engine.from_pipeline(pipe, pack_weights=False) as engine:
        engine.generate("a cat", **CALL)
        assert prepacked.packed_bytes(engine.unet) == 0


@pytest.mark.parametrize("made", ["from a pipeline", "from components"])
def test_every_engine_lays_convolutions_out_as_its_device_wants_them_and_shares_them_still(monkeypatch, made):
    """On a GPU a convolution with channels first costs a transposition before and after; here the CPU stands in."""
    monkeypatch.setattr(prepacked, "wants_channels_last", lambda device: True)
    pipe = sharp_pipeline()
    before = pipe.unet.conv_in.weight.clone()
    if made == "from a pipeline":
        engine = sf.Engine.from_pipeline(pipe)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(prepacked, "wants_channels_last", lambda device: False)
            components = from_pipeline(pipe)
        assert not components.unet_state["conv_in.weight"].is_contiguous(memory_format=torch.channels_last)
        engine = sf.Engine(components)
    convolutions = {name: p for name, p in engine.unet.named_parameters() if p.ndim == 4}
    theirs = dict(pipe.unet.named_parameters())
    assert len(convolutions) > 10
    for name, weight in convolutions.items():
        assert weight.is_contiguous(memory_format=torch.channels_last), name
        assert weight.data_ptr() == (theirs if made == "from a pipeline" else components.unet_state)[name].data_ptr()
    assert torch.equal(engine.unet.conv_in.weight, before)
    # LoRAs are added to the weights that the UNet computes with
    assert engine.merged_loras.weights["unet"]["conv_in.weight"].data_ptr() == engine.unet.conv_in.weight.data_ptr()


def test_a_layout_changes_pictures_by_rounding_only(bare_engine, drawn, monkeypatch):
    monkeypatch.setattr(prepacked, "wants_channels_last", lambda device: True)
    engine = sf.Engine.from_pipeline(sharp_pipeline())
    assert engine.fingerprint == bare_engine.fingerprint
    close(engine.generate("a cat", **CALL).latents, drawn("a cat", seed=3, using=bare_engine))


@pytest.mark.parametrize("width", [32, 320])
@pytest.mark.parametrize("rows", [2, 4, 8, 16])
def test_a_row_has_the_same_bits_at_every_place_without_packed_weights_too(rows, width):
    layer = prepacked.Linear(width, 2 * width)
    with torch.inference_mode():
        found = layer(torch.randn(1, width).expand(rows, -1).contiguous())
        plain = measured(torch.nn.functional.linear, torch.ones(1, width), layer.weight, layer.bias)
        assert torch.equal(found, found[:1].expand(rows, -1))
        close(layer(torch.ones(1, width)), plain)
