"""`stylefast generate`: files, their records, and making a picture again."""

import json
import shutil

import pytest
from PIL import Image

from tests.cli.conftest import pixels

FEW = ("--steps", "2", "--guidance", "3")

STYLED_CALLS = {
    "plain": ("a cat", "a dog"),
    "aligned to the first": ("a cat in neon style", "a dog", "--method", "aligned", "--shift", "1"),
    "aligned to a shipped picture": ("a cat", "--style-image", "blot", "--adain", "q=1,k=0.5", "--layers", "up_blocks"),
    "aligned to a prompt": ("a cat", "--style-prompt", "neon style", "--share-group-norm"),
    "instant": ("a cat", "--style-image", "blot", "--method", "instant", "--blocks", "all", "--scale", "0.7"),
    "instant without content": ("a cat", "--style-image", "blot", "--method", "instant", "--content", "a dog"),
    "two pictures": ("a cat", "--style-image", "blot", "--style-image", "splash", "--method", "instant"),
    "learned": ("a cat", "--learned", "chalk", "--context", "a dog"),
    "all three": ("a cat", "a dog", "--style-image", "blot", "--method", "both", "--learned", "chalk"),
    "another sampler": ("a cat", "--scheduler", "euler_ancestral", "--negative", "a dog", "--guidance-rescale", "0.5"),
}


@pytest.mark.parametrize("words", STYLED_CALLS.values(), ids=STYLED_CALLS.keys())
def test_from_makes_the_same_pixels_again(generate, stylefast, model_folder, tmp_path, words):
    last = generate(*words, *FEW, "--seed", "5", "--no-grid", "--out", tmp_path / "first")[-1]
    code, out, err = stylefast("generate", "--from", last, "--out", tmp_path / "again.png", "--load-recorded")
    assert code == 0, err
    assert "same pixels" in err and "warning" not in err
    assert pixels(out.strip()) == pixels(last)
    assert out.strip() == str(tmp_path / "again.png")


@pytest.mark.parametrize("method", ["aligned", "instant", "both"])
def test_every_method_changes_the_picture(generate, tmp_path, photo, method):
    words = ("a cat", *FEW, "--no-grid", "--out")
    plain = generate(*words, tmp_path / "plain.png")[0]
    styled = generate("--style-image", photo, "--method", method, *words, tmp_path / "styled.png")[0]
    assert pixels(plain) != pixels(styled)


def test_a_style_image_means_style_aligned(generate, tmp_path, photo):
    words = ("a cat", "--style-image", photo, *FEW, "--no-grid", "--out")
    default = generate(*words, tmp_path / "default.png")[0]
    aligned = generate("--method", "aligned", *words, tmp_path / "aligned.png")[0]
    assert pixels(default) == pixels(aligned)


def test_pictures_are_numbered_named_after_their_prompts_and_shown_in_a_grid(generate, tmp_path):
    paths = generate("a cat", "A Dog, in neon!", *FEW, "--out", tmp_path / "out")
    assert [path.rpartition("/")[2] for path in paths] == ["0001-a-cat.png", "0002-a-dog-in-neon.png", "0001-grid.png"]
    first, grid = Image.open(paths[0]), Image.open(paths[2])
    assert grid.width > 2 * first.width


def test_numbering_goes_on_behind_files_that_exist(generate, tmp_path):
    first = generate("a cat", *FEW, "--out", tmp_path)[0]
    before = pixels(first)
    second = generate("a cat", *FEW, "--seed", "1", "--out", tmp_path)[0]
    assert second.endswith("0002-a-cat.png") and pixels(first) == before
    again = generate("a cat", *FEW, "--seed", "1", "--out", tmp_path, "--overwrite")[0]
    assert again == first and pixels(first) == pixels(second)


def test_several_prompts_to_one_file_name_are_numbered_behind_it(generate, tmp_path):
    paths = generate("a cat", "a dog", *FEW, "--no-grid", "--out", tmp_path / "x.png")
    assert paths == [str(tmp_path / "x-1.png"), str(tmp_path / "x-2.png")]


def test_nothing_but_whole_files_is_left_behind(generate, tmp_path):
    paths = generate("a cat", "a dog", *FEW, "--out", tmp_path / "out")
    assert sorted(str(path) for path in (tmp_path / "out").iterdir()) == sorted(paths)


