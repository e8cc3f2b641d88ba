"""Models for inpainting, whose UNet sees the mask and what it keeps beside the latents: nine channels."""

import numpy as np
import pytest
import torch
from PIL import Image

import stylefast as sf
from stylefast.runtime.backends.compiled import CompileBackend
from tests.support.fp64 import Twins, close, engine_of, measured
from tests.support.pipelines import of_kind
from tests.support.scene import DEPTHS, SIZE, apart, sharp_pipeline, small_picture
from tests.support.small_control import edges, small_control
from tests.support.small_sdxl import small_unet_config
from tests.support.small_unet import SMALL, sharpen

STEPS = 4
WIDTH, HEIGHT = SIZE
PICTURE = small_picture(3).resize(SIZE)


def blocks() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[:, WIDTH // 3 :] = True
    return mask


@pytest.fixture(scope="module")
def nine():
    """A random pipeline with a UNet of nine input channels."""
    from diffusers import UNet2DConditionModel

    pipe = sharp_pipeline()
    torch.manual_seed(4)
    unet = UNet2DConditionModel(**small_unet_config(**SMALL, **DEPTHS) | {"in_channels": 9})
    sharpen(unet.requires_grad_(False), 4)
    pipe.register_modules(unet=unet)
    return pipe


@pytest.fixture(scope="module")
def inpainting(nine):
    engine = sf.Engine.from_pipeline(nine)
    yield engine
    engine.close()


def theirs(pipe, scheduler, strength, mask):
    """Latents of diffusers' inpainting pipeline, without draws from the VAE."""
    made = of_kind(pipe, "Inpaint", scheduler, add_watermarker=False)
    pixels = torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None].to(pipe.unet.dtype) / 127.5 - 1
    with torch.no_grad():
        clean, kept = (
            pipe.vae.encode(seen).latent_dist.mean * pipe.vae.config.scaling_factor
            for seen in (pixels, pixels * torch.from_numpy(~mask))
        )
    return made(
        "a cat",
        image=clean,
        mask_image=Image.fromarray(mask.astype(np.uint8) * 255),
        masked_image_latents=kept,
        height=HEIGHT,
        width=WIDTH,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images


@pytest.mark.parametrize(("scheduler", "strength"), [("euler", 1.0), ("euler", 0.5), ("dpmpp_2m", 0.75), ("ddim", 1.0)])
def test_repainting_equals_diffusers(nine, inpainting, scheduler, strength):
    given = {"image": PICTURE, "mask": blocks(), "strength": strength, "scheduler": scheduler}
    found = inpainting.generate("a cat", seed=3, steps=STEPS, output="latents", **given).latents
    close(found, measured(theirs, nine, scheduler, strength, blocks()))


def test_kept_pixels_are_those_of_the_picture(inpainting):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[8:16, 24:40] = True
    (made,) = inpainting.generate("a cat", image=PICTURE, mask=mask, strength=1.0, steps=2).images
    far = np.ones_like(mask)
    far[:24, 16:48] = False
    assert far.any() and np.array_equal(np.array(made)[far], np.array(PICTURE)[far])


def requests() -> list[sf.Request]:
    given = {"size": SIZE, "steps": STEPS}
    masked = {"image": PICTURE, "mask": blocks(), **given}
    style = sf.StyleAligned(small_picture(1))
    return [
        sf.Request("a cat", **given),  # all of it is made
        sf.Request("a boat", seed=1, strength=0.5, **masked),
        sf.Request("a tree", seed=2, strength=1.0, style=style, **masked),
        sf.Request("a dog", seed=3, style=sf.StyleAligned(prompt="a star"), **given),
        sf.Request("a fish", seed=4, image=PICTURE, strength=0.5, **given),
        sf.Request("a sun", seed=5, control=sf.Control(edges(2), "lines"), **masked),
    ]


def test_all_kinds_share_a_batch_and_equal_themselves_alone(nine, inpainting):
    net = small_control(nine, in_channels=4)
    inpainting.controls.add(net, "lines")
    before = inpainting.runner.calls
    together = inpainting.generate(requests(), output="latents").latents
    assert inpainting.runner.calls - before == STEPS
    twins = Twins(inpainting, controls={"lines": net})
    for request, latents in zip(requests(), together, strict=True):
        close(latents[None], twins.drawn([request]))
    inpainting.controls.remove("lines")


def test_without_a_mask_all_of_a_picture_is_made(inpainting):
    full = {"mask": np.ones((HEIGHT, WIDTH), dtype=bool), "strength": 1.0}
    (found,) = inpainting.generate("a cat", size=SIZE, steps=STEPS, seed=3, output="latents").latents
    given = {"image": PICTURE, "size": SIZE, "steps": STEPS, "seed": 3, "output": "latents"}
    (masked,) = inpainting.generate("a cat", **given, **full).latents
    assert torch.equal(found, masked)
    (part,) = inpainting.generate("a cat", **given, mask=blocks(), strength=1.0).latents
    apart([part], [found])


def test_a_bank_and_an_inverted_reference_work(inpainting):
    style = sf.StyleAligned(prompt="a star", seed=2)
    bank = inpainting.bake(style, steps=STEPS, size=SIZE)
    given = {"steps": STEPS, "size": SIZE, "output": "latents"}
    live = inpainting.generate("a cat", style, **given).latents
    read = inpainting.generate("a cat", sf.StyleAligned(bank), **given).latents
    assert (live[0] - read[0]).abs().max() < 1e-3 * live[0].abs().max()
    inverted = sf.StyleAligned(small_picture(1), noise="ddim")
    assert torch.isfinite(inpainting.generate("a cat", inverted, scheduler="ddim", **given).latents[0]).all()


@pytest.mark.parametrize("form", ["folder", "pipeline for inpainting"])
def test_it_loads_from_a_folder_and_from_diffusers_own_pipeline_for_inpainting(nine, inpainting, tmp_path, form):
    given = {"image": PICTURE, "mask": blocks(), "strength": 1.0, "steps": 2, "output": "latents"}
    if form == "folder":
        nine.save_pretrained(tmp_path / "nine")
        engine = sf.Engine.from_pretrained(tmp_path / "nine", dtype="float32", device="cpu", pack_weights=False)
    else:
        engine = sf.Engine.from_pipeline(of_kind(nine, "Inpaint", "euler"))
    found, expected = (one.generate("a cat", **given).latents[0] for one in (engine, inpainting))
    assert torch.equal(found, expected)
    engine.close()


def test_compiled_steps_see_the_mask_too(nine):
    engine = engine_of(nine)
    engine.runner.backend = CompileBackend(engine.unet, cache=None, compiler="eager")
    engine.runner.backend.warm_up((4, HEIGHT // 4, WIDTH // 4), (2,))
    given = {"image": PICTURE, "mask": blocks(), "strength": 1.0, "steps": STEPS, "seed": 3, "output": "latents"}
    close(engine.generate("a cat", **given).latents, measured(theirs, nine, "euler", 1.0, blocks()))
    engine.close()
