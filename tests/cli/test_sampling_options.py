"""Options of `generate` that say how it samples and where it runs."""

import json

import pytest
from PIL import Image

from stylefast.commands.generate import ModelChoice
from stylefast.engine import Engine
from stylefast.infotext import sampler_name
from stylefast.sampling.few_step import FEW_STEP_PRESETS
from stylefast.sampling.schedule import SCHEDULERS
from stylefast.styles.embeddings import StageEmbedding, load_embedding, save_embedding
from tests.cli.conftest import pixels
from tests.cli.test_errors import assert_one_line


def recorded(path):
    return json.loads(Image.open(path).info["stylefast"])["call"]["requests"][0]


def test_a_guidance_interval_and_a_spacing_change_the_picture_and_are_recorded(generate, stylefast, tmp_path):
    words = ("a cat", "--steps", "4", "--out")
    plain = generate(*words, tmp_path / "plain.png")[0]
    cut = generate(*words, tmp_path / "cut.png", "--guidance-interval", "0 - .5")[0]
    spaced = generate(*words, tmp_path / "spaced.png", "--spacing", "trailing")[0]
    assert pixels(plain) != pixels(cut) and pixels(plain) != pixels(spaced)
    assert recorded(cut)["guidance_interval"] == [0.0, 0.5] and recorded(spaced)["spacing"] == "trailing"
    whole = generate(*words, tmp_path / "whole.png", "--guidance-interval", "0-1.0")[0]
    assert pixels(plain) == pixels(whole)
    for path in (cut, spaced):
        words = ("--load-recorded", "--out", tmp_path / "again.png", "--overwrite")
        code, _, err = stylefast("generate", "--from", path, *words)
        assert code == 0 and "same pixels" in err


SHELL = {
    "prediction type": (("--prediction-type", "epsilon"), ("--prediction-type", "v_prediction")),
    "clip skip": (("--clip-skip", "0"), ("--clip-skip", "1")),
}


@pytest.mark.parametrize("same, other", SHELL.values(), ids=SHELL.keys())
def test_what_is_said_in_the_shell_changes_the_picture_and_from_says_it_again(
    generate, stylefast, tmp_path, same, other
):
    words = ("a cat", "--steps", "2", "--out")
    plain = generate(*words, tmp_path / "plain.png")[0]
    assert pixels(plain) == pixels(generate(*words, tmp_path / "same.png", *same)[0])
    changed = generate(*words, tmp_path / "other.png", *other)[0]
    assert pixels(plain) != pixels(changed)
    code, _, err = stylefast("generate", "--from", changed, "--load-recorded", "--out", tmp_path / "again.png")
    assert code == 0 and "same pixels" in err


def test_a_panorama_is_drawn_in_windows_and_drawn_again_from_itself(generate, stylefast, tmp_path):
    words = ("a house", "--steps", "2", "--size", "128x64", "--out")
    whole = generate(*words, tmp_path / "whole.png")[0]
    wide = ("--window", "64x64", "--window-stride", "32", "--wrap", "--style-image", "blot")
    found = generate(*words, tmp_path / "wide.png", *wide)[0]
    assert Image.open(found).size == Image.open(whole).size == (128, 64)
    assert (recorded(found)["window"], recorded(found)["window_stride"], recorded(found)["wrap"]) == (
        [64, 64],
        32,
        True,
    )
    code, _, err = stylefast("generate", "--from", found, "--load-recorded", "--out", tmp_path / "again.png")
    assert code == 0 and "same pixels" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--window", "64"), "--window is '64'; it must be WIDTHxHEIGHT"),
        (("--window", "64x64"), "a part of the picture's size, which must then be given as size"),
        (("--size", "128x64", "--window", "64x64", "--window-stride", "12"), "window_stride is 12"),
        (("--wrap",), "wrap is True, which has no effect without window"),
    ],
)
def test_windows_that_make_no_sense_are_refused(stylefast, tmp_path, words, message):
    code, out, err = stylefast("generate", "a", *words, "--out", tmp_path / "a.png")
    assert code == 2 and message in err and not list(tmp_path.iterdir())


