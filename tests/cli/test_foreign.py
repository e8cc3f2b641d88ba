"""`generate --from` makes pictures from the settings that other programs wrote, and names what it did not take."""

import hashlib
import re
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stylefast.commands.files import jpeg_info
from stylefast.infotext import exif_comment, text_of
from tests.cli.conftest import pixels
from tests.support.small_checkpoints import random_lora, write_peft_lora
from tests.support.small_sdxl import small_pipeline

SETTINGS = "Steps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 3, Seed: 9, Size: 64x64"
TEXT = f"a cat\nNegative prompt: a dog\n{SETTINGS}, Model: sd_xl_base_1.0, ENSD: 31337"
SAME = ("a cat", "--negative", "a dog", "--steps", "2", "--scheduler", "dpmpp_2m_karras", "--spacing", "linspace")
SAME += ("--guidance", "3", "--seed", "9", "--size", "64x64")


@pytest.fixture
def theirs(tmp_path):
    """Writes another program's picture; its path."""

    def write(text, name="theirs.png"):
        picture, options = Image.new("RGB", (32, 32)), {}
        if name.endswith(".png"):
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_text("parameters", text)
        else:
            options["exif"] = picture.getexif()
            options["exif"].get_ifd(0x8769)[0x9286] = exif_comment(text)
        picture.save(tmp_path / name, **options)
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    path = tmp_path_factory.mktemp("loras") / "brand.safetensors"
    return write_peft_lora(random_lora(small_pipeline(), seed=1), path)


@pytest.mark.parametrize("name", ["theirs.png", "theirs.jpg", "theirs.webp"])
def test_a_picture_is_made_from_anothers_settings_and_the_rest_is_listed(
    name, theirs, generate, stylefast, model_folder, tmp_path
):
    source = theirs(TEXT, name)
    code, out, err = stylefast("generate", "--from", source, "--model", model_folder, "--out", tmp_path / "x.png")
    assert code == 0, err
    assert pixels(out.strip()) == pixels(generate(*SAME, "--out", tmp_path / "same.png")[0])
    assert f"warning: {source}: not taken: Model: 'sd_xl_base_1.0'\n" in err and "not taken: ENSD: '31337'\n" in err
    assert err.count("not taken") == 2 and "says nothing of" not in err


def test_options_beside_anothers_picture_come_first(theirs, generate, stylefast, model_folder, tmp_path):
    source = theirs(
        "a [dog:fish:0.5] AND (cat|dog), <lora:pen:1><lora:pen:1>\nNegative prompt: a [dog|fish]\n"
        "Steps: 3000, Sampler: Heun, Schedule type: Beta, CFG scale: 900000, Seed: -3, Size: 64, Clip skip: 0"
    )
    expected = pixels(generate(*SAME, "--prompt-syntax", "a1111", "--out", tmp_path / "same.png")[0])
    words = (*SAME, "--clip-skip", "0", "--model", model_folder, "--out", tmp_path / "x.png")
    code, out, err = stylefast("generate", "--from", source, *words)
    assert code == 0, err
    assert pixels(out.strip()) == expected and "says nothing of" not in err
    # what is not given is theirs
    source = theirs(TEXT)
    path = generate("--from", source, "--seed", "3", "--steps", "1", "--out", tmp_path / "y.png")[0]
    changed = {"--seed": "3", "--steps": "1"}
    same = [changed.get(before, word) for before, word in zip(("", *SAME), SAME)]
    assert pixels(path) == pixels(generate(*same, "--out", tmp_path / "z.png")[0])


def test_several_prompts_and_styles_may_stand_beside_anothers_picture(theirs, generate, tmp_path):
    reference = tmp_path / "reference.png"
    Image.new("RGB", (64, 64), "red").save(reference)
    words = ("a (cat:1.2)", "a fish", "--style-image", reference)
    paths = generate("--from", theirs(TEXT), *words, "--out", tmp_path / "theirs")
    same = generate(*words, *SAME[1:], "--prompt-syntax", "a1111", "--out", tmp_path / "same")
    assert [pixels(path) for path in paths] == [pixels(path) for path in same] and len(paths) == 3


def test_our_own_record_is_repeated_as_it_is(generate, stylefast, tmp_path):
    path = generate("a cat", "--steps", "1", "--out", tmp_path / "x.png")[0]
    options = {
        "--steps": ("--steps", "2"),
        "prompts": ("a dog",),
        "--guidance-interval": ("--guidance-interval", "0-1"),
    }
    for shown, words in options.items():
        code, _, err = stylefast("generate", "--from", path, *words)
        assert code == 2 and f"--from sets all settings of the call; drop {shown}" in err


def test_what_the_settings_do_not_say_is_named(theirs, stylefast, model_folder, tmp_path):
    source = theirs("a cat\nSteps: 2, Size: 64x64")
    code, _, err = stylefast("generate", "--from", source, "--model", model_folder, "--out", tmp_path / "x.png")
    assert code == 0 and "says nothing of Sampler, CFG scale, Seed; the defaults are used" in err


def test_our_own_text_gives_our_own_picture(theirs, generate, tmp_path):
    words = ("--steps", "2", "--scheduler", "euler_karras", "--guidance", "3", "--seed", "7", "--negative", "a [dog]")
    path = generate("a (cat)", *words, "--out", tmp_path / "ours.png")[0]
    # brackets of plain text are escaped, and the text is read in A1111's syntax
    source = theirs(Image.open(path).info["parameters"])
    assert pixels(generate("--from", source, "--out", tmp_path / "again.png")[0]) == pixels(path)


