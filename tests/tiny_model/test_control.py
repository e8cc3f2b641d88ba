"""The embedded model's T2I-Adapter for edges: lines decide the shapes, a reference the style."""

import numpy as np
import pytest
from PIL import Image

import stylefast as sf
from benchmarks.tiny_model.pictures import CONTENTS, PALETTES, STYLES, outlines
from stylefast.runtime.plan.control import Control

COUNT = 12


@pytest.fixture(scope="module")
def engine():
    engine = sf.Engine.from_pretrained("tiny", device="cpu", dtype="float32")
    engine.controls.add(engine.control_files()["edges"], "edges")
    yield engine
    engine.close()


def lit(picture) -> np.ndarray:
    return np.asarray(picture)[..., 0] > 0


def near(mask: np.ndarray) -> np.ndarray:
    """What lies at most one pixel from the mask."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


def followed(images, drawings) -> float:
    """The mean share of the lines that have an edge of the picture beside them."""
    found = []
    for image, lines in zip(images, drawings, strict=True):
        found.append((near(lit(sf.canny(image))) & lit(lines)).sum() / lit(lines).sum())
    return float(np.mean(found))


def drawings() -> list[Image.Image]:
    shown = [outlines(np.random.default_rng(100 + i), CONTENTS[i], PALETTES[0]) for i in range(COUNT)]
    return [sf.canny(one) for one in shown]


def prompts() -> list[str]:
    return [f"a {CONTENTS[i]} in {STYLES[(5 * i + 3) % len(STYLES)]} style" for i in range(COUNT)]


def test_pictures_follow_the_lines(engine):
    lines = drawings()
    found = {}
    for weight in (0.0, 1.0, 1.5):
        requests = [
            sf.Request(prompt, seed=i, steps=20, control=Control(one, "edges", weight=weight))
            for i, (prompt, one) in enumerate(zip(prompts(), lines, strict=True))
        ]
        found[weight] = followed(engine.generate(requests).images, lines)
    assert found[0.0] + 0.08 < found[1.0] and found[1.5] > 0.8, found


def test_the_style_still_comes_from_the_reference(engine):
    lines, style = drawings()[4], sf.StyleAligned(engine.references()["woodcut"])
    control = Control(lines, "edges", weight=1.5)
    plain, styled = (
        engine.generate([sf.Request("a tree", style=given, seed=seed, control=control) for seed in range(4)]).images
        for given in (None, style)
    )
    assert followed(styled, [lines] * 4) > followed(engine.generate(["a tree"] * 4, style).images, [lines] * 4)
    reference = colour(Image.open(engine.references()["woodcut"]))
    near_it, far = (
        np.mean([np.abs(colour(image) - reference).sum() for image in images]) for images in (styled, plain)
    )
    assert near_it < far


def colour(picture) -> np.ndarray:
    """Shares of 64 colours, [64]."""
    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3) // 64
    return np.bincount(pixels @ [16, 4, 1], minlength=64) / len(pixels)
