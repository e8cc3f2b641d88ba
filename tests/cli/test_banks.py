"""`stylefast bake`, `generate --style` and `info --bank`: what a baked style gives, and what is refused in one line."""

import json
import re
import shlex
import shutil

import pytest
from PIL import Image

from stylefast.commands.folder_lock import beside, only_writer
from stylefast.runtime.banks.baking import BakeJob
from tests.cli.conftest import pixels
from tests.cli.test_errors import assert_one_line

FEW = ("--steps", "2", "--guidance", "3")


@pytest.fixture
def bake(stylefast, model_folder):
    """Runs `stylefast bake` on the small model; the path printed. The call must succeed."""

    def run(*words):
        code, out, err = stylefast("bake", *words, "--model", model_folder, "--quiet")
        assert code == 0, err
        return out.strip()

    return run


@pytest.fixture(scope="session")
def blot_bank(model_folder, tmp_path_factory):
    """A bank of the reference "blot" with two steps and guidance."""
    from stylefast.cli import main

    path = tmp_path_factory.mktemp("banks") / "blot.bank"
    words = ("bake", "--style-image", "blot", *FEW, "--model", model_folder, "--quiet", "--out", path)
    assert main([str(word) for word in words]) == 0
    return path


def largest_difference(one, other):
    return max(abs(a - b) for a, b in zip(pixels(one), pixels(other), strict=True))


SAME_STYLES = {
    "a picture": (("--style-image", "blot"), ()),
    "two pictures": (("--style-image", "blot", "--style-image", "splash"), ("--shift", "1", "--adain", "q=1,k=0.5")),
    "a picture with a caption": (("--style-image", "blot", "--style-prompt", "a fox"), ("--scale", "0.8")),
    "a prompt": (("--style-prompt", "a fox, watercolor", "--negative", "a dog"), ("--share-group-norm",)),
    "hidden states": (("--style-prompt", "a fox", "--store", "hidden"), ()),
    "latents": (("--style-image", "blot", "--store", "latents"), ("--layers", "up_blocks")),
    "some layers": (("--style-image", "blot", "--layers", "up_blocks"), ("--layers", "up_blocks")),
    "another schedule": (
        ("--style-image", "blot", "--scheduler", "dpmpp_2m", "--spacing", "trailing"),
        ("--spacing", "trailing"),
    ),
    "without guidance": (("--style-prompt", "a fox", "--guidance", "1"), ()),
    "a picture without guidance": (("--style-image", "blot", "--guidance", "1"), ()),
    "a few-step preset": (("--style-image", "blot", "--scheduler", "sdxl_lightning"), ()),
    "another size": (("--style-image", "blot", "--size", "64x32"), ()),
}
SAMPLING = ("--steps", "2")


@pytest.fixture(scope="module")
def plain_pictures(tmp_path_factory):
    """(generate, size) -> the pictures of "a cat" and "a dog" without a style, made once for every size."""
    made = {}

    def pictures(generate, size):
        if size not in made:
            words = ("a cat", "a dog", *SAMPLING, "--size", size, "--no-grid")
            made[size] = generate(*words, "--out", tmp_path_factory.mktemp("plain"))
        return made[size]

    return pictures


@pytest.mark.parametrize("reference, reading", SAME_STYLES.values(), ids=SAME_STYLES.keys())
def test_a_bank_gives_the_pictures_of_its_reference(bake, generate, plain_pictures, tmp_path, reference, reading):
    bank = bake(*reference, *SAMPLING, "--out", tmp_path / "x.bank")
    cached = generate("a cat", "a dog", "--style", bank, *reading, "--no-grid", "--out", tmp_path / "cached")
    live = [word for word in reference if word not in ("--store", "hidden", "latents")]
    live += [word for word in reading if word not in live]
    uncached = generate("a cat", "a dog", *live, *SAMPLING, "--no-grid", "--out", tmp_path / "live")
    plain = plain_pictures(generate, "64x32" if "64x32" in reference else "64x64")
    for i in range(2):
        assert largest_difference(cached[i], uncached[i]) <= 1
        assert largest_difference(cached[i], plain[i]) > 1