def test_a_picture_has_the_text_unless_it_is_not_wanted(generate, tmp_path):
    words = ("a cat", "--steps", "1", "--guidance", "1", "--out")
    assert {"parameters", "stylefast"} <= set(Image.open(generate(*words, tmp_path / "x.png")[0]).info)
    info = Image.open(generate(*words, tmp_path / "y.png", "--metadata", "stylefast")[0]).info
    assert "stylefast" in info and "parameters" not in info


def test_a_jpeg_has_record_and_text_and_is_repeated_from_either(theirs, generate, stylefast, tmp_path):
    words = (*SAME[:5], "--guidance", "3", "--seed", "9")
    path = generate(*words, "--out", tmp_path / "x.jpg")[0]
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        text = text_of(picture)
    assert text is not None and text.startswith("a cat\nNegative prompt: a dog\nSteps: 2, Sampler: Euler, ")
    exact = pixels(generate(*words, "--out", tmp_path / "x.png")[0])
    code, out, err = stylefast("generate", "--from", path, "--load-recorded", "--out", tmp_path / "again.png")
    assert code == 0 and pixels(out.strip()) == exact and "pixels not compared" in err
    assert pixels(generate("--from", theirs(text), "--out", tmp_path / "text.png")[0]) == exact
    plain = generate(*words, "--metadata", "stylefast", "--out", tmp_path / "y.jpg")[0]
    assert text_of(Image.open(plain)) is None and b'{"stylefast":' in Path(plain).read_bytes()


def test_several_jpegs_are_numbered_and_have_a_grid(generate, tmp_path):
    paths = generate("a cat", "a dog", "--steps", "1", "--guidance", "1", "--out", tmp_path / "x.jpg")
    assert [Path(path).name for path in paths] == ["x-1.jpg", "x-2.jpg", "x-grid.jpg"]
    assert all(Image.open(path).format == "JPEG" for path in paths)


def test_what_a_jpeg_has_no_room_for_is_said(capsys):
    facts = {"fingerprint": "0" * 16, "model": "x" * 70_000, "stylefast": "1.0", "size": [64, 32], "index": 0}
    request = {"prompt": "a fish", "negative_prompt": "", "steps": 4, "guidance": 5.0, "seed": 1, "scheduler": "euler"}
    assert jpeg_info({**facts, "call": {"requests": [request]}}) == {}
    assert "the record has 7" in (err := capsys.readouterr().err) and "the parameters text is longer" in err


def test_loras_are_taken_by_name_from_the_files_given(theirs, generate, lora, tmp_path):
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()[:12]
    source = theirs(f'a cat <lora:brand:0.5>\nNegative prompt: a dog\n{SETTINGS}, Lora hashes: "brand: {digest}"')
    path = generate("--from", source, "--lora", lora, "--out", tmp_path / "x.png")[0]
    assert pixels(path) == pixels(generate(*SAME, "--lora", f"{lora}:0.5", "--out", tmp_path / "y.png")[0])
    written = Image.open(path).info["parameters"]
    content = lora.read_bytes()
    tensors = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()[:12]
    assert written.startswith("a cat <lora:brand:0.5>\n") and f'Lora hashes: "brand: {tensors}"' in written
    again = generate("--from", theirs(written), "--lora", lora, "--out", tmp_path / "z.png")[0]
    assert pixels(again) == pixels(path)


@pytest.mark.parametrize(
    ("prompt", "settings", "options", "code", "message"),
    [
        ("<lora:brnd:1>", "", (), 2, "comes with the model: --lora FOLDER/brnd.safetensors (given: none)"),
        ("<lora:brnd:1>", "", ("--lora", "{lora}"), 2, "(given: brand; did you mean 'brand'?)"),
        ("<lora:brand:1>", "", ("--lora", "{lora}:0.3"), 2, "the strength 0.3, and the picture's settings 1"),
        ("<lora:brand:1>", ', Lora hashes: "brand: 0123456789ab"', ("--lora", "{lora}"), 1, "has other content"),
        ("", "", ("--load-recorded",), 2, "names no files to load; drop --load-recorded"),
        ("", ", Clip skip: 0, Version: stylefast 1", (), 2, "Clip skip is 0; it must be a whole number from 1 to 99"),
        ("[a:b:0.5]", "", (), 2, 'between steps, which is not supported; .*your own prompt: --from PICTURE "a fish"'),
        ("a AND b", "", ("--steps", "3"), 2, "a composition of prompts, .*your own prompt: --from PICTURE"),
        ("\nNegative prompt: [a|b]", "", (), 2, "your own negative_prompt: --negative"),
    ],
)
def test_what_can_not_be_done_is_refused_before_a_model_is_loaded(
    prompt, settings, options, code, message, theirs, stylefast, lora, tmp_path
):
    source = theirs(f"a cat {prompt}\n{SETTINGS}{settings}")
    words = [word.format(lora=lora) for word in options]
    found, _, err = stylefast("generate", "--from", source, "--model", "absent", "--out", tmp_path / "x.png", *words)
    assert found == code and (message in err or re.search(message, err)), err


def test_a_lora_of_other_content_can_be_forced(theirs, stylefast, lora, model_folder, tmp_path):
    source = theirs(f'a cat <lora:brand:1>\n{SETTINGS}, Lora hashes: "brand: 0123456789ab"')
    words = ("--model", model_folder, "--lora", lora, "--force", "--out", tmp_path / "x.png")
    code, _, err = stylefast("generate", "--from", source, *words)
    assert code == 0 and "warning" in err and "has other content" in err


def test_a_picture_without_any_settings_is_refused_as_before(stylefast, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    code, _, err = stylefast("generate", "--from", tmp_path / "x.png", "--out", tmp_path / "y.png")
    assert code == 2 and "has no settings" in err
