"""`generate --from`: what a picture names is loaded with the user's word only; and LoRAs on the command line."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stylefast.commands import generate
from stylefast.commands.files import read_metadata
from stylefast.commands.model_options import Lora, ModelChoice
from stylefast.errors import InvalidRequest
from stylefast.models import hub
from stylefast.record import metadata
from stylefast.runtime.plan.request import Result
from tests.cli.conftest import pixels
from tests.cli.test_errors import assert_one_line
from tests.support.small_checkpoints import random_lora, write_peft_lora
from tests.support.small_sdxl import small_pipeline

FEW = ("--steps", "1", "--guidance", "1")


@pytest.fixture
def asked(stylefast, monkeypatch):
    """The ModelChoices that were asked to load; none is loaded."""
    choices = []

    def load(choice):
        choices.append(choice)
        raise InvalidRequest("loading was asked for")

    monkeypatch.setattr(ModelChoice, "load", load)
    return choices


@pytest.fixture
def picture(tmp_path):
    """Writes a picture with a record of one request; `load`: what its model was loaded from."""

    def write(load, styles=(), **metadata):
        call = {"styles": list(styles), "requests": [{"prompt": "a fish", "style": list(range(len(styles)))}]}
        record = {"index": 0, "fingerprint": "ab" * 32, "call": call, "model": "tiny", "load": load} | metadata
        info = PngInfo()
        info.add_text("stylefast", json.dumps(record))
        Image.new("RGB", (64, 64)).save(tmp_path / "x.png", pnginfo=info)
        return tmp_path / "x.png"

    return write


@pytest.fixture
def again(picture, stylefast, asked, tmp_path):
    """Runs `generate --from` of a picture that names something; (exit code, stderr)."""

    def run(load, *words, **record):
        path = picture(load, **record)
        return stylefast("generate", "--from", path, "--quiet", "--out", tmp_path / "y.png", *words)[::2]

    return run


NAMED = {
    "a model on this machine": ({"model": "/models/my sdxl"}, {}, "the model /models/my sdxl", "--model '/models/my"),
    "a model of the hub": ({"model": "someone/else"}, {}, "the model someone/else", "--model someone/else"),
    "a picture from Python": (None, {"model": "my-sdxl"}, "the model my-sdxl", "--model my-sdxl"),
    "a VAE": ({"model": "tiny", "vae": "/x.safetensors"}, {}, "the vae /x.safetensors", "--vae /x.safetensors"),
    "an adapter": ({"adapter": "/a.bin"}, {}, "the adapter /a.bin", "--adapter /a.bin"),
    "an image encoder": ({"image_encoder": "/e"}, {}, "the image encoder /e", "--image-encoder /e"),
    "a LoRA": (
        {"lora": [{"path": "/l.safetensors", "scale": 0.5, "sha256": ""}]},
        {},
        "the LoRA /l.safetensors",
        "--merge-lora /l.safetensors:0.5",
    ),
    "a bank": (
        {},
        {"styles": [{"kind": "StyleAligned", "reference": {"bank": {}, "path": "/x.bank"}}]},
        "the style file /x.bank",
        "--load-recorded",
    ),
    "a learned style": (
        {},
        {"styles": [{"kind": "DreamStyler", "embedding": {"path": "/l.bin"}}]},
        "the style file /l.bin",
        "--load-recorded",
    ),
    "a learned style of two files": (
        {},
        {"styles": [{"type": "dream_styler", "path": ["/l.pt", "/g.pt"]}]},
        "the style file /l.pt, the style file /g.pt",
        "--load-recorded",
    ),
    "image embeddings": (
        {},
        {"styles": [{"kind": "InstantStyle", "image_embeds": {"path": "/e.pt"}}]},
        "the style file /e.pt",
        "--load-recorded",
    ),
    "a stage": (
        {},
        {
            "styles": [
                {
                    "kind": "DreamStyler",
                    "embedding": {"shipped": "styles/chalk.safetensors"},
                    "stages": {"0": {"path": "/l.bin"}},
                }
            ]
        },
        "the style file /l.bin",
        "--load-recorded",
    ),
}


@pytest.mark.parametrize("load, record, named, option", NAMED.values(), ids=NAMED.keys())
def test_what_only_the_picture_names_needs_the_users_word(asked, again, load, record, named, option):
    code, err = again(load, **record)
    assert_one_line(code, err, 2, named)
    assert option in err and "--load-recorded" in err and asked == []


def test_what_comes_with_stylefast_needs_no_word(asked, again, photo):
    import hashlib

    with Image.open(photo) as opened:
        digest = hashlib.sha256(b"80x60 RGB\n" + opened.convert("RGB").tobytes()).hexdigest()
    chalk = {"kind": "DreamStyler", "embedding": {"shipped": "styles/chalk.safetensors"}}
    pinned = {"kind": "StyleAligned", "reference": {"path": str(photo), "sha256": digest}}
    again({"model": "tiny"}, styles=[chalk, pinned])
    assert [choice.model for choice in asked] == ["tiny"] and not asked[0].cached_only


def test_a_model_in_the_hubs_cache_is_loaded_and_what_it_lacks_is_not_fetched(asked, again, monkeypatch):
    monkeypatch.setattr(hub, "cached_ids", lambda: ["someone/else"])
    again({"model": "someone/else"})
    assert [(choice.model, choice.cached_only) for choice in asked] == [("someone/else", True)]


@pytest.mark.parametrize("words", [("--load-recorded",), ("--model", "someone/else")], ids=["flag", "by name"])
def test_with_the_users_word_it_is_loaded(asked, again, words):
    again({"model": "someone/else"}, *words)
    assert [(choice.model, choice.cached_only) for choice in asked] == [("someone/else", False)]


def test_a_model_on_the_command_line_does_not_speak_for_a_vae(asked, again):
    code, err = again({"model": "/m", "vae": "/v"}, "--model", "tiny")
    assert code == 2 and "the vae /v" in err and "/m" not in err and asked == []


@pytest.mark.parametrize("lora", [3, [3], [{"path": "/l"}], [{"path": "/l", "scale": "x", "sha256": ""}]], ids=str)
def test_damaged_loras_of_a_record_are_named(asked, again, lora):
    code, err = again({"lora": lora}, "--load-recorded")
    assert_one_line(code, err, 2, "the recorded LoRAs are damaged")


def test_a_picture_that_names_a_pipe_or_a_device_as_lora_holds_nothing_up(asked, again, tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    # the folder holds the pipe alone
    for place in ("/dev/zero", tmp_path / "pipe.safetensors", tmp_path):
        code, err = again({"lora": [{"path": str(place), "scale": 1, "sha256": "ab" * 32}]}, "--load-recorded")
        assert_one_line(code, err, 2, "is a pipe or a device, not a file")
    assert asked == []


def test_what_a_lora_is_read_from_is_what_its_digest_tells_apart(tmp_path):
    for name in ("adapter_model.bin", "adapter_config.json"):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "README.md").write_bytes(b"1")
    for source in (tmp_path, tmp_path / "adapter_model.bin"):
        before = Lora(str(source)).digest()
        (tmp_path / "README.md").write_bytes(b"2")
        assert Lora(str(source)).digest() == before
        for name in ("adapter_model.bin", "adapter_config.json"):
            (tmp_path / name).write_bytes(b"2")
            assert Lora(str(source)).digest() != before
            (tmp_path / name).write_bytes(b"1")
        assert Lora(str(source)).digest() == before


def test_the_digest_of_a_lora_is_that_of_its_file(tmp_path):
    (tmp_path / "l.safetensors").write_bytes(b"weights")
    assert Lora(str(tmp_path / "l.safetensors")).digest() == hashlib.sha256(b"weights").hexdigest()


@pytest.mark.parametrize(
    "content, wanted", [(b"weights", "loading was asked for"), (b"others", "differ in content or strength")]
)
def test_a_record_with_the_older_digest_of_a_lora_is_compared_with_it(again, tmp_path, content, wanted):
    lora = tmp_path / "l.safetensors"
    lora.write_bytes(content)
    older = hashlib.sha256(hashlib.sha256(b"weights").digest()).hexdigest()
    recorded = {"model": "tiny", "lora": [{"path": str(lora), "scale": 1.0, "sha256": older}]}
    _, err = again(recorded, "--load-recorded", loras={"l": 1.0})
    assert wanted in err


def test_loras_of_a_picture_from_python_are_asked_for(asked, again):
    code, err = again({"model": "tiny"}, loras={"brand": 0.8})
    assert_one_line(code, err, 2, "was made with LoRAs (brand at 0.8); name their files: --merge-lora FILE:SCALE")


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("loras") / "brand.safetensors"
    return write_peft_lora(random_lora(small_pipeline(), seed=1), path)


def test_a_lora_changes_the_picture_and_from_puts_it_on_again(generate, stylefast, lora_file, tmp_path):
    words = ("a cat", *FEW, "--out")
    plain = generate(*words, tmp_path / "plain.png")[0]
    full = generate(*words, tmp_path / "full.png", "--merge-lora", lora_file)[0]
    half = generate(*words, tmp_path / "half.png", "--merge-lora", f"{lora_file}:0.5")[0]
    assert len({pixels(path) for path in (plain, full, half)}) == 3
    record = json.loads(Image.open(half).info["stylefast"])
    assert record["loras"] == {"brand": 0.5}
    assert record["load"]["lora"][0]["path"] == str(lora_file) and record["load"]["lora"][0]["scale"] == 0.5
    code, _, err = stylefast("generate", "--from", half, "--load-recorded", "--out", tmp_path / "again.png")
    assert code == 0 and "same pixels" in err


def test_another_lora_than_the_recorded_one_is_refused_unless_forced(
    generate, stylefast, model_folder, lora_file, tmp_path
):
    path = generate("a cat", *FEW, "--merge-lora", lora_file, "--out", tmp_path / "a.png")[0]
    other = write_peft_lora(random_lora(small_pipeline(), seed=2), tmp_path / "brand.safetensors")
    words = ("generate", "--from", path, "--model", model_folder, "--quiet", "--out", tmp_path / "b.png")
    for lora in (other, f"{lora_file}:0.5"):
        assert_one_line(*stylefast(*words, "--merge-lora", lora)[::2], 1, "differ in content or strength")
    code, _, err = stylefast(*words, "--merge-lora", other, "--force")
    assert code == 0 and err.startswith("warning: the LoRAs")


def test_loras_are_read_from_words(lora_file, tmp_path):
    assert Lora.merged(f"{lora_file}:-0.5") == Lora(str(lora_file), -0.5)
    (tmp_path / "a:0.5").touch()
    assert Lora.merged(str(tmp_path / "a:0.5")) == Lora(str(tmp_path / "a:0.5"))
    assert Lora.merged(f"{tmp_path / 'a:0.5'}:2") == Lora(str(tmp_path / "a:0.5"), 2.0)
    rows, path = {"gold": Path(lora_file)}, str(lora_file)
    for text, lora in {
        f"pen={path}:0.5:-1": Lora(path, 0.5, -1.0, own_name="pen"),
        f"{path}:0.5:0": Lora(path, 0.5, 0.0),
        "gold:2": Lora(path, 2.0),
        "pen=gold": Lora(path, own_name="pen"),
    }.items():
        assert Lora.of_rows(text, rows) == lora and Lora.of_rows(lora.words(), rows) == lora
    (tmp_path / "a=b").touch()
    assert Lora.of_rows(str(tmp_path / "a=b"), {}).own_name is None
    with pytest.raises(InvalidRequest, match="no file found at 'gold:1'"):
        Lora.of_rows("gold:1:2:3", rows)


LORA_WORDS = {
    "a missing file": (("{lora}x",), "no file found at"),
    "a misspelt file": (("{folder}/brnd.safetensors:0.5",), "did you mean 'brand.safetensors'?"),
    "a strength that is none": (("{lora}:much",), "no file found at"),
    "a device": (("/dev/zero",), "--merge-lora: /dev/zero is a pipe or a device, not a file"),
    "a device at a strength": (("/dev/zero:0.5",), "--merge-lora: /dev/zero is a pipe or a device, not a file"),
    "nothing": (("",), "--merge-lora is ''; a path needs at least one character"),
    "the same twice": (("{lora}", "{lora}:0.5"), "twice; give it once"),
}


@pytest.mark.parametrize("loras, message", LORA_WORDS.values(), ids=LORA_WORDS.keys())
def test_a_lora_that_is_none_is_refused_before_a_model_is_loaded(stylefast, lora_file, tmp_path, loras, message):
    given = [lora.format(lora=lora_file, folder=lora_file.parent) for lora in loras]
    words = [word for lora in given for word in ("--merge-lora", lora)]
    code, _, err = stylefast("generate", "a cat", *words, "--model", tmp_path / "gone")
    assert_one_line(code, err, 2, message)


def test_loras_of_one_name_are_told_apart(monkeypatch):
    from stylefast.engine import Engine

    put_on = []

    class Loaded:
        def load_lora(self, path, scale, name):
            put_on.append((path, scale, name))
            return name

    monkeypatch.setattr(Engine, "from_pretrained", lambda source, **options: Loaded())
    ModelChoice(lora=(Lora("/a/x.safetensors"), Lora("/b/x.safetensors", 0.5))).load()
    assert put_on == [("/a/x.safetensors", 1.0, "x"), ("/b/x.safetensors", 0.5, "x-2")]


def test_a_lora_for_graphs_that_hold_other_weights_is_refused(lora_file):
    with pytest.raises(InvalidRequest, match="without a LoRA"):
        ModelChoice(lora=(Lora(str(lora_file)),), options={"backend": "onnxruntime"})


def test_a_count_makes_several_pictures_of_each_prompt_whose_seeds_go_on(generate, tmp_path):
    paths = generate("a cat", "a dog", "-n", "2", "--seed", "5", *FEW, "--no-grid", "--out", tmp_path)
    assert [path.rpartition("/")[2] for path in paths] == [
        "0001-a-cat.png",
        "0002-a-cat.png",
        "0003-a-dog.png",
        "0004-a-dog.png",
    ]
    assert [json.loads(Image.open(path).info["stylefast"])["seed"] for path in paths] == [5, 6, 7, 8]


@pytest.mark.parametrize("count", ["0", "-1", "501", "many"])
def test_a_count_that_is_none_is_refused(stylefast, tmp_path, count):
    code, _, err = stylefast("generate", "a cat", "a dog", f"--count={count}", "--model", tmp_path / "gone")
    assert_one_line(code, err, 2, "invalid int value" if count == "many" else f"--count is {count} for 2 prompts")


def test_a_lora_that_is_gone_when_the_pictures_are_done_costs_none(stylefast, monkeypatch, tmp_path):
    lora = tmp_path / "l.safetensors"
    lora.write_bytes(b"weights")
    digest = Lora(str(lora)).digest()

    def make(engine, requests, quiet):
        lora.unlink()
        facts = metadata(requests, "0.1.0", {"model": "tiny", "fingerprint": "ab" * 32})
        return Result([Image.new("RGB", (64, 64))], [None], facts)

    monkeypatch.setattr(ModelChoice, "load", lambda choice: None)
    monkeypatch.setattr(generate, "make", make)
    code, _, err = stylefast("generate", "a fish", "--merge-lora", lora, "--out", tmp_path / "y.png", "--quiet")
    assert code == 0, err
    found, _ = read_metadata(tmp_path / "y.png")
    assert found["load"]["lora"] == [{"path": str(lora), "scale": 1.0, "sha256": digest}]


def test_warnings_quote_a_part_of_what_a_picture_says_and_nothing_that_a_terminal_obeys(picture, stylefast, tmp_path):
    said = "\x1b[2J" + "x" * 100_000
    call = {"styles": [], "requests": [{"prompt": "a fish", "style": [], "steps": 1}]}
    path = picture({"model": "tiny"}, call=call, fingerprint=said, device=said, dtype=[said], versions={said: said})
    code, _, err = stylefast("generate", "--from", path, "--force", "--quiet", "--out", tmp_path / "again.png")
    assert code == 0 and err.count("differ: ") == 3 and "different weights" in err
    assert "\x1b" not in err and len(err) < 2500


@pytest.mark.parametrize("named", ["someone/\x1b[2Jelse", "someone/\x9b2Jelse", "someone/\u202eesle"], ids=ascii)
def test_errors_show_what_a_terminal_would_obey(again, named):
    code, err = again({"model": named})
    assert code == 2 and "someone" in err and err.rstrip("\n").isprintable() and ascii(named)[1:-1] in err