def test_a_bank_brings_steps_scheduler_size_guidance_and_negative_prompt(bake, generate, tmp_path):
    words = ("--steps", "3", "--scheduler", "ddim", "--size", "64x32", "--guidance", "2.5", "--negative", "a dog")
    bank = bake("--style-prompt", "a fox", *words, "--out", tmp_path / "fox.bank")
    path = generate("a cat", "--style", bank, "--out", tmp_path / "a.png")[0]
    info = Image.open(path).info
    assert "Negative prompt: a dog\nSteps: 3, Sampler: DDIM, CFG scale: 2.5, Seed: 0, Size: 64x32" in info["parameters"]
    path = generate("a cat", "--style", bank, "--guidance", "4", "--negative", "", "--out", tmp_path / "b.png")[0]
    assert "a cat\nSteps: 3, Sampler: DDIM, CFG scale: 4.0" in Image.open(path).info["parameters"]


def test_from_makes_a_banks_picture_again_or_says_what_became_of_the_bank(bake, generate, stylefast, tmp_path):
    bank = tmp_path / "x.bank"
    bake("--style-image", "blot", *FEW, "--out", bank)
    path = generate("a cat", "a dog", "--style", bank, "--shift", "1", "--no-grid", "--out", tmp_path / "first")[1]
    words = ("generate", "--from", path, "--out", tmp_path / "again.png", "--load-recorded")
    code, out, err = stylefast(*words)
    assert code == 0 and "same pixels" in err and "warning" not in err
    bake("--style-image", "splash", *FEW, "--out", bank, "--overwrite")
    words = (*words, "--overwrite")
    assert_one_line(*stylefast(*words)[::2], 2, "was baked again")
    bank.unlink()
    assert_one_line(*stylefast(*words)[::2], 2, f"no style bank found at {bank}")


def test_a_bank_works_beside_a_picture_and_a_learned_style(generate, blot_bank, tmp_path):
    words = ("a cat", "--no-grid", "--style", blot_bank, "--out")
    alone = generate(*words, tmp_path / "alone.png")[0]
    composed = ("--method", "instant", "--style-image", "splash", "--learned", "chalk")
    together = generate(*words, tmp_path / "together.png", *composed)[0]
    weaker = generate(*words, tmp_path / "weaker.png", *composed, "--scale", "0.2")[0]
    assert pixels(alone) != pixels(together) != pixels(weaker)
    record = json.loads(Image.open(together).info["stylefast"])
    assert [style["kind"] for style in record["call"]["styles"]] == ["StyleAligned", "InstantStyle", "DreamStyler"]


def test_a_request_file_names_a_bank(generate, blot_bank, tmp_path):
    file = tmp_path / "calls.json"
    style = {"kind": "StyleAligned", "reference": str(blot_bank)}
    file.write_text(json.dumps([{"prompt": "a cat", "steps": 2, "guidance": 3, "style": style}]))
    path = generate("--requests", file, "--out", tmp_path / "a.png")[0]
    assert pixels(path) == pixels(generate("a cat", "--style", blot_bank, *FEW, "--out", tmp_path / "b.png")[0])


