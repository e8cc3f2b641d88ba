"""Pictures in tiles: within a stated distance of the whole, in bounded memory, and whole where that fits."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.tiny_model.pictures import CONTENTS, PALETTES, STYLES, render
from benchmarks.tiny_model.vae import to_tensor
from stylefast.errors import InvalidRequest, OutOfMemory
from stylefast.models import vae_tiles
from stylefast.models.checkpoint import TINY
from stylefast.models.vae import decode, encode, load_vae
from stylefast.models.vae_tiles import RESULT_BYTES, DecodePlan, decode_bytes, decode_tiles, plan_decode, tile_starts
from tests.support.fp64 import close, measured
from tests.support.small_sdxl import small_tiny_vae

FLOAT = torch.float32


@pytest.fixture(scope="module")
def vae():
    return load_vae(TINY, dtype=FLOAT, device="cpu")


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def decoded(vae, latents):
    """Pictures by diffusers' own VAE; the embedded model's scaling factor is 1."""
    return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def decoder_inputs(vae):
    """A copy of `vae` and the list of the shapes that its decoder will be given."""
    watched, shapes = copy.deepcopy(vae), []
    watched.decoder.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    return watched, shapes


@given(size=st.integers(1, 300), tile=st.integers(16, 128))
def test_tiles_cover_the_axis_and_share_a_quarter_with_their_neighbours(size, tile):
    starts = tile_starts(size, tile)
    if tile >= size:
        assert starts == [0]
        return
    assert starts[0] == 0 and starts[-1] + tile == size
    for before, after in zip(starts, starts[1:], strict=False):
        assert before < after <= before + tile * 3 / 4


@pytest.mark.parametrize("height, width, tile", [(37, 16, 16), (16, 41, 24), (50, 33, 32), (17, 18, 16), (9, 12, 16)])
def test_tiles_of_what_does_not_depend_on_its_surroundings_give_the_whole(height, width, tile):
    latents = seeded(2, 4, height, width)

    def run(part):
        return part[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3)

    # where tiles meet in both directions, a number is weighted and summed twice: four roundings each time
    rounding = 4 * torch.finfo(FLOAT).eps
    torch.testing.assert_close(decode_tiles(run, latents, tile, 4), run(latents), rtol=rounding, atol=0)


def test_a_step_between_tiles_becomes_a_ramp():
    shades = iter((0.0, 1.0))
    line = decode_tiles(lambda part: torch.full((1, 3, 16, 64), next(shades)), torch.zeros(1, 4, 4, 28), 16, 4)[0, 0, 0]
    assert line[:48].eq(0).all() and line[64:].eq(1).all()
    torch.testing.assert_close(line[48:64], (torch.arange(16) + 0.5) / 16)


@pytest.mark.parametrize(
    "kind, mean, most",
    [("pictures", 3, 60), ("four pictures in one", 7, 90), ("noise", 4, 60)],
    ids=["pictures", "four pictures in one", "noise"],
)
def test_tiles_of_half_the_side_stay_near_the_whole_picture(vae, kind, mean, most):
    rng = np.random.default_rng(1)
    size = 64 if kind == "four pictures in one" else 128
    pictures = to_tensor(np.stack([render(rng, CONTENTS[i], STYLES[i], PALETTES[i], size) for i in range(4)]))
    if kind == "four pictures in one":  # the worst case: every tile has statistics of its own
        pictures = torch.cat([torch.cat(list(pictures[:2]), 2), torch.cat(list(pictures[2:]), 2)], 1)[None]
    latents = seeded(2, 4, 32, 32) if kind == "noise" else encode(vae, pictures)
    apart = (decode(vae, latents, tile=64) - decode(vae, latents)).abs() * 255
    assert 0 < apart.mean() < mean
    assert apart.max() < most


def test_tiles_are_nearer_to_the_whole_than_diffusers_are(vae):
    rng = np.random.default_rng(3)
    pictures = to_tensor(np.stack([render(rng, CONTENTS[i], STYLES[i], PALETTES[i], 128) for i in range(4)]))
    latents = encode(vae, pictures)
    theirs = copy.deepcopy(vae)
    theirs.enable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = 64, 16
    tiled = decoded(theirs, latents)
    whole = decode(vae, latents)
    assert (decode(vae, latents, tile=64) - whole).abs().mean() < (tiled - whole).abs().mean()


@pytest.mark.parametrize("height, width, tile", [(40, 23, 64), (19, 61, 96)])
def test_no_decoder_input_is_larger_than_the_tile(vae, height, width, tile):
    watched, shapes = decoder_inputs(vae)
    assert decode(watched, seeded(2, 4, height, width), tile=tile).shape == (2, 3, height * 4, width * 4)
    assert set(shapes) == {(1, 4, min(tile // 4, height), min(tile // 4, width))}


def test_a_tile_larger_than_the_picture_is_the_whole_picture(vae):
    latents = seeded(5, 4, 10, 12)
    watched, shapes = decoder_inputs(vae)
    close(decode(watched, latents, tile=64), measured(decoded, vae, latents))
    assert shapes == [(2, 4, 10, 12), (2, 4, 10, 12), (1, 4, 10, 12)]  # no more at a time than a tile holds


def test_what_fits_is_decoded_whole_and_what_does_not_one_by_one_then_in_tiles(vae):
    latents = seeded(4, 4, 40, 24)
    one, results = decode_bytes(vae, 40 * 24 * 16, FLOAT), 4 * 40 * 24 * 16 * RESULT_BYTES
    whole = measured(decoded, vae, latents)
    for memory, expected in [
        (None, [(4, 4, 40, 24)]),
        (4 * one + results, [(4, 4, 40, 24)]),
        (2 * one + results, [(2, 4, 40, 24)] * 2),
        (one + results, [(1, 4, 40, 24)] * 4),
    ]:
        watched, shapes = decoder_inputs(vae)
        images = decode(watched, latents, tile="auto", memory=memory)
        assert shapes == expected
        close(images, whole)
    watched, shapes = decoder_inputs(vae)
    decode(watched, latents, tile="auto", memory=one + results - 1)
    assert all(shape[0] == 1 and decode_bytes(vae, shape[2] * shape[3] * 16, FLOAT) < one for shape in shapes)
    assert len(set(shapes)) == 1


@pytest.mark.parametrize("budget", [None, 1_000_000_000, 450_000_000])
def test_beyond_2048_pixels_square_tiles_are_as_large_as_fits_and_no_larger_than_1024(vae, budget):
    plan = plan_decode(vae, (3, 4, 600, 520), 4, FLOAT, "auto", budget)
    assert plan.pictures == 1
    if budget is None:
        assert plan.tile == vae_tiles.LARGEST_TILE
    else:
        room = budget - 3 * 600 * 520 * 16 * RESULT_BYTES
        fits = [decode_bytes(vae, (side * 4) ** 2, FLOAT) <= room for side in (plan.tile, plan.tile + 8)]
        assert fits == ([True, False] if plan.tile < vae_tiles.LARGEST_TILE else [True, fits[1]])


def test_a_batch_is_cut_to_2048_pixels_square_even_where_more_fits(vae):
    assert plan_decode(vae, (9, 4, 256, 256), 4, FLOAT, "auto", None) == DecodePlan(4)


def test_too_little_memory_for_the_smallest_tile_is_said(vae):
    with pytest.raises(OutOfMemory, match="2 of 160x160 .* in tiles of 64 pixels, and 0.1 MB may be used"):
        decode(vae, seeded(2, 4, 40, 40), tile="auto", memory=100_000)


@pytest.mark.parametrize("tile", [0, -64, 32, 66, 64.0, True, "whole"])
def test_tiles_that_make_no_sense_are_refused(vae, tile):
    with pytest.raises(InvalidRequest, match="a multiple of 4, at least 64"):
        decode(vae, seeded(1, 4, 8, 8), tile=tile)


def test_a_tiny_vae_decodes_in_tiles_too():
    tiny = small_tiny_vae()
    latents = seeded(1, 4, 40, 21)
    apart = (decode(tiny, latents, tile=64) - decode(tiny, latents)).abs()
    assert apart.mean() < 0.05


@pytest.mark.parametrize("onednn", [True, False], ids=["as this CPU does", "as a CPU without 16-bit instructions does"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_peak_of_a_decode_stays_below_its_estimate(vae, dtype, onednn):
    from torch.profiler import ProfilerActivity, profile

    decoder, latents = copy.deepcopy(vae.decoder).to(dtype), seeded(1, 4, 12, 10).to(dtype)
    with torch.backends.mkldnn.flags(enabled=onednn):
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            decoder(latents)
        estimate = decode_bytes(vae, 12 * 10 * 16, dtype)
    live = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0.4 < peak / estimate < 1


def test_fewer_pictures_are_decoded_at_once_where_convolutions_write_out_their_windows(vae):
    budget = 3 * decode_bytes(vae, 64 * 64 * 16, FLOAT) + 3 * 64 * 64 * 16 * RESULT_BYTES
    assert plan_decode(vae, (3, 4, 64, 64), 4, FLOAT, "auto", budget).pictures == 3
    with torch.backends.mkldnn.flags(enabled=False):
        assert plan_decode(vae, (3, 4, 64, 64), 4, FLOAT, "auto", budget).pictures == 1
