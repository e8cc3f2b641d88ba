"""A small model and a folder of captioned pictures."""

import pytest

import stylefast as sf
from tests.support.scene import small_picture
from tests.support.small_sdxl import small_pipeline

CAPTIONS = ("a cat", "a dog", "a house")


@pytest.fixture(scope="module")
def pipe():
    return small_pipeline()


@pytest.fixture(scope="module")
def engine(pipe):
    return sf.Engine.from_pipeline(pipe)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three pictures, none of them square, with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, caption in enumerate(CAPTIONS):
        small_picture(seed, (80, 64) if seed else (64, 100)).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text(f"{caption}\n")
    return folder