def test_baking_says_what_it_takes_and_how_it_is_used(stylefast, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--style-prompt", "A fox, watercolor!", "--layers", "up_blocks", *FEW, "--model", model_folder)
    code, out, err = stylefast("bake", *words)
    assert code == 0 and out == "a-fox-watercolor.bank\n"
    plan, use = err.split("\n")[1], err.split("\n")[-2]
    assert "2 steps of euler at 64x64, keys and values in float32" in plan and "2/2" in err
    (expected, unit), (found, same_unit) = re.findall(r"([\d.]+) ([KM]B)", err)
    assert unit == same_unit and float(expected) <= float(found) <= 1.1 * float(expected)
    command = shlex.split(use)
    assert command[:3] == ["stylefast", "generate", "a fish"]
    assert stylefast(*command[1:], "--quiet")[0] == 0


def test_a_banks_name_comes_from_its_picture(bake, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bake("--style-image", photo, *FEW) == "photo.bank"


def test_an_interrupted_bake_leaves_nothing_and_keeps_what_was_there(stylefast, model_folder, tmp_path, monkeypatch):
    before_step = BakeJob.before_step

    def interrupted(job, runner, group):
        if group.step == 1:
            raise KeyboardInterrupt
        return before_step(job, runner, group)

    monkeypatch.setattr(BakeJob, "before_step", interrupted)
    target = tmp_path / "x.bank"
    words = ("bake", "--style-image", "blot", *FEW, "--model", model_folder, "--quiet", "--out", target)
    assert_one_line(*stylefast(*words)[::2], 130, "interrupted")
    assert not list(tmp_path.iterdir())
    target.write_bytes(b"precious")
    assert_one_line(*stylefast(*words, "--overwrite")[::2], 130, "interrupted")
    assert list(tmp_path.iterdir()) == [target] and target.read_bytes() == b"precious"


def test_a_bank_that_another_process_is_baking_is_not_baked_twice(stylefast, tmp_path):
    target = tmp_path / "x.bank"
    words = ("bake", "--style-prompt", "x", "--model", tmp_path / "not-even-loaded", "--out", target)
    with only_writer(target, beside(target)):
        assert_one_line(*stylefast(*words)[::2], 2, f"another stylefast is writing to {target}; wait for it")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_before_anything_runs(stylefast, model_folder, tmp_path, monkeypatch):
    class Full:
        free, total = 1000, 9000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Full)
    monkeypatch.setattr(BakeJob, "before_step", lambda *arguments: pytest.fail("the model ran"))
    words = ("bake", "--style-image", "blot", *FEW, "--model", model_folder, "--quiet", "--out", tmp_path / "x.bank")
    assert_one_line(*stylefast(*words)[::2], 1, "free or allowed")
    assert not list(tmp_path.iterdir())


# without a model: these must be found before one is loaded
BAD_WORDS = {
    "nothing to bake": ((), "nothing to bake"),
    "an empty prompt": (("--style-prompt", " "), "the reference's prompt is empty"),
    "a missing picture": (("--style-image", "gone.png"), "no picture found at gone.png"),
    "a bank to bake": (("--style-image", "x.bank"), "is a style bank"),
    "a negative seed": (("--style-prompt", "x", "--seed=-2"), "seed is -2"),
    "noise without picture": (("--style-prompt", "x", "--noise", "ddim"), "give --style-image as well"),
    "inversion along another sampler": (("--style-image", "{photo}", "--noise", "ddim"), "scheduler is 'euler'"),
    "an unknown store": (("--style-prompt", "x", "--store", "all"), "invalid choice: 'all'"),
    "an unknown type": (("--style-prompt", "x", "--store-dtype", "int4"), "invalid choice: 'int4'"),
    "a type for latents": (("--style-prompt", "x", "--store", "latents", "--store-dtype", "fp8"), "drop --store-dtype"),
    "layers for latents": (("--style-prompt", "x", "--store", "latents", "--layers", "up_blocks"), "stores no layers"),
    "steps out of range": (("--style-prompt", "x", "--steps", "0"), "steps is 0"),
    "an unknown scheduler": (("--style-prompt", "x", "--scheduler", "magic"), "scheduler is 'magic'"),
    "a size that is none": (("--style-prompt", "x", "--size", "large"), "WIDTHxHEIGHT"),
    "a name that is no bank's": (("--style-prompt", "x", "--out", "x.pt"), "name it x.bank"),
    "a folder to write": (("--style-prompt", "x", "--out", "."), "is a folder"),
    "a missing folder": (("--style-prompt", "x", "--out", "gone/x.bank"), "the folder gone does not exist"),
    "a file that exists": (("--style-image", "{photo}", "--out", "{taken}"), "pass --overwrite"),
    "a memory limit that is no size": (("--style-prompt", "x", "--memory-limit", "much"), "--memory-limit is 'much'"),
}


@pytest.mark.parametrize("words, message", BAD_WORDS.values(), ids=BAD_WORDS.keys())
def test_what_cannot_be_baked_is_one_line_and_exit_code_2(stylefast, photo, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    taken = tmp_path / "taken.bank"
    taken.write_bytes(b"precious")
    words = (word.format(photo=photo, taken=taken) for word in words)
    code, out, err = stylefast("bake", *words, "--model", tmp_path / "gone")
    assert_one_line(code, err, 2, message)
    assert out == "" and sorted(tmp_path.iterdir()) == [photo, taken] and taken.read_bytes() == b"precious"


MISFITS = {
    "steps": (("--steps", "3"), "steps=3 is requested"),
    "the scheduler": (("--scheduler", "ddim"), "scheduler='ddim' is requested"),
    "the size": (("--size", "64x32"), "size=(64, 32) is requested"),
    "a spacing": (("--spacing", "trailing"), "schedule is"),
    "no such layers": (("--layers", "gone"), "matches no self-attention layer"),
}


@pytest.mark.parametrize("words, message", MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_the_bank_is_named(stylefast, model_folder, blot_bank, tmp_path, words, message):
    words = ("generate", "a cat", "--style", blot_bank, *words, "--model", model_folder, "--quiet")
    assert_one_line(*stylefast(*words, "--out", tmp_path / "x.png")[::2], 2, message)
    assert not list(tmp_path.iterdir())


def test_guidance_needs_a_bank_with_a_null_branch(bake, stylefast, model_folder, tmp_path):
    bank = bake("--style-image", "blot", "--steps", "2", "--guidance", "1", "--out", tmp_path / "x.bank")
    words = ("generate", "a cat", "--style", bank, "--guidance", "3", "--model", tmp_path / "not-even-loaded")
    assert_one_line(*stylefast(*words)[::2], 2, "also needs null")


def test_another_models_bank_is_refused(stylefast, blot_bank, tmp_path):
    from tests.support.small_sdxl import small_pipeline

    small_pipeline(seed=9).save_pretrained(tmp_path / "other")
    words = ("generate", "a cat", "--style", blot_bank, "--model", tmp_path / "other", "--quiet")
    assert_one_line(*stylefast(*words, "--out", tmp_path / "x.png")[::2], 2, "but the loaded one is 'other'")


def test_a_bank_cut_short_or_altered_is_refused(stylefast, blot_bank, tmp_path):
    content = blot_bank.read_bytes()
    bank = tmp_path / "x.bank"
    words = ("generate", "a cat", "--style", bank, "--model", tmp_path / "not-even-loaded")
    bank.write_bytes(content[:-100])
    assert_one_line(*stylefast(*words)[::2], 2, "can't read the style bank")
    bank.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert_one_line(*stylefast(*words)[::2], 2, "was altered")


def test_info_says_what_a_bank_holds_and_whether_it_is_whole(stylefast, blot_bank, tmp_path):
    code, out, err = stylefast("info", "--bank", blot_bank)
    assert code == 0 and err == ""
    lines = dict(line.split(maxsplit=1) for line in out.replace("style bank", "file", 1).splitlines())
    assert lines["reference"] == "a picture, noise forward, seed 0"
    assert lines["schedule"] == "2 steps of euler at 64x64, with guidance"
    assert "keys and values" in lines["holds"] and lines["checksum"].endswith(", holds")

    content = blot_bank.read_bytes()
    altered = tmp_path / "altered.bank"
    altered.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, out, err = stylefast("info", "--bank", altered, "--json")
    found = json.loads(out)
    assert code == 1 and found["unaltered"] is False and found["bytes"] == len(content)
    assert found["bank"]["steps"] == 2 and found["bank"]["size"] == [64, 64] and found["bank"]["store"] == "kv"
    code, out, err = stylefast("info", "--bank", altered)
    assert code == 1 and "does not match" in out
    assert_one_line(*stylefast("info", "--bank", tmp_path / "gone.bank")[::2], 2, "no style bank found at")
