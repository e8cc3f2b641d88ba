"""LoRAs of requests on the command line: for prompts, in request files, from pictures; nothing is merged."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import stylefast as sf
from stylefast.commands.files import png_info, read_metadata
from stylefast.commands.model_options import Lora
from tests.cli.conftest import pixels
from tests.cli.test_errors import assert_one_line
from tests.support.small_checkpoints import random_lora, write_peft_lora
from tests.support.small_sdxl import small_pipeline

FEW = ("--steps", "1", "--guidance", "1")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, pipe = tmp_path_factory.mktemp("loras"), small_pipeline()
    return {
        name: write_peft_lora(random_lora(pipe, seed), folder / f"{name}.safetensors")
        for seed, name in enumerate(("ink", "pixel"))
    }


def record_of(path):
    return json.loads(Image.open(path).info["stylefast"])


def test_prompts_use_the_loras_given_and_from_repeats_the_picture(generate, stylefast, files, model_folder, tmp_path):
    plain = generate("a cat", *FEW, "--out", tmp_path / "plain.png")[0]
    words = ("--lora", files["ink"], "--lora", f"{files['pixel']}:0.5")
    path = generate("a cat", *FEW, *words, "--out", tmp_path / "styled.png")[0]
    assert pixels(path) != pixels(plain)
    record = record_of(path)
    assert record["loras"] == {} and record["call"]["requests"][0]["loras"] == {"ink": [1.0, 1.0], "pixel": [0.5, 0.5]}
    assert record["lora_files"]["ink"]["path"] == str(files["ink"])
    again = ("generate", "--from", path, "--model", model_folder, "--out")
    code, _, err = stylefast(*again, tmp_path / "a.png", "--load-recorded")
    assert code == 0 and "same pixels" in err, err
    code, _, err = stylefast(*again, tmp_path / "b.png", "--lora", files["ink"], "--lora", files["pixel"])
    assert code == 0 and "same pixels" in err, err
    merged = generate("a cat", *FEW, "--merge-lora", files["ink"], "--out", tmp_path / "m.png")[0]
    assert record_of(merged)["loras"] == {"ink": 1.0}


def test_a_picture_has_its_loras_named_or_trusted_and_compared(generate, stylefast, files, model_folder, tmp_path):
    path = generate("a cat", *FEW, "--lora", files["ink"], "--out", tmp_path / "x.png")[0]
    again = ("generate", "--from", path, "--model", model_folder, "--quiet", "--out", tmp_path / "y.png")
    assert_one_line(*stylefast(*again)[::2], 2, f"asks to load the LoRA {files['ink']}")
    assert_one_line(*stylefast(*again, "--lora", f"{files['ink']}:0.5")[::2], 2, "the picture records its own")
    other = tmp_path / "ink.safetensors"
    other.write_bytes(files["pixel"].read_bytes())
    assert_one_line(*stylefast(*again, "--lora", other)[::2], 1, "the LoRA 'ink' has other content")
    code, _, err = stylefast(*again, "--lora", other, "--force")
    assert code == 0 and err.startswith("warning: the LoRA 'ink'")


def test_requests_in_a_file_name_their_loras(generate, stylefast, files, model_folder, tmp_path):
    calls = tmp_path / "calls.json"
    settings = {"steps": 1, "guidance": 1}
    requests = [
        {"prompt": "a cat", **settings},
        {"prompt": "a cat", "loras": {"ink": 0.8}, **settings},
        {"prompt": "a cat", "loras": {"ink": [0.8, 0.0], "pixel": 1}, **settings},
    ]
    calls.write_text(json.dumps(requests))
    words = ("--lora", files["ink"], "--lora", files["pixel"])
    paths = generate("--requests", calls, *words, "--out", tmp_path / "out")
    assert len({pixels(path) for path in paths[:3]}) == 3  # the sheet is the fourth
    failing = ("generate", "--requests", calls, "--model", tmp_path / "gone", "--out", tmp_path / "z")
    assert_one_line(*stylefast(*failing, "--lora", files["ink"])[::2], 2, "uses the LoRA 'pixel'; give its file")
    words = ("--lora", f"{files['ink']}:0.5", "--lora", files["pixel"])
    assert_one_line(*stylefast(*failing, *words)[::2], 2, "has a strength, but the requests")


def test_a_request_file_brings_its_loras_and_options_name_others(generate, stylefast, files, model_folder, tmp_path):
    settings = {"prompt": "a cat", "steps": 1, "guidance": 1}
    (tmp_path / "pen.safetensors").write_bytes(files["ink"].read_bytes())
    calls = {"loras": {"mine": "pen.safetensors"}, "requests": [settings | {"loras": {"mine": [0.5, 0.25]}}]}
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    inside = generate("--requests", tmp_path / "calls.json", "--out", tmp_path / "a.png")[0]
    given = generate("a cat", *FEW, "--lora", f"pen={files['ink']}:0.5:0.25", "--out", tmp_path / "b.png")[0]
    assert pixels(inside) == pixels(given)
    assert record_of(given)["call"]["requests"][0]["loras"] == {"pen": [0.5, 0.25]}
    again = ("generate", "--from", given, "--model", model_folder, "--out", tmp_path / "c.png")
    code, _, err = stylefast(*again, "--lora", f"pen={files['ink']}")
    assert code == 0 and "same pixels" in err, err
    for bad, message in ({"loras": ["x"]}, "names with files"), ({"loras": {"mine": "gone"}}, "no file found"):
        (tmp_path / "calls.json").write_text(json.dumps(calls | bad))
        failed = stylefast("generate", "--requests", tmp_path / "calls.json", "--model", model_folder)
        assert_one_line(*failed[::2], 2, message)


def test_a_record_of_any_length_is_read_back(files, tmp_path, capsys):
    picture = Image.new("RGB", (8, 8))
    request = {"negative_prompt": "", "steps": 1, "guidance": 1.0, "seed": 1, "scheduler": "euler"}
    facts = {"fingerprint": "0" * 64, "model": "m", "stylefast": "1", "size": [8, 8], "index": 0}
    for length in (100, 70_000, 3_000_000):  # plain, compressed, and too long for a compressed chunk
        metadata = {"call": {"requests": [request | {"prompt": "a" * 100}], "more": "b" * length}, **facts}
        picture.save(tmp_path / "x.png", pnginfo=png_info(metadata))
        assert read_metadata(tmp_path / "x.png")[0] == metadata
    assert not capsys.readouterr().err


def test_a_folder_of_a_lora_keeps_its_dots_and_a_strength_of_1_is_one(files, tmp_path):
    folder = tmp_path / "v1.5"
    folder.mkdir()
    assert Lora.of_rows(str(folder), {}).name == "v1.5" and Lora.of_rows(str(files["ink"]), {}).name == "ink"
    assert Lora.of_rows(f"{folder}", {}).plain and not Lora.of_rows(f"{folder}:1", {}).plain


def test_loras_that_come_with_the_model_go_by_name(generate, stylefast, tmp_path):
    tiny = ("--model", "tiny", "--quiet", "--out")
    code, out, err = stylefast("generate", "a cat", *FEW, "--lora", "gold:0.5", *tiny, tmp_path / "a.png")
    assert code == 0, err
    # of the picture's word alone, wherever they lay when it was made
    code, _, err = stylefast("generate", "--from", out.strip(), "--out", tmp_path / "b.png")
    assert code == 0 and "same pixels" in err, err


def test_what_can_not_be_told_apart_or_would_be_left_out_is_refused(stylefast, files, tmp_path):
    same = tmp_path / "ink.safetensors"
    same.write_bytes(files["ink"].read_bytes())
    words = ("generate", "a cat", "--lora", files["ink"], "--lora", same, "--model", tmp_path / "gone")
    assert_one_line(*stylefast(*words)[::2], 2, "--lora names two files called 'ink'")
    words = ("demo", "--lora", files["ink"], "--out", tmp_path / "demo")
    assert_one_line(*stylefast(*words)[::2], 2, "merge one into the model: --merge-lora")


def test_a_bank_is_baked_under_the_loras_given(generate, stylefast, files, model_folder, tmp_path):
    bank, words = tmp_path / "b.bank", ("--steps", "1", "--guidance", "1", "--model", model_folder, "--quiet")
    code, _, err = stylefast("bake", "--style-prompt", "oil", "--lora", files["ink"], "--out", bank, *words)
    assert code == 0, err
    assert generate("a cat", "--style", bank, "--lora", files["ink"], "--out", tmp_path / "x.png")
    code, _, err = stylefast("generate", "a cat", "--style", bank, "--out", tmp_path / "y.png", *words[-3:])
    assert_one_line(code, err, 2, "was baked under the LoRAs")


def test_every_picture_of_a_mixed_call_is_repeated(generate, stylefast, files, model_folder, tmp_path):
    calls, settings = tmp_path / "calls.json", {"prompt": "a cat", "steps": 1, "guidance": 1}
    calls.write_text(json.dumps([settings, settings | {"loras": {"ink": 0.8}}, settings | {"loras": {"pixel": 1}}]))
    words = ("--lora", files["ink"], "--lora", files["pixel"])
    paths = generate("--requests", calls, *words, "--out", tmp_path / "out")
    for place, path in enumerate(paths[:2]):
        out = ("--load-recorded", "--model", model_folder, "--out", tmp_path / f"{place}.png")
        code, _, err = stylefast("generate", "--from", path, *out)
        assert code == 0 and "same pixels" in err, err


def test_a_lora_that_nothing_uses_is_refused(generate, stylefast, files, tmp_path):
    calls = tmp_path / "calls.json"
    calls.write_text(json.dumps([{"prompt": "a cat", "steps": 1}]))
    path = generate("a cat", *FEW, "--out", tmp_path / "x.png")[0]
    for source in (("--requests", calls), ("--from", path)):
        words = ("generate", *source, "--lora", files["ink"], "--model", tmp_path / "gone", "--out", tmp_path / "y")
        assert_one_line(*stylefast(*words)[::2], 2, "no request uses the LoRA 'ink'")


def test_the_parameters_text_has_both_strengths_and_what_is_merged(generate, files, tmp_path):
    calls = tmp_path / "calls.json"
    calls.write_text(json.dumps([{"prompt": "a cat", "steps": 1, "guidance": 1, "loras": {"ink": [0.8, 0.25]}}]))
    words = ("--lora", files["ink"], "--merge-lora", f"{files['ink']}:0.5")
    text = Image.open(generate("--requests", calls, *words, "--out", tmp_path / "o")[0]).info["parameters"]
    assert text.startswith("a cat <lora:ink:0.25:0.8>\n") and 'Loras: "ink: 0.5"' in text


def test_what_can_not_be_per_picture_names_the_option_that_merges(stylefast, files, model_folder, tmp_path):
    words = ("generate", "a cat", "--backend", "onnxruntime", "--model", tmp_path / "gone")
    assert_one_line(*stylefast(*words, "--lora", files["ink"])[::2], 2, "export the model with --lora-rank")
    name, full = "down_blocks.1.attentions.0.proj_in", tmp_path / "full.safetensors"
    weight = small_pipeline().unet.get_submodule(name).weight
    save_file({f"lora_unet_{name.replace('.', '_')}.diff": torch.ones(weight.shape)}, full)
    words = ("generate", "a cat", "--lora", full, "--model", model_folder, "--quiet", "--out", tmp_path / "o")
    assert_one_line(*stylefast(*words)[::2], 1, "On the command line that is --merge-lora")


def test_the_part_of_a_b_lora_is_recorded_and_repeated(stylefast, model_folder, tmp_path):
    blocks = ("up_blocks.0.attentions.0.", "up_blocks.0.attentions.1.")
    lora = {
        place: v for place, v in random_lora(small_pipeline(), 6, text=False).items() if place[1].startswith(blocks)
    }
    engine = sf.Engine.from_pretrained(model_folder)
    engine.loras.add(write_peft_lora(lora, tmp_path / "both.safetensors"), "own style", part="style")
    result = engine.generate(sf.Request("a cat", loras={"own style": 1.0}, steps=1, guidance=1.0))
    (entry,) = result.metadata
    assert entry["lora_files"]["own style"]["part"] == "style"
    result.images[0].save(tmp_path / "x.png", pnginfo=png_info(entry | {"size": list(result.images[0].size)}))
    words = ("--from", tmp_path / "x.png", "--model", model_folder, "--load-recorded", "--out", tmp_path / "y.png")
    code, _, err = stylefast("generate", *words)
    assert code == 0 and "same pixels" in err, err
