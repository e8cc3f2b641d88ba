"""A small random model on disk with all that can ship with one, and the command line run in this process."""

from functools import cache

import pytest
import torch
from PIL import Image

from stylefast.cli import main
from stylefast.commands.generate import ModelChoice
from stylefast.styles.embeddings import StageEmbedding, save_embedding
from tests.support.small_adapter import global_adapter, save_adapter, small_layout, small_picture, small_vision_model
from tests.support.small_checkpoints import random_lora, write_kohya_lora
from tests.support.small_sdxl import small_pipeline

TEXT_WIDTH = 32

_load_once = cache(ModelChoice.load)


def _as_loaded(choice):
    """An engine that tests which load the same one share, without the prompts that it has encoded for others.

    A prompt's last bits depend on those that were encoded with it.
    """
    engine = _load_once(choice)
    with engine.scheduler.paused():
        text = engine.runner.conditions.text
        for page in list(text._idle):
            text._forget(page)
        text.uneven = False
    return engine


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A diffusers folder with adapter, image encoder, the learned style "chalk", references, and LoRAs."""
    from transformers import CLIPImageProcessor

    folder = tmp_path_factory.mktemp("model")
    pipe = small_pipeline()
    pipe.save_pretrained(folder)
    small_vision_model(projection_dim=TEXT_WIDTH).save_pretrained(folder / "image_encoder")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "feature_extractor")
    for name in ("ip_adapter", "styles", "references", "loras"):
        (folder / name).mkdir()
    save_adapter(global_adapter(small_layout(), embed_dim=TEXT_WIDTH), folder / "ip_adapter" / "ip-adapter.safetensors")
    vectors = 0.2 * torch.randn(2, 6, 1, TEXT_WIDTH, generator=torch.Generator().manual_seed(3))
    save_embedding(StageEmbedding("chalk", *vectors), folder / "styles" / "chalk.safetensors")
    for seed, name in enumerate(("blot", "splash")):
        small_picture(seed, (64, 64)).save(folder / "references" / f"{name}.png")
    for seed, name in enumerate(("dots", "ink")):
        write_kohya_lora(random_lora(pipe, seed), folder / "loras" / f"{name}.safetensors", pipe.unet.config)
    return folder


@pytest.fixture
def photo(tmp_path):
    """A picture of somebody's own."""
    path = tmp_path / "photo.jpg"
    small_picture(7, (80, 60)).save(path)
    return path


@pytest.fixture
def stylefast(capsys, monkeypatch):
    """Runs the command line; (exit code, stdout, stderr)."""
    monkeypatch.setattr(ModelChoice, "load", _as_loaded)

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def generate(stylefast, model_folder):
    """Runs `stylefast generate` on the small model with few steps; the paths printed. The call must succeed."""

    def run(*words):
        code, out, err = stylefast("generate", *words, "--model", model_folder, "--quiet")
        assert code == 0, err
        return out.split()

    return run


def pixels(path):
    """The decoded bytes of a picture."""
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()
