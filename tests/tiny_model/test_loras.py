"""The LoRAs that ship with the embedded model: small, and each brings its style and keeps what the prompt names."""

from functools import cache

import numpy as np
import pytest
from safetensors import safe_open

import stylefast as sf
from benchmarks.tiny_model.classifier import classify, load_classifier
from benchmarks.tiny_model.loras import PICTURES, SETTINGS, write_pictures
from benchmarks.tiny_model.picture_styles import PAINTERS
from benchmarks.tiny_model.pictures import CONTENTS, LORA_STYLES, PALETTES, STYLES, UNSEEN_STYLE, render
from stylefast.training.pictures import read_folder

RUN = {"steps": 8, "guidance": 4.0}
MOST_BYTES = 2_200_000  # of all three


@pytest.fixture(scope="module")
def engine():
    engine = sf.Engine.from_pretrained("tiny", device="cpu")
    for name, file in engine.lora_files().items():
        engine.loras.add(file, name)
    return engine


def test_three_small_files_come_with_the_model(engine):
    files = engine.lora_files()
    assert set(files) == set(LORA_STYLES) and list(files) == sorted(files)
    assert 0 < sum(file.stat().st_size for file in files.values()) <= MOST_BYTES
    for name, file in files.items():
        with safe_open(file, "pt") as content:
            said = content.metadata()
        assert said["ss_network_dim"] == "4" and said["ss_steps"] == str(SETTINGS.steps), name
        assert said["ss_num_train_images"] == str(PICTURES)


def coarse(picture) -> np.ndarray:
    """A picture of 64 x 64 pixels as mean colours of 8 x 8 fields, [192] in 0..1."""
    return (np.asarray(picture, np.float64) / 255).reshape(8, 8, 8, 8, 3).mean((1, 3)).ravel()


@cache
def usual() -> dict[str, np.ndarray]:
    """The mean of drawings of every style."""
    drawn = [(i, content, palette) for i, content in enumerate(CONTENTS) for palette in PALETTES]
    return {
        style: np.mean([coarse(render(np.random.default_rng(i), c, style, p)) for i, c, p in drawn], 0)
        for style in PAINTERS
    }


def nearest(picture) -> str:
    found = coarse(picture)
    return min(usual(), key=lambda style: np.abs(usual()[style] - found).mean())


@pytest.mark.parametrize("name", LORA_STYLES)
def test_a_lora_brings_its_style_and_keeps_the_content(engine, name):
    # measured: its own style in 8 to 12 of 12 pictures, the content in 9 to 11
    def made(strength):
        prompts = enumerate(CONTENTS)
        return engine.generate(
            [sf.Request(f"a {content}", seed=200 + i, loras={name: strength}, **RUN) for i, content in prompts]
        ).images

    plain, styled = made(0.0), made(1.0)
    assert sum(nearest(picture) == name for picture in plain) <= 1
    assert sum(nearest(picture) == name for picture in styled) >= 7
    distances = [np.abs(coarse(a) - coarse(b)).mean() for a, b in zip(plain, styled, strict=True)]
    assert min(distances) > 0.1 and np.mean(distances) > 0.2
    classifier = load_classifier()
    found = classify(classifier, styled).content.argmax(1).tolist()
    assert sum(classifier.contents[k] == content for k, content in zip(found, CONTENTS, strict=True)) >= 8


def test_the_training_pictures_show_every_content_and_palette_and_name_no_style(tmp_path):
    write_pictures(tmp_path, "gold", seed=0)
    captions = [one.caption for one in read_folder(tmp_path)]
    assert len(captions) == PICTURES
    assert all(f"a {CONTENTS[i % 12]}" in caption for i, caption in enumerate(captions))
    assert 0.15 < np.mean(["palette" in caption for caption in captions]) < 0.45
    assert not any(style in caption for caption in captions for style in PAINTERS)


def test_their_styles_are_none_that_the_model_was_trained_on():
    assert not {*LORA_STYLES} & {*STYLES, UNSEEN_STYLE}
