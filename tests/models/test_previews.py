"""Previews look like the picture to come, cost little, and fail on no latents."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from benchmarks.tiny_model.pictures import CONTENTS, PALETTES, STYLES, render
from benchmarks.tiny_model.vae import to_tensor
from stylefast.errors import InvalidRequest, ModelFormatError, ModelNotFound
from stylefast.models.checkpoint import TINY
from stylefast.models.previews import PreviewDecoder, fit_colours
from stylefast.models.vae import decode, encode, load_vae
from tests.support.small_checkpoints import write_vae_folder
from tests.support.small_sdxl import small_pipeline, small_tiny_vae

FLOAT = torch.float32


@pytest.fixture(scope="module")
def vae():
    return load_vae(TINY, dtype=FLOAT, device="cpu")


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(8))


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_linear_previews_correlate_with_the_decoded_picture(vae):
    rng = np.random.default_rng(2)
    named = zip(CONTENTS, STYLES, PALETTES * 2, strict=True)
    latents = encode(vae, to_tensor(np.stack([render(rng, *names) for names in named])))
    preview = PreviewDecoder.load(None, vae, FLOAT, "cpu")
    assert preview.kind == "linear"
    shown, real = preview.decode(latents).permute(0, 3, 1, 2).float() / 255, decode(vae, latents)
    assert correlation(shown, real) > 0.8
    assert correlation(F.avg_pool2d(shown, 4), F.avg_pool2d(real, 4)) > 0.9
    # colours are right too, not only in step with the picture
    assert (shown.mean((2, 3)) - real.mean((2, 3))).abs().mean() < 0.05


def test_linear_previews_are_flat_squares_of_the_pictures_size(vae):
    shown = PreviewDecoder.load(None, vae, FLOAT, "cpu").decode(seeded(2, 4, 5, 7))
    assert shown.shape == (2, 20, 28, 3) and shown.dtype == torch.uint8
    squares = shown.unfold(1, 4, 4).unfold(2, 4, 4).flatten(4)
    assert (squares == squares[..., :1]).all()


def test_the_linear_map_is_the_same_each_time_and_follows_the_weights(vae):
    mine = copy.deepcopy(vae)
    first = fit_colours(mine)
    assert fit_colours(mine) is first
    torch.testing.assert_close(fit_colours(copy.deepcopy(vae)).weight, first.weight, rtol=0, atol=0)
    with torch.no_grad():
        mine.decoder.conv_out.bias += 0.3
    assert (fit_colours(mine).bias > first.bias + 0.05).all()


def test_a_vae_whose_latents_have_a_channel_that_never_moves_gets_a_finite_map():
    vae = small_pipeline(seed=4).vae
    with torch.no_grad():
        vae.quant_conv.weight[2], vae.quant_conv.bias[2] = 0, 0
    colours = fit_colours(vae)
    assert torch.isfinite(colours.weight).all() and colours.weight[:, 2].abs().max() < 1e-3


@pytest.mark.parametrize("source", ["module", "folder", "file"])
def test_a_tiny_decoder_shows_what_it_decodes(vae, tmp_path, source):
    tiny = small_tiny_vae(seed=3)
    folder = write_vae_folder(tiny, tmp_path / "taesd")
    sources = {"module": tiny, "folder": folder, "file": folder / "diffusion_pytorch_model.safetensors"}
    preview = PreviewDecoder.load(sources[source], vae, FLOAT, "cpu")
    latents = seeded(2, 4, 6, 9)
    shown = preview.decode(latents)
    assert preview.kind == "tiny" and shown.shape == (2, 24, 36, 3)
    expected = (decode(tiny, latents) * 255).permute(0, 2, 3, 1)
    assert (shown.float() - expected).abs().max() <= 0.51


@pytest.mark.parametrize("kind", ["linear", "tiny"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_pixels_that_are_not_finite_are_black(vae, kind, bad):
    preview = PreviewDecoder.load(small_tiny_vae() if kind == "tiny" else None, vae, FLOAT, "cpu")
    latents = seeded(3, 4, 4, 4)
    good = preview.decode(latents)
    if kind == "linear":
        latents[1, 0, 2, 1] = bad
        shown = preview.decode(latents)
        assert (shown[1, 8:12, 4:8] == 0).all()
        assert torch.equal(shown[[0, 2]], good[[0, 2]]) and torch.equal(shown[1, :8], good[1, :8])
    else:
        latents[1] = bad
        shown = preview.decode(latents)
        assert torch.equal(shown[[0, 2]], good[[0, 2]])
        # the tiny decoder squashes what goes in, so an infinite latent is a colour
        assert math.isinf(bad) or (shown[1] == 0).all()


def test_latents_in_half_precision_have_previews(vae):
    latents = seeded(1, 4, 4, 6)
    for source in (None, small_tiny_vae().to(torch.float16)):
        preview = PreviewDecoder.load(source, vae, torch.float16, "cpu")
        apart = preview.decode(latents.half()).float() - preview.decode(latents).float()
        assert apart.abs().max() <= 2


@pytest.mark.parametrize("shape", [(4, 4, 4), (1, 16, 4, 4)])
def test_latents_of_another_shape_are_refused(vae, shape):
    with pytest.raises(InvalidRequest, match=r"the shape must be \[n, 4, h, w\]"):
        PreviewDecoder.load(None, vae, FLOAT, "cpu").decode(torch.zeros(shape))


def test_what_can_not_be_a_preview_decoder_is_refused(vae, tmp_path):
    with pytest.raises(ModelFormatError, match="is an AutoencoderKL; previews need an AutoencoderTiny"):
        PreviewDecoder.load(TINY / "vae", vae, FLOAT, "cpu")
    with pytest.raises(ModelFormatError, match="AutoencoderTiny decodes latents of 4 channels to 8 pixels each"):
        PreviewDecoder.load(AutoencoderTiny(), vae, FLOAT, "cpu")
    with pytest.raises(ModelNotFound):
        PreviewDecoder.load(tmp_path / "absent", vae, FLOAT, "cpu")
