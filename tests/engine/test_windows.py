"""Pictures made of overlapping windows, as MultiDiffusion and StyleAligned's notebook for panoramas make them."""

import copy
import json

import pytest
import torch

import stylefast as sf
from stylefast.errors import ImageError, InvalidRequest, NumericsError, StyleError
from stylefast.record import from_record, to_record
from stylefast.runtime.plan.windows import Windows, starts, window_stride
from tests.support.fp64 import Twins, close, measured
from tests.support.oracle.generation import encode
from tests.support.oracle.sampler import make_scheduler
from tests.support.oracle.style_aligned import Sharing, guidance_layout, shared
from tests.support.scene import apart, half_mask, small_picture

STEPS = 4
WINDOW, STRIDE = (48, 32), 16
WIDE = {"size": (96, 32), "window": WINDOW, "window_stride": STRIDE, "steps": STEPS, "seed": 3}
STYLE = {"prompt": "a star in oil", "seed": 9}


def literal(pipe, scheduler="euler", size=(96, 32), wrap=False, styled=False, guidance=5.0):
    """Latents of MultiDiffusion: a step of a scheduler of its own for each window, then the mean where they overlap.

    styled: a reference runs in the same batch, and all windows read it, as in the notebook.
    """
    width, height, dtype, scale = *(side // pipe.vae_scale_factor for side in size), pipe.unet.dtype, 4
    w, h, stride = WINDOW[0] // scale, WINDOW[1] // scale, STRIDE // scale
    lefts = range(0, width, stride) if wrap else range(0, width - w + 1, stride)
    views = [
        (slice(top, top + h), [(left + i) % width for i in range(w)])
        for top in range(0, height - h + 1, stride)
        for left in lefts
    ]
    prompts = [STYLE["prompt"]] * styled + ["a cat"] * len(views)
    (null, null_pooled), (full, full_pooled) = encode(pipe, prompts, None)
    states, pooled = torch.cat([null, full]).to(dtype), torch.cat([null_pooled, full_pooled]).to(dtype)
    time_ids = torch.tensor([[WINDOW[1], WINDOW[0], 0, 0, WINDOW[1], WINDOW[0]]], dtype=torch.float32)
    one = make_scheduler(scheduler, pipe.scheduler.config)
    one.set_timesteps(STEPS)
    schedulers = [copy.deepcopy(one) for _ in prompts]
    latents = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(3)).to(dtype)
    reference = torch.randn(1, 4, h, w, generator=torch.Generator().manual_seed(STYLE["seed"])).to(dtype)
    latents, reference = latents * one.init_noise_sigma, reference * one.init_noise_sigma
    for timestep in one.timesteps:
        crops = [reference] * styled + [latents[:, :, rows][..., columns] for rows, columns in views]
        seen = torch.cat([own.scale_model_input(x, timestep) for own, x in zip(schedulers, crops, strict=True)])
        conditions = {"text_embeds": pooled, "time_ids": time_ids.repeat(len(states), 1)}
        sharing = Sharing(guidance_layout(len(crops))) if styled else None
        with shared(pipe.unet, sharing), torch.no_grad():
            output = pipe.unet(seen.repeat(2, 1, 1, 1), timestep, states, added_cond_kwargs=conditions).sample
        without, given = output.chunk(2)
        guided = without + guidance * (given - without)
        stepped = [own.step(guided[i : i + 1], timestep, crops[i]).prev_sample for i, own in enumerate(schedulers)]
        value, count = torch.zeros_like(latents), torch.zeros_like(latents)
        for (rows, columns), part in zip(views, stepped[styled:], strict=True):
            strip, times = value[:, :, rows].clone(), count[:, :, rows].clone()
            strip[..., columns] += part
            times[..., columns] += 1
            value[:, :, rows], count[:, :, rows] = strip, times
        latents, reference = value / count, stepped[0]
    return latents


def drawn(engine, **options):
    return engine.generate("a cat", output="latents", **WIDE | options).latents


@pytest.fixture(scope="module")
def twins(engine, adapter_files):
    return Twins(engine, adapter_files[0])