def test_a_picture_is_explained_beside_it_and_again_from_it(generate, stylefast, tmp_path):
    words = ("generate", "a fish", "--style-image", "neon", "--method", "both", "--steps", "3")
    code, out, err = stylefast(*words, "--explain", "20,30", "--explain-steps", "1,3", "--out", tmp_path / "fish.png")
    page = tmp_path / "fish-explained" / "index.html"
    assert code == 0 and str(page) in out and "of its references" in err
    assert {"picture.png", "reference-1-step-3.png", "image-prompt.png"} <= {
        file.name for file in page.parent.iterdir()
    }
    words = ("generate", "--from", tmp_path / "fish.png", "--load-recorded", "--out", tmp_path / "again.png")
    code, out, err = stylefast(*words, "--explain", "20,30", "--explain-layers", "mid_block")
    assert code == 0 and "same pixels" in err and (tmp_path / "again-explained" / "index.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a",), "--explain shows what a picture reads of references and image prompts; give it a style"),
        (("a", "b", "--style-image", "neon"), "--explain shows one picture, and the call makes 2"),
        (("a", "--style-image", "neon", "--explain", "here"), "--explain is 'here'; it must be X,Y in pixels"),
        (("a", "--style-image", "neon", "--explain", "64,1"), "point's x is 64"),
        (("a", "--style-image", "neon", "--explain-steps", "one"), "--explain-steps is 'one'"),
    ],
)
def test_what_can_not_be_explained_is_refused_before_a_picture_is_made(stylefast, tmp_path, words, message):
    code, out, err = stylefast("generate", "--explain", "1,1", *words, "--out", tmp_path)
    assert code == 2 and message in err and not list(tmp_path.iterdir())


def test_options_to_explain_need_a_point(stylefast, tmp_path):
    code, out, err = stylefast("generate", "a", "--explain-steps", "1", "--out", tmp_path)
    assert code == 2 and "--explain-steps needs --explain" in err


def test_a_learned_style_is_turned_towards_another_and_drawn_again(generate, stylefast, model_folder, tmp_path):
    own = next((model_folder / "styles").glob("*.safetensors"))
    loaded = load_embedding(own, widths=None)
    other = StageEmbedding("other", loaded.clip_l.flip(-1), loaded.clip_g.flip(-1), loaded.pooled_policy)
    save_embedding(other, tmp_path / "other.safetensors")
    words = ("a fish", "--learned", own.stem, "--steps", "2", "--out")
    plain = generate(*words, tmp_path / "plain.png")[0]
    between = ("--towards", tmp_path / "other.safetensors", "--share", "0.4")
    turned = generate(*words, tmp_path / "turned.png", *between)[0]
    assert pixels(plain) != pixels(turned)
    code, _, err = stylefast("generate", "--from", turned, "--out", tmp_path / "again.png")
    assert code == 2 and "other.safetensors" in err  # files that a picture names are not opened unasked
    code, _, err = stylefast("generate", "--from", turned, "--load-recorded", "--out", tmp_path / "again.png")
    assert code == 0 and "same pixels" in err
    for wrong, message in (
        (("--share", "0.4"), "--towards another"),
        (("--learned", "x", *between), "give one --learned"),
    ):
        code, _, err = stylefast("generate", *map(str, words), tmp_path / "no.png", *wrong)
        assert code == 2 and message in err


STYLED = {
    "clean": (("--method", "instant", "--blocks", "all"), ("--clean", "0.5", "--clean-negative", "0.1")),
    "weights": (("--style-image", "splash", "--method", "both"), ("--weights", "3,1")),
    "swap": (("--method", "aligned"), ("--mode", "swap")),
    "calibrated": (("--method", "aligned"), ("--calibrate", "0.7")),
}


