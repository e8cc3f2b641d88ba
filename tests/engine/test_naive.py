"""The short form makes the engine's pictures, whatever is mixed."""

import random

import numpy as np
import pytest

import stylefast as sf
from stylefast import naive
from stylefast.errors import InvalidRequest
from stylefast.sampling.guidance import StyleContextGuidance
from tests.support.fp64 import close
from tests.support.scene import SIZE, apart, learned, small_picture
from tests.support.small_checkpoints import random_lora, write_kohya_lora, write_peft_lora

PICTURES = [small_picture(seed, (48, 40)) for seed in (1, 2)]
LARGE = (64, 64)
MIXES = 20


def reading(draw: random.Random) -> sf.StyleAligned | None:
    """A way to look at a reference, or none."""
    how = draw.choice(["none", "first", "all", "prompt", "picture", "pictures"])
    if how == "none":
        return None
    if how == "all":
        return sf.StyleAligned(full_attention_share=True, share_group_norm=draw.random() < 0.5)
    reference = {
        "first": {},
        "prompt": {"prompt": "a dog", "seed": draw.randrange(9), "share_styles": draw.random() < 0.5},
        "picture": {"reference": PICTURES[0], "prompt": draw.choice([None, "a house"])},
        "pictures": {"reference": PICTURES},
    }[how]
    return sf.StyleAligned(
        adain=draw.choice([("q", "k"), {"q": 1.0, "k": 0.5, "v": 0.2}, ()]),
        scale=draw.choice([1.0, 0.8]),
        shift=draw.choice([0.0, 0.6, -float("inf")]),
        layers=draw.choice(["all", "up_blocks"]),
        share_group_norm=draw.random() < 0.5,
        window=draw.choice([(0.0, 1.0), (0.3, 1.0)]),
        **reference,
    )


def picture_prompt(draw: random.Random, mask) -> sf.InstantStyle:
    return sf.InstantStyle(
        draw.choice(PICTURES),
        blocks=draw.choice(["all", "style"]),
        scale=draw.choice([0.5, 1.0]),
        mask=draw.choice([None, mask]),
        window=draw.choice([(0.0, 1.0), (0.0, 0.6)]),
    )


def mix(seed: int) -> list[sf.Request]:
    """One to four requests of any styles, samplers and sizes; some share one style object."""
    draw = random.Random(seed)
    shared, learnt, requests = reading(draw), learned(), []
    pace = {"steps": draw.choice([2, 3]), "scheduler": draw.choice(["euler", "ddim"]), "size": SIZE}
    for i in range(draw.randint(1, 4)):
        joins = shared is not None and draw.random() < 0.7
        own = {
            "steps": draw.choice([2, 3, 4]),
            "scheduler": draw.choice(["euler", "euler_ancestral", "dpmpp_2m", "unipc"]),
            "size": draw.choice([SIZE, LARGE]),
        }
        settings = pace if joins else own
        styles = [shared] if joins else []
        if draw.random() < 0.4:
            styles.append(picture_prompt(draw, small_picture(7, settings["size"])))
        if draw.random() < 0.4:
            weights = draw.choice([None, StyleContextGuidance(0.5, 3.0, 4.0)])
            styles.append(sf.DreamStyler(learnt, guidance=weights))
        requests.append(
            sf.Request(
                draw.choice(["a cat", "a red house", "a fish"]),
                negative_prompt=draw.choice(["", "a dog"]),
                style=styles,
                seed=10 * seed + i,
                guidance=draw.choice([1.0, 5.0]),
                guidance_rescale=draw.choice([0.0, 0.4]),
                guidance_interval=draw.choice([(0.0, 1.0), (0.0, 0.6)]),
                loras=draw.choice([{}, {"ink": 0.8}, {"ink": (1.0, 0.0)}, {"pixel": -0.5, "ink": (0.0, 1.0)}]),
                **settings,
            )
        )
    return requests


@pytest.fixture(scope="module")
def lora_files(tmp_path_factory, pipe):
    """Two LoRAs of different ranks, the first of which changes the text encoders too."""
    folder = tmp_path_factory.mktemp("loras")
    ink, pixel = random_lora(pipe, 1), random_lora(pipe, 2, rank=20, text=False)
    return {
        "ink": write_kohya_lora(ink, folder / "ink.safetensors", pipe.unet.config),
        "pixel": write_peft_lora(pixel, folder / "pixel.safetensors"),
    }


@pytest.fixture
def with_loras(engine, lora_files):
    for name, file in lora_files.items():
        engine.loras.add(file, name)
    yield engine
    for name in lora_files:
        engine.loras.remove(name)


@pytest.mark.parametrize("seed", range(MIXES))
def test_the_short_form_makes_the_engines_pictures(with_loras, drawn, seed):
    requests = mix(seed)
    expected = drawn(requests)
    for i, latents in enumerate(naive.generate(with_loras, requests)):
        close(latents, expected[i])


def test_styles_are_not_idle_in_it(engine):
    plain = sf.Request("a cat", steps=2, size=SIZE)
    styles = [sf.StyleAligned(PICTURES[0]), sf.InstantStyle(PICTURES[1], blocks="all"), sf.DreamStyler(learned())]
    (expected,) = naive.generate(engine, [plain])
    for style in styles:
        (found,) = naive.generate(engine, [sf.Request("a cat", style=style, steps=2, size=SIZE)])
        apart([found], [expected])


def test_loras_are_not_idle_in_it(with_loras):
    given = [{}, {"ink": 1.0}, {"ink": (1.0, 0.0)}, {"ink": (0.0, 1.0)}, {"ink": 1.0, "pixel": 1.0}]
    requests = [sf.Request("a cat", loras=loras, steps=2, size=SIZE) for loras in given]
    together = naive.generate(with_loras, requests)
    for i, found in enumerate(together):
        for other in together[:i]:
            apart([found], [other])


def test_what_it_leaves_out_is_refused(engine):
    inverted = sf.StyleAligned(PICTURES[0], noise="ddim")
    with pytest.raises(InvalidRequest, match="no style banks, DDIM inversion or calibration"):
        naive.generate(engine, [sf.Request("a cat", style=inverted, scheduler="ddim", steps=2, size=SIZE)])
    array = np.asarray(PICTURES[0].resize(SIZE))
    begun = {"image": array}, {"upscale": 1.5}, {"variation_strength": 0.1}, {"control": sf.Control(array)}
    for more in (*begun, {"window": (32, 16)}):
        with pytest.raises(InvalidRequest, match="no pictures to begin with, control, masks, windows or clean styles"):
            naive.generate(engine, [sf.Request("a cat", steps=5, size=SIZE, **more)])
