"""Pictures that begin with a picture, whole or within a mask, as diffusers' pipelines make them; and varied noise."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import stylefast as sf
from stylefast.errors import ImageError, InvalidRequest, JobCancelled, StyleError
from stylefast.models.repaint import MARGIN
from stylefast.record import from_record, to_record
from stylefast.runtime.plan.sample import first_noise, slerp
from tests.support.fp64 import Twins, close, measured
from tests.support.pipelines import of_kind
from tests.support.scene import SIZE, apart, clean_latents, small_picture

WIDTH, HEIGHT = SIZE
PICTURE = small_picture(3).resize(SIZE)
STEPS = 5
SAMPLERS = ["euler", "euler_karras", "ddim", "euler_ancestral", "dpmpp_2m", "unipc", "lcm"]


def blocks() -> np.ndarray:
    """A mask whose edges lie between latents: the right third is repainted."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[:, 2 * WIDTH // 3 :] = True
    return mask


def theirs(pipe, kind, scheduler, strength, seed=3, **options):
    """Latents of diffusers' img2img or inpainting; from the picture's latents, since diffusers draws from the VAE."""
    dtype = pipe.unet.dtype
    noise_free = clean_latents(pipe, PICTURE) if dtype == torch.float32 else clean_in_fp64(pipe)
    return of_kind(pipe, kind, scheduler, add_watermarker=False)(
        "a cat",
        image=noise_free.to(dtype),
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        **options,
    ).images


def clean_in_fp64(pipe):
    pixels = torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None].double() / 127.5 - 1
    with torch.no_grad():
        return pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_image_to_image_equals_diffusers(pipe, draw, scheduler):
    found = draw("a cat", image=PICTURE, strength=0.6, steps=STEPS, scheduler=scheduler, seed=3)
    close(found, measured(theirs, pipe, "Img2Img", scheduler, 0.6))


@pytest.mark.parametrize("strength", [0.2, 0.79, 1.0])
def test_every_strength_runs_the_steps_that_diffusers_runs(pipe, draw, strength):
    found = draw("a cat", image=PICTURE, strength=strength, steps=STEPS, seed=3)
    close(found, measured(theirs, pipe, "Img2Img", "euler", strength))


@pytest.mark.parametrize(("scheduler", "strength"), [("euler", 0.6), ("euler", 1.0), ("dpmpp_2m", 0.8), ("ddim", 0.6)])
def test_repainting_equals_diffusers(pipe, draw, scheduler, strength):
    def inpainted(pipe):
        mask = Image.fromarray(blocks().astype(np.uint8) * 255)
        return theirs(pipe, "Inpaint", scheduler, strength, mask_image=mask, height=HEIGHT, width=WIDTH)

    given = {"image": PICTURE, "mask": blocks(), "strength": strength, "steps": STEPS, "scheduler": scheduler}
    close(draw("a cat", seed=3, **given), measured(inpainted, pipe))


def test_kept_pixels_are_those_of_the_picture(engine):
    given = {"image": PICTURE, "size": SIZE, "steps": 2, "strength": 1.0}
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[8:16, 24:40] = True
    (made,) = engine.generate("a cat", mask=mask, **given).images
    made, picture = np.array(made), np.array(PICTURE)
    far = np.ones_like(mask)
    far[8 - MARGIN : 16 + MARGIN, 24 - MARGIN : 40 + MARGIN] = False
    assert far.any() and np.array_equal(made[far], picture[far])
    assert (made[mask] != picture[mask]).any(-1).mean() > 0.9
    (exact,) = engine.generate("a cat", mask=mask, output="np", **given).images
    assert np.abs(exact[far] - picture[far] / 255).max() < 1e-6


def test_an_empty_mask_gives_the_picture_and_a_full_one_repaints_it_whole(engine):
    given = {"image": PICTURE, "size": SIZE, "steps": 4, "strength": 0.5}
    (kept,) = engine.generate("a cat", mask=np.zeros((HEIGHT, WIDTH), dtype=bool), **given).images
    assert np.array_equal(np.array(kept), np.array(PICTURE))
    whole = engine.generate("a cat", mask=np.ones((HEIGHT, WIDTH), dtype=bool), **given)
    assert torch.equal(whole.latents[0], engine.generate("a cat", **given).latents[0])


