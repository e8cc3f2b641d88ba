"""`stylefast train-lora`: from a folder of pictures to a file that `generate --lora` takes."""

import json

import pytest
from safetensors import safe_open

from tests.cli.conftest import pixels
from tests.cli.test_errors import assert_one_line
from tests.support.small_adapter import small_picture


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "drawings"
    folder.mkdir()
    for seed in range(2):
        small_picture(seed, (64, 64)).save(folder / f"{seed}.png")
    return folder


def test_a_trained_file_changes_pictures(stylefast, generate, model_folder, folder, tmp_path):
    out = tmp_path / "ours.safetensors"
    words = ("train-lora", folder, "--out", out, "--model", model_folder, "--steps", 3, "--rank", 2, "--quiet")
    more = ("--lr", "0.01", "--min-snr", "5", "--blocks", "up_blocks,mid_block", "--layers", "all", "--batch", "2")
    more += ("--gradient-checkpointing",)
    code, printed, err = stylefast(*words, "--caption", "a cat", *more)
    assert (code, printed) == (0, f"{out}\n"), err
    with safe_open(out, "pt") as file:
        said, keys = file.metadata(), list(file.keys())
    wanted = {"ss_network_dim": "2", "ss_learning_rate": "0.01", "ss_steps": "3", "ss_min_snr_gamma": "5.0"}
    wanted |= {"ss_gradient_checkpointing": "True"}
    assert wanted.items() <= said.items() and json.loads(said["stylefast.blocks"]) == ["up_blocks", "mid_block"]
    assert not any("input_blocks" in key for key in keys)
    (plain,) = generate("a cat", "--steps", 1, "--out", tmp_path / "plain.png")
    (ours,) = generate("a cat", "--steps", 1, "--lora", out, "--out", tmp_path / "ours.png")
    assert pixels(plain) != pixels(ours)

    code, printed, err = stylefast(*words, "--caption", "a cat")
    assert_one_line(code, err, 2, "pass --overwrite to replace it")
    assert stylefast(*words, "--caption", "a cat", "--overwrite")[0] == 0


BAD = {
    "no captions": ((), "'0.png' has no caption"),
    "rank 0": (("--caption", "a cat", "--rank", "0"), "rank is 0; it must be a whole number from 1 to 1024"),
    "a LoRA of pictures": (("--caption", "a cat", "--lora", __file__), "give it as --merge-lora"),
    "graphs": (
        ("--caption", "a cat", "--backend", "onnxruntime"),
        "--backend onnxruntime runs compiled or exported graphs",
    ),
    "another ending": (("--caption", "a cat", "--out", "x.bin"), "its name must end in .safetensors"),
    "a layer": (("--caption", "a cat", "--layers", "atention"), "did you mean 'attention'?"),
}


@pytest.mark.parametrize("words, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(stylefast, folder, tmp_path, words, message):
    code, out, err = stylefast("train-lora", folder, "--out", tmp_path / "x.safetensors", *words)
    assert_one_line(code, err, 2, message)
    assert out == "" and not list(tmp_path.glob("*.safetensors"))


def test_ctrl_c_keeps_what_was_learned(stylefast, model_folder, folder, tmp_path, monkeypatch):
    from stylefast.training.lora import LoraTraining

    step = LoraTraining.step

    def interrupted(self):
        if self.done == 2:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(LoraTraining, "step", interrupted)
    out = tmp_path / "half.safetensors"
    words = ("--out", out, "--caption", "a cat", "--model", model_folder, "--steps", "9", "--quiet")
    code, printed, err = stylefast("train-lora", folder, *words)
    assert code == 130 and printed == "" and f"{out} holds what 2 steps have learned" in err
    with safe_open(out, "pt") as file:
        assert file.metadata()["ss_steps"] == "2"


def test_the_choices_of_the_command_are_those_of_the_code():
    from stylefast.commands.train_lora import LAYERS
    from stylefast.training import low_rank

    assert tuple(low_rank.LAYERS) == LAYERS