@pytest.mark.parametrize("plain, more", STYLED.values(), ids=STYLED.keys())
def test_styles_options_change_the_picture_and_from_draws_it_again(generate, stylefast, tmp_path, plain, more):
    words = ("a fish", "--style-image", "blot", *plain, "--steps", "2", "--out")
    before = generate(*words, tmp_path / "plain.png")[0]
    found = generate(*words, tmp_path / "changed.png", *more)[0]
    assert pixels(before) != pixels(found)
    code, _, err = stylefast("generate", "--from", found, "--load-recorded", "--out", tmp_path / "again.png")
    assert code == 0 and "same pixels" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--style-image", "neon", "--clean", "0.1"), "--clean has no effect here; it needs --method instant"),
        (("--style-image", "neon", "--method", "instant", "--clean-negative", "1"), "--clean-negative is a part of"),
        (("--style-image", "neon", "--method", "instant", "--mode", "swap"), "--mode has no effect here"),
        (("--style-image", "neon", "--weights", "1,2"), "--weights weights several reference pictures"),
        (("--style-image", "neon", "--style-image", "glass", "--weights", "a"), "--weights is 'a'"),
        (("--style-image", "neon", "--style-image", "glass", "--weights", "1,2,3"), "3 weights for 2 references"),
        (("--style-image", "neon", "--calibrate", "2"), "calibrate is 2.0"),
    ],
)
def test_options_of_styles_that_make_no_sense_are_refused(stylefast, tmp_path, words, message):
    code, out, err = stylefast("generate", "a", *words, "--out", tmp_path)
    assert code == 2 and message in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheduler", FEW_STEP_PRESETS)
def test_a_few_step_preset_brings_its_guidance(generate, tmp_path, scheduler):
    words = ("a cat", "--scheduler", scheduler, "--steps", FEW_STEP_PRESETS[scheduler].steps[0], "--out", tmp_path)
    assert recorded(generate(*words)[0])["guidance"] == FEW_STEP_PRESETS[scheduler].guidance
    assert recorded(generate(*words, "--guidance", "1.5")[0])["guidance"] == 1.5


def test_samplers_have_the_names_that_other_tools_know():
    names = {scheduler: sampler_name(scheduler) for scheduler in SCHEDULERS}
    assert len(set(names.values())) == len(names) and not set(names.values()) & set(SCHEDULERS)
    assert sampler_name("dpmpp_2m_sde_karras") == "DPM++ 2M SDE Karras"
    assert sampler_name("dpmpp_3m_sde_exponential") == "DPM++ 3M SDE Exponential"
    assert [sampler_name(name) for name in ("sdxl_turbo", "hyper_sd", "tcd")] == ["Euler a", "DDIM", "TCD"]


def test_memory_and_backend_reach_the_engine_only_when_given(monkeypatch):
    asked = []
    monkeypatch.setattr(Engine, "from_pretrained", lambda source, **options: asked.append((source, options)))
    ModelChoice().load()
    ModelChoice(options={"backend": "torch", "memory_limit": "8GB", "bank_memory": "512MiB", "dtype": "float32"}).load()
    given = {"backend": "torch", "memory_limit": "8GB", "bank_memory": "512MiB", "dtype": "float32"}
    assert asked == [("tiny", {}), ("tiny", given)]


def test_what_belongs_to_the_machine_is_not_kept_in_the_picture(generate, tmp_path):
    words = ("--device", "cpu", "--backend", "torch", "--memory-limit", "4GB", "--bank-memory", "64MB")
    path = generate("a cat", "--steps", "1", *words, "--dtype", "float32", "--out", tmp_path)[0]
    assert set(json.loads(Image.open(path).info["stylefast"])["load"]) == {"model", "dtype"}


def test_prompts_have_as_many_chunks_as_the_option_says(generate, stylefast, model_folder, tmp_path):
    words = ("a cat, " * 700, "--steps", "1", "--guidance", "1", "--out", tmp_path / "x.png")
    code, _, err = stylefast("generate", *words, "--model", model_folder, "--quiet")
    assert_one_line(code, err, 2, "at most 16 chunks")
    (path,) = generate(*words, "--max-text-chunks", "200")
    words = (*words[:-1], tmp_path / "y.png")
    code, _, err = stylefast("generate", "--from", path, "--load-recorded", "--max-text-chunks", "200", *words[-2:])
    assert code == 0 and "same pixels" in err, err
    code, _, err = stylefast("generate", *words, "--overwrite", "--max-text-chunks", "257", "--quiet")
    assert_one_line(code, err, 2, "max_text_chunks is 257")