def test_grey_mixes_what_is_kept_and_what_is_made(engine, pipe):
    given = {"image": PICTURE, "size": SIZE, "steps": 3, "strength": 0.4, "output": "latents"}  # one step
    share = torch.linspace(0, 1, WIDTH).expand(HEIGHT, WIDTH)
    (mixed,) = engine.generate("a cat", mask=share, **given).latents
    (made,) = engine.generate("a cat", **given).latents
    per_latent = share.view(HEIGHT // 4, 4, WIDTH // 4, 4).mean((1, 3)).double()
    kept = clean_latents(pipe, PICTURE)[0].double()
    close(mixed, measured(lambda a, b, w: a * w + b * (1 - w), made, kept.float(), per_latent.float()))


def test_all_kinds_share_a_batch_and_equal_themselves_alone(engine):
    style = sf.StyleAligned(small_picture(1))
    mask = blocks()
    requests = [
        sf.Request("a cat", steps=4, size=SIZE),
        sf.Request("a fish", steps=STEPS, size=SIZE, image=PICTURE, strength=0.6),
        sf.Request("a boat", steps=4, size=SIZE, image=PICTURE, mask=mask, strength=0.8, style=style, seed=2),
        sf.Request("a tree", steps=6, size=SIZE, image=PICTURE, strength=0.5, style=style, scheduler="unipc"),
        sf.Request("a cat", steps=4, size=SIZE, variation_seed=4, variation_strength=0.3),
    ]
    before = engine.runner.calls
    together = engine.generate(requests, output="latents").latents
    assert engine.runner.calls - before == 4
    twins = Twins(engine)
    for request, latents in zip(requests, together, strict=True):
        close(latents[None], twins.drawn([request]))


def test_a_picture_reads_a_bank_at_the_noise_levels_where_it_begins(engine, drawn):
    style = sf.StyleAligned(prompt="a star")
    bank = engine.bake(style, steps=4, size=SIZE, scheduler="dpmpp_2m")
    given = {"image": PICTURE, "strength": 0.5, **bank.settings}
    live = drawn("a cat", style, **given)
    close(engine.generate("a cat", sf.StyleAligned(bank), output="latents", **given).latents, live)
    apart(live.value, engine.generate("a cat", output="latents", **given).latents)


def test_the_reference_of_a_late_beginner_is_the_one_that_others_read(engine):
    style = sf.StyleAligned(prompt="a star")
    plain = sf.Request("a fish", style=style, steps=4, size=SIZE)
    late = sf.Request("a cat", style=style, steps=4, size=SIZE, image=PICTURE, strength=0.5)
    alone = engine.generate(plain, output="latents").latents[0]
    before = engine.runner.calls
    both = engine.generate([plain, late], output="latents").latents
    assert engine.runner.calls - before == 4
    twins = Twins(engine)
    close(both[1][None], twins.drawn([late]))
    close(both[0][None], twins.drawn([plain]))
    assert alone.shape == both[0].shape


@pytest.mark.parametrize("mutual", [False, True])
def test_pictures_that_share_a_reference_of_the_call_may_begin_at_different_steps(engine, mutual):
    style = sf.StyleAligned(full_attention_share=True) if mutual else sf.StyleAligned()
    first = sf.Request("a fish", style=style, steps=4, size=SIZE, image=PICTURE, strength=0.5)
    second = sf.Request("a cat", style=style, steps=4, size=SIZE)
    found = engine.generate([first, second], output="latents").latents
    assert all(torch.isfinite(one).all() for one in found)
    if not mutual:  # then the leader depends on nobody
        close(found[0][None], Twins(engine).drawn([dataclasses.replace(first, style=None)]))
    apart(found[1][None], engine.generate(dataclasses.replace(second, style=None), output="latents").latents)


def test_the_size_is_that_of_the_picture_unless_one_is_given(engine):
    picture = small_picture(2).resize((53, 38))
    assert sf.Request("a cat", image=picture).size == (48, 32)
    assert sf.Request("a cat", image=picture, size=(32, 64)).size == (32, 64)
    assert engine.generate("a cat", image=picture, steps=2).images[0].size == (48, 32)


def test_a_mask_of_another_size_is_scaled_and_cropped_with_its_picture(engine):
    wide = small_picture(2).resize((96, 32))
    half = np.zeros((16, 48), dtype=bool)
    half[:, 24:] = True  # of the whole picture, so of its middle too
    given = {"image": wide, "size": (32, 32), "steps": 2, "strength": 0.5, "output": "latents"}
    expected = np.zeros((32, 32), dtype=bool)
    expected[:, 16:] = True
    centre = {**given, "image": wide.crop((32, 0, 64, 32))}
    found = engine.generate("a cat", mask=half, **given).latents[0]
    near_edge = slice(3, 5)  # scaling softens the mask's edge
    other = engine.generate("a cat", mask=expected, **centre).latents[0]
    assert torch.equal(found[..., : near_edge.start], other[..., : near_edge.start])


def test_progress_counts_the_steps_that_run(engine):
    seen = []
    engine.generate(
        "a cat",
        image=PICTURE,
        steps=5,
        strength=0.4,
        callback=lambda step, steps, latents: seen.append((step, steps)),
        output="latents",
    )
    assert seen == [(1, 2), (2, 2)]
    before, mixed = engine.runner.calls, []
    plain = sf.Request("a cat", size=SIZE, steps=3)
    begun = sf.Request("a fish", image=PICTURE, steps=5, strength=0.4)
    engine.generate([plain, begun], callback=lambda *seen: mixed.append((*seen[:2], len(seen[2]))), output="latents")
    assert engine.runner.calls - before == 3 and mixed == [(1, 3, 2), (2, 3, 2), (3, 3, 1)]
    job = engine.submit(sf.Request("a cat", image=PICTURE, steps=5, strength=0.4), output="latents")
    job.result(60)
    assert (job.step, job.steps) == (2, 2)


def test_a_record_replays_pictures_masks_and_variations(engine, tmp_path):
    path = tmp_path / "picture.png"
    PICTURE.save(path)
    request = sf.Request(
        "a cat", steps=3, image=path, mask=blocks(), strength=0.7, variation_seed=5, variation_strength=0.2
    )
    record = json.loads(json.dumps(to_record([request])))
    assert record["requests"][0]["image"]["path"] == str(path)
    (again,) = from_record(record)
    first, second = (engine.generate(one, output="latents").latents[0] for one in (request, again))
    assert torch.equal(first, second)
    small_picture(5).resize(SIZE).save(path)
    with pytest.raises(StyleError, match="different pixels"):
        from_record(record)


@pytest.mark.parametrize("mode", ["picture", "latents"])
def test_a_second_pass_is_image_to_image_of_the_enlarged_picture(engine, mode):
    given = {"steps": 4, "seed": 3, "size": SIZE}
    before = engine.runner.calls
    made = engine.generate("a cat", upscale=1.5, upscale_strength=0.5, upscale_mode=mode, **given)
    assert engine.runner.calls - before == 4 + 2
    assert made.images[0].size == (72, 48) and made.latents[0].shape[1:] == (12, 18)
    first = engine.generate("a cat", **given)
    if mode == "picture":
        enlarged = first.images[0].resize((72, 48), Image.Resampling.LANCZOS)
        second = engine.generate("a cat", image=enlarged, strength=0.5, steps=4, seed=3).latents[0]
        # the picture was rounded to 8 bits in both
        assert torch.equal(made.latents[0], second)
    else:
        wide = torch.nn.functional.interpolate(first.latents[0][None], size=(12, 18), mode="bilinear")[0]
        strong = engine.generate("a cat", upscale=1.5, upscale_strength=0.25, upscale_mode=mode, **given).latents[0]
        assert (strong - wide).norm() < (made.latents[0] - wide).norm()


@pytest.mark.parametrize("form", ["array", "tensor"])
def test_a_second_pass_keeps_what_the_mask_keeps(engine, form):
    mask = blocks() if form == "array" else torch.from_numpy(blocks()).float()
    given = {"steps": 4, "seed": 3, "image": PICTURE, "mask": mask, "strength": 1.0}
    before = engine.runner.calls
    made = engine.generate("a cat", upscale=2, upscale_strength=0.5, **given)
    assert engine.runner.calls - before == 4 + 2
    large, kept = np.array(made.images[0]), np.array(PICTURE.resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BICUBIC))
    edge = 2 * (2 * WIDTH // 3) - MARGIN - 2  # a smooth edge between the sizes
    assert np.array_equal(large[:, :edge], kept[:, :edge])
    assert (large[:, edge + 2 * MARGIN :] != kept[:, edge + 2 * MARGIN :]).any(-1).mean() > 0.9
    # as image to image of what the first pass made, within the same mask at the larger size
    first = engine.generate("a cat", output="latents", **given).latents[0]
    sample = engine._planner.samples([sf.Request("a cat", upscale=2, upscale_strength=0.5, **given)])[0]
    clean, _ = engine._planner.enlarge(sample, first)
    assert clean.shape == made.latents[0].shape
    known = 2 * WIDTH // 4 // 3 - 2  # latents that are kept end as those that the pass began with
    assert torch.equal(made.latents[0][..., :known], clean[..., :known])


def test_a_second_pass_shares_its_steps_with_others_and_takes_styles_and_pictures(engine):
    style, enlarged = sf.StyleAligned(small_picture(1)), {"upscale": 1.5, "upscale_mode": "latents"}
    requests = [
        sf.Request("a cat", steps=4, size=(72, 48)),
        # of latents, since a picture is rounded to 8 bits between the passes
        sf.Request("a fish", steps=4, size=SIZE, style=style, **enlarged, upscale_strength=0.5),
        sf.Request("a boat", steps=4, image=PICTURE, strength=0.5, **enlarged, upscale_strength=0.25),
    ]
    found = engine.generate(requests, output="latents").latents
    twins = Twins(engine)
    for request, latents in zip(requests, found, strict=True):
        assert latents.shape[1:] == (12, 18)
        close(latents[None], twins.drawn([request]))


def test_pictures_that_end_at_different_sizes_share_one_first_pass(engine):
    given = {"steps": 4, "size": SIZE, "upscale_strength": 0.5}
    requests = [sf.Request("a cat", upscale=1.5, **given), sf.Request("a fish", upscale=2, **given)]
    before = engine.runner.calls
    found = engine.generate(requests, output="latents").latents
    assert engine.runner.calls - before == 4 + 2 * 2
    assert [tuple(one.shape[1:]) for one in found] == [(12, 18), (16, 24)]


def test_a_cancelled_first_pass_leaves_nothing(engine):
    job = engine.submit(sf.Request("a cat", steps=500, size=SIZE, upscale=1.5))
    while engine.runner.pictures == 0:
        pass
    assert job.cancel()
    with pytest.raises(JobCancelled):
        job.result(60)
    assert engine.runner.pictures == 0


def test_a_bank_does_not_fit_both_sizes_of_an_upscaled_picture(engine):
    bank = engine.bake(sf.StyleAligned(prompt="a star"), steps=2, size=SIZE)
    with pytest.raises(StyleError, match="requested; bake the style again with size=.72, 48."):
        engine.generate("a cat", sf.StyleAligned(bank), upscale=1.5, upscale_strength=0.5, **bank.settings)


def test_outpainting_draws_beyond_the_edges(engine):
    canvas, mask = sf.outpaint(PICTURE, right=16, top=8)
    assert canvas.size == mask.size == (64, 40)
    made = np.array(engine.generate("a cat", image=canvas, mask=mask, steps=2, strength=1.0).images[0])
    kept = made[8 + MARGIN :, : 48 - MARGIN]
    assert np.array_equal(kept, np.array(PICTURE)[MARGIN:, : 48 - MARGIN])
    for wrong in ({}, {"left": -8}, {"left": 1.5}, {"left": 10**9}):
        with pytest.raises(InvalidRequest, match="outpaint adds nothing|left is"):
            sf.outpaint(PICTURE, **wrong)


def test_noise_turns_towards_that_of_the_variation(engine, draw):
    plain, other = draw("a cat", seed=3)[0], draw("a cat", seed=9)[0]
    varied = draw("a cat", seed=3, variation_seed=9, variation_strength=0.4)[0]
    apart(varied[None], plain[None])
    apart(varied[None], other[None])
    one, two = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = slerp(one, two, 0.25)
    # a quarter of the angle, in the plane of the two, and no shorter than between them
    between = torch.arccos((one * two).sum() / one.norm() / two.norm())
    assert torch.arccos((one * turned).sum() / one.norm() / turned.norm()).item() == pytest.approx(
        between.item() / 4, abs=0.01
    )
    assert min(one.norm(), two.norm()) <= turned.norm() <= 1.01 * max(one.norm(), two.norm())
    request = sf.Request("a cat", seed=3, variation_seed=9, variation_strength=1.0)
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(9))
    assert torch.allclose(first_noise(request, (4, 8, 8)), noise, atol=1e-5)