@pytest.mark.parametrize("scheduler", ["euler", "ddim", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("wrap", [False, True], ids=["open", "around"])
def test_windows_equal_multidiffusion(pipe, engine, scheduler, wrap):
    found = drawn(engine, scheduler=scheduler, wrap=wrap)
    assert found[0].shape == (4, 8, 24)
    close(found, measured(literal, pipe, scheduler, wrap=wrap))


def test_windows_in_both_directions_equal_multidiffusion(pipe, engine):
    close(drawn(engine, size=(80, 64)), measured(literal, pipe, size=(80, 64)))


@pytest.mark.parametrize("wrap", [False, True], ids=["open", "around"])
def test_all_windows_read_one_reference_as_in_the_notebook(pipe, engine, wrap):
    style = sf.StyleAligned(**STYLE)
    close(drawn(engine, style=style, wrap=wrap), measured(literal, pipe, styled=True, wrap=wrap))


def kinds_of_rows():
    own = {"size": WINDOW, "steps": STEPS}
    style, instant = sf.StyleAligned(**STYLE), sf.InstantStyle(small_picture(2), blocks="all")
    return {
        "plain": sf.Request("a fish", seed=1, **own),
        "wide": sf.Request("a cat", **WIDE),
        "around": sf.Request("a boat", **WIDE | {"wrap": True, "seed": 4}),
        "styled": sf.Request("a tree", style=style, **WIDE | {"seed": 5}),
        "reader": sf.Request("a dog", style=style, seed=6, **own),
        "instant": sf.Request("a sun", style=instant, **WIDE | {"size": (72, 48), "seed": 7}),
        "noisy": sf.Request("a hat", **WIDE | {"scheduler": "euler_ancestral", "guidance": 1.0, "seed": 8}),
        "varied": sf.Request("a pot", **WIDE | {"seed": 9}, variation_seed=2, variation_strength=0.3),
        "picture": sf.Request("a car", style=sf.StyleAligned(small_picture(4)), **WIDE | {"seed": 10}),
    }


def test_all_kinds_of_rows_share_a_batch_and_equal_themselves_alone(engine, twins):
    requests = kinds_of_rows()
    before = engine.runner.calls
    together = engine.generate(list(requests.values()), output="latents").latents
    assert engine.runner.calls - before == STEPS  # windows are rows among the others
    for request, latents in zip(requests.values(), together, strict=True):
        close(latents[None], twins.drawn([request]))


def test_a_bank_of_the_windows_size_is_read_by_all_of_them(engine):
    style = sf.StyleAligned(**STYLE)
    bank = engine.bake(style, steps=STEPS, size=WINDOW)
    found = drawn(engine, style=sf.StyleAligned(bank))
    apart(found, drawn(engine))
    assert (found[0] - drawn(engine, style=style)[0]).abs().max() < 1e-4 * found[0].abs().max()


def test_a_step_sees_the_whole_picture_and_so_do_previews(engine):
    seen = []
    requests = [sf.Request("a cat", **WIDE), sf.Request("a fish", size=WINDOW, steps=STEPS)]
    result = engine.generate(requests, callback=lambda step, steps, latents: seen.append((step, tuple(latents.shape))))
    assert set(seen) == {(i + 1, (1, 4, *shape)) for i in range(STEPS) for shape in ((8, 24), (8, 12))}
    assert [image.size for image in result.images] == [(96, 32), WINDOW]
    assert result.latents[0].shape == (4, 8, 24)
    job = engine.submit(sf.Request("a cat", **WIDE), output="latents")
    (latents,) = job.result(60).latents
    assert torch.equal(latents, drawn(engine)[0])


def test_the_edges_of_a_picture_that_wraps_are_decoded_as_neighbours(engine):
    (latents,) = drawn(engine, wrap=True)
    around, turned = (engine.decoder._decode_around(x) for x in (latents, latents.roll(9, -1)))
    plain, plainly_turned = (engine.decoder._decode(x) for x in (latents, latents.roll(9, -1)))
    scale = around.shape[-1] // latents.shape[-1]
    assert around.shape == plain.shape
    error, without = ((a - b.roll(-9 * scale, -1)).abs().max() for a, b in ((around, turned), (plain, plainly_turned)))
    assert error < 0.2 * without
    picture = engine.generate("a cat", **WIDE | {"wrap": True}, output="np").images[0]
    assert abs(picture - around.permute(1, 2, 0).numpy()).max() < 1e-5


def test_one_window_that_wraps_makes_a_tile(pipe, engine):
    tile = drawn(engine, size=WINDOW, wrap=True)
    apart(tile, drawn(engine, size=WINDOW, window=None, window_stride=None))
    (sample, *others) = engine._planner.samples([sf.Request("a cat", **WIDE | {"size": WINDOW, "wrap": True})])
    assert [other.window_of for other in others] == [sample, sample] and sample.window_of is sample


@pytest.mark.parametrize("length, window, stride", [(24, 12, 4), (25, 12, 5), (12, 12, 3), (40, 12, 12)])
def test_windows_cover_a_side_and_go_around_its_end(length, window, stride):
    plain, around = (starts(length, window, stride, wrap) for wrap in (False, True))
    assert {(left + i) for left in plain for i in range(window)} == set(range(length))
    assert {(left + i) % length for left in around for i in range(window)} == set(range(length))
    assert plain[-1] == length - window and around[-1] < length


def test_joining_what_was_cut_changes_nothing():
    windows, whole = Windows((3, 9, 20), (5, 8), 3, True), torch.randn(2, 3, 9, 20)
    parts = windows.cut(whole)
    assert parts.shape == (len(windows), 2, 3, 5, 8)
    torch.testing.assert_close(windows.join(parts), whole)
    assert window_stride((1024, 768), None) == 192 and window_stride((16, 16), None) == 8


def test_a_window_that_becomes_nan_fails_its_picture_alone(engine, monkeypatch):
    unet, call = engine.unet, engine.unet.forward

    def spoiled(latents, *rest, **named):
        out = call(latents, *rest, **named)
        return torch.cat([out[:1] * float("nan"), out[1:]]) if len(latents) > 4 else out

    monkeypatch.setattr(unet, "forward", spoiled)
    with pytest.raises(NumericsError, match=r"latents of picture\(s\) 0 "):
        drawn(engine)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"size": None}, InvalidRequest, "window is 48x32, a part of the picture's size, which must then be given"),
        ({"size": (48, 32)}, InvalidRequest, "the picture must be larger than a window, or wrap around"),
        ({"size": (40, 64)}, InvalidRequest, "the picture must be larger than a window"),
        ({"window": (50, 32)}, InvalidRequest, "window's width is 50; it must be divisible by 8"),
        ({"window": 64}, InvalidRequest, "window is 64; it must be"),
        ({"window_stride": 12}, InvalidRequest, "window_stride is 12; it must be divisible by 8"),
        ({"window_stride": 40}, InvalidRequest, "window_stride is 40; it must be a whole number from 8 to 32"),
        ({"window_stride": 0}, InvalidRequest, "window_stride is 0"),
        ({"window": None}, InvalidRequest, "window_stride is 16, which has no effect without window"),
        ({"window": None, "window_stride": None, "wrap": True}, InvalidRequest, "wrap is True, which has no effect"),
        ({"wrap": "yes"}, InvalidRequest, "wrap is 'yes'"),
        ({"size": (8192, 8192), "window_stride": 8}, InvalidRequest, "at most 256 are allowed"),
        ({"image": small_picture(1)}, InvalidRequest, "image does not go together with window"),
        ({"upscale": 2}, InvalidRequest, "upscale does not go together with window"),
        ({"control": sf.Control(small_picture(1))}, InvalidRequest, "control does not go together with window"),
        ({"style": sf.StyleAligned()}, InvalidRequest, "the call's first picture does not go together with window"),
        (
            {"style": sf.InstantStyle(small_picture(1), mask=half_mask())},
            InvalidRequest,
            "a style with a mask does not go together with window",
        ),
    ],
)
def test_what_can_not_be_done_is_refused(change, kind, message):
    with pytest.raises(kind, match=message):
        sf.Request("a cat", **WIDE | change)


def test_a_bank_of_another_size_is_refused(engine):
    bank = engine.bake(sf.StyleAligned(**STYLE), steps=STEPS, size=(32, 32))
    with pytest.raises(StyleError, match="size"):
        drawn(engine, style=sf.StyleAligned(bank))


def test_a_record_gives_the_same_windows_back(engine):
    request = sf.Request("a cat", style=sf.StyleAligned(small_picture(4)), **WIDE | {"wrap": True})
    (again,) = from_record(json.loads(json.dumps(to_record([request]))))
    assert (again.size, again.window, again.window_stride, again.wrap) == ((96, 32), WINDOW, STRIDE, True)
    one, other = (engine.generate(x, output="latents").latents[0] for x in (request, again))
    assert torch.equal(one, other)
    with pytest.raises((InvalidRequest, ImageError)):
        from_record({**to_record([request]), "requests": [{**to_record([request])["requests"][0], "window": [1]}]})