def test_pictures_carry_a_record_and_the_line_that_other_tools_read(generate, tmp_path, photo):
    path = generate("a cat", *FEW, "--negative", "a dog", "--seed", "9", "--style-image", photo, "--out", tmp_path)[0]
    info = Image.open(path).info
    prompt, negative, settings = info["parameters"].split("\n")
    assert (prompt, negative) == ("a cat", "Negative prompt: a dog")
    assert settings.startswith("Steps: 2, Sampler: Euler, CFG scale: 3.0, Seed: 9, Size: 64x64, Model hash: ")
    record = json.loads(info["stylefast"])
    assert record["index"] == 0 and record["seed"] == 9 and record["call"]["requests"][0]["prompt"] == "a cat"
    assert len(info["stylefast"]) < 64_000


def test_prompts_beyond_latin_letters_survive(generate, stylefast, tmp_path):
    path = generate("a cat 猫 ✨", *FEW, "--out", tmp_path / "a.png")[0]
    assert Image.open(path).info["parameters"].startswith("a cat 猫 ✨\n")
    code, out, err = stylefast("generate", "--from", path, "--out", tmp_path / "b.png", "--load-recorded")
    assert code == 0 and "same pixels" in err


def test_a_request_file_with_shared_inline_and_no_style(generate, tmp_path, photo):
    file = tmp_path / "calls.json"
    file.write_text(
        json.dumps(
            {
                "styles": {"brand": {"type": "style_aligned", "reference": "photo.jpg", "shift": 1.0}},
                "requests": [
                    {"prompt": "a cat", "style": "brand", "steps": 2},
                    {"prompt": "a dog", "style": ["brand", {"kind": "DreamStyler", "embedding": "chalk"}], "steps": 3},
                    {"prompt": "a house", "steps": 2, "size": "64x64", "guidance": 1},
                ],
            }
        )
    )
    together = generate("--requests", file, "--no-grid", "--out", tmp_path / "together")
    alone = generate("a cat", "--style-image", photo, "--shift", "1", "--steps", "2", "--out", tmp_path / "alone.png")
    assert len(together) == 3
    difference = max(abs(a - b) for a, b in zip(pixels(together[0]), pixels(alone[0])))
    assert difference <= 2


def test_one_picture_of_a_call_is_made_again_with_its_group(generate, stylefast, tmp_path):
    words = ("a cat in neon style", "a dog", "a house", "--method", "aligned", *FEW)
    paths = generate(*words, "--no-grid", "--out", tmp_path)
    code, out, err = stylefast("generate", "--from", paths[1], "--out", tmp_path / "again.png", "--load-recorded")
    assert code == 0 and pixels(out.strip()) == pixels(paths[1])


def test_a_picture_made_again_can_be_made_again(generate, stylefast, tmp_path):
    path = generate("a cat", "a dog", *FEW, "--no-grid", "--out", tmp_path / "first")[1]
    second, third = tmp_path / "second.png", tmp_path / "third.png"
    stylefast("generate", "--load-recorded", "--from", path, "--out", second)
    code, out, err = stylefast("generate", "--load-recorded", "--from", second, "--out", third)
    assert code == 0 and pixels(out.strip()) == pixels(path)


def test_a_model_with_other_weights_is_refused_unless_forced(generate, stylefast, model_folder, tmp_path):
    from tests.support.small_sdxl import small_pipeline

    path = generate("a cat", *FEW, "--out", tmp_path / "a.png")[0]
    other = tmp_path / "other"
    small_pipeline(seed=9).save_pretrained(other)
    words = ("generate", "--from", path, "--model", other, "--out", tmp_path / "b.png")
    code, out, err = stylefast(*words)
    assert code == 1 and "different weights" in err and "--force" in err and not (tmp_path / "b.png").exists()
    code, out, err = stylefast(*words, "--force")
    assert code == 0 and "warning" in err and pixels(out.strip()) != pixels(path)


def test_a_reference_that_changed_since_is_refused(generate, stylefast, tmp_path, photo):
    path = generate("a cat", "--style-image", photo, *FEW, "--out", tmp_path / "a.png")[0]
    Image.new("RGB", (80, 60), "red").save(photo)
    code, out, err = stylefast("generate", "--from", path, "--out", tmp_path / "b.png", "--load-recorded")
    assert code == 2 and "different pixels" in err and err.count("\n") == 1


def test_a_model_moved_elsewhere_is_named_with_model(generate, stylefast, model_folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(model_folder, moved)
    words = ("a cat", "--style-image", "blot", "--learned", "chalk", *FEW)
    path = generate(*words, "--out", tmp_path / "a.png")[0]
    words = ("generate", "--from", path, "--model", moved, "--load-recorded", "--out", tmp_path / "b.png")
    code, out, err = stylefast(*words)
    assert code == 0 and pixels(out.strip()) == pixels(path)