def test_a_variation_without_a_seed_draws_one_and_records_it():
    seeds = {sf.Request("a cat", variation_strength=0.1).variation_seed for _ in range(4)}
    assert len(seeds) > 1 and None not in seeds
    assert sf.Request("a cat").variation_seed is None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"strength": 0.1, "steps": 5, "image": PICTURE}, InvalidRequest, "leaves none to run; give at least 0.200"),
        ({"strength": 0, "image": PICTURE}, InvalidRequest, "leaves none to run"),
        ({"strength": 1.2, "image": PICTURE}, InvalidRequest, "strength"),
        ({"strength": float("nan"), "image": PICTURE}, InvalidRequest, "strength"),
        ({"mask": PICTURE}, InvalidRequest, "give it as image"),
        ({"image": 5}, ImageError, "image is 5"),
        ({"image": "missing.png"}, ImageError, "no picture found"),
        ({"image": PICTURE, "mask": "missing.png"}, ImageError, "no picture found"),
        ({"image": PICTURE, "mask": torch.ones(4, 4)}, ImageError, "the mask is 4 x 4"),
        ({"image": PICTURE, "mask": [PICTURE]}, ImageError, "mask is"),
        ({"image": Image.new("RGB", (9000, 400))}, InvalidRequest, "give size="),
        ({"image": Image.new("RGB", (1, 1))}, ImageError, "each side needs at least 16"),
        ({"upscale": 0.5}, InvalidRequest, "upscale is 0.5"),
        ({"upscale": 2, "upscale_strength": 0}, InvalidRequest, "upscale_strength is 0"),
        ({"upscale": 2, "upscale_mode": "x"}, InvalidRequest, "upscale_mode"),
        ({"upscale": 4, "size": (4096, 4096)}, InvalidRequest, "16384"),
        ({"strength": 0.3}, InvalidRequest, "strength is 0.3, which has no effect without image"),
        ({"upscale_strength": 0.3}, InvalidRequest, "no effect without upscale"),
        ({"upscale_mode": "latents"}, InvalidRequest, "no effect without upscale"),
        ({"variation_seed": 3}, InvalidRequest, "no effect without variation_strength"),
        ({"variation_strength": 2}, InvalidRequest, "variation_strength"),
        ({"variation_seed": "x"}, InvalidRequest, "variation_seed"),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(engine, given, error, message):
    with pytest.raises(error, match=message):
        engine.generate("a cat", **{"steps": 20, **given})
