"""Control pictures on the command line, in request files, and in pictures that are made again."""

import json

import pytest
from PIL import Image, PngImagePlugin

import stylefast as sf
from stylefast.cli import main
from stylefast.record_values import shipped
from tests.support.small_control import edges, small_control_for, small_union_for

SIZE = (64, 64)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random ControlNet for the embedded model, and two drawings."""
    folder = tmp_path_factory.mktemp("control")
    engine = sf.Engine.from_pretrained("tiny", dtype="float32", device="cpu")
    small_control_for(engine).save_pretrained(folder / "lines")
    for i in (1, 2):
        edges(i, SIZE).save(folder / f"edges-{i}.png")
    return folder


def run(*words, expect=0, capsys=None) -> str:
    code = main(["generate", *map(str, words)])
    said = capsys.readouterr() if capsys else None
    assert code == expect, said
    return said.err if said else ""


def record_of(path) -> dict:
    with Image.open(path) as picture:
        return json.loads(picture.text["stylefast"])


def test_options_make_the_request_and_the_picture_is_made_again_from_itself(files, tmp_path, capsys):
    words = ["a cat", "--steps", 3, "--control-net", files / "lines", "--control-window", "0-0.7", "--guess-mode"]
    words += ["--control", f"{files / 'edges-1.png'}:0.8", "--out", tmp_path / "one.png", "--quiet"]
    run(*words)
    record = record_of(tmp_path / "one.png")
    (control,) = record["call"]["requests"][0]["control"]
    assert (control["weight"], control["window"], control["guess_mode"]) == (0.8, [0.0, 0.7], True)
    assert record["control_nets"]["lines"]["path"] == str((files / "lines").resolve())
    again = ["--from", tmp_path / "one.png", "--out", tmp_path / "two.png"]
    said = run(*again, expect=2, capsys=capsys)
    assert "asks to load the control network" in said and "--control-net" in said
    said = run(*again, "--control-net", files / "lines", capsys=capsys)
    assert "same pixels" in said
    run(*again, "--load-recorded", "--overwrite", capsys=capsys)
    run("a cat", "--steps", 3, "--out", tmp_path / "plain.png", "--quiet")
    assert Image.open(tmp_path / "plain.png").tobytes() != Image.open(tmp_path / "one.png").tobytes()


def test_pictures_of_a_union_have_types(files, tmp_path, capsys):
    engine = sf.Engine.from_pretrained("tiny", dtype="float32", device="cpu")
    small_union_for(engine).save_pretrained(files / "union")
    words = ["a cat", "--steps", 2, "--control-net", files / "union", "--quiet", "--out"]
    pictures = [word for i in (1, 2) for word in ("--control", files / f"edges-{i}.png")]
    run(*words, tmp_path / "one.png", *pictures, "--control-mode", "canny", "--control-mode", "1")
    modes = [control["mode"] for control in record_of(tmp_path / "one.png")["call"]["requests"][0]["control"]]
    assert modes == ["canny", 1]
    run(*words, tmp_path / "both.png", *pictures, "--control-mode", "normal")
    assert Image.open(tmp_path / "both.png").tobytes() != Image.open(tmp_path / "one.png").tobytes()
    again = ["--from", tmp_path / "one.png", "--control-net", files / "union", "--out", tmp_path / "two.png"]
    assert "same pixels" in run(*again, capsys=capsys)
    for given, message in (
        ([], "must know which of its 6 types"),
        (["canny", "depth", "depth"], "--control-mode is given 3 times for 2 control pictures"),
        (["cany"], "did you mean 'canny'"),
        (["tile"], "give its number, 0 to 5"),
    ):
        options = [word for mode in given for word in ("--control-mode", mode)]
        assert message in run(*words, tmp_path / "no.png", *pictures, *options, expect=2, capsys=capsys)
    alone = ["a cat", "--control-mode", "canny", "--out", tmp_path / "no.png"]
    assert "--control-mode says how a control picture acts" in run(*alone, expect=2, capsys=capsys)


def test_another_network_under_the_recorded_name_is_noticed(files, tmp_path, capsys):
    run(
        "a cat",
        "--steps",
        2,
        "--control-net",
        files / "lines",
        "--control",
        files / "edges-1.png",
        "--out",
        tmp_path / "a.png",
    )
    with Image.open(tmp_path / "a.png") as picture:
        text = json.loads(picture.text["stylefast"])
        text["control_nets"]["lines"]["sha256"] = "0" * 64
        info = PngImagePlugin.PngInfo()
        info.add_itxt("stylefast", json.dumps(text))
        picture.save(tmp_path / "b.png", pnginfo=info)
    words = ["--from", tmp_path / "b.png", "--control-net", files / "lines", "--out", tmp_path / "c.png"]
    capsys.readouterr()
    assert "other weights" in run(*words, expect=1, capsys=capsys)
    run(*words, "--force", capsys=capsys)


def test_several_networks_and_pictures_by_name(files, tmp_path):
    words = ["a cat", "--steps", 2, "--control-net", files / "lines", "--control-net", f"other={files / 'lines'}"]
    words += ["--control", f"lines={files / 'edges-1.png'}:0.5", "--control", f"other={files / 'edges-2.png'}"]
    run(*words, "--out", tmp_path / "one.png", "--quiet")
    controls = record_of(tmp_path / "one.png")["call"]["requests"][0]["control"]
    assert [(c["network"], c["weight"]) for c in controls] == [("lines", 0.5), ("other", 1.0)]


def test_request_files_name_networks_and_pictures(files, tmp_path):
    call = {
        "controls": {"lines": "lines", "more": "lines"},
        "requests": [
            {"prompt": "a cat", "steps": 2, "control": {"image": "edges-1.png", "network": "lines", "weight": 0.5}},
            {"prompt": "a cat", "steps": 2, "control": [{"image": "edges-2.png", "network": "more"}]},
        ],
    }
    (files / "calls.json").write_text(json.dumps(call))
    run("--requests", files / "calls.json", "--out", tmp_path / "out", "--quiet")
    assert len(list((tmp_path / "out").glob("*.png"))) >= 2


def test_a_network_that_comes_with_the_model_is_used_by_name(tmp_path, capsys):
    name = next(iter(shipped(sf.models.checkpoint.TINY, "control")))
    lines = tmp_path / "lines.png"
    edges(3, SIZE).save(lines)
    run("a cat", "--steps", 2, "--control-net", name, "--control", lines, "--out", tmp_path / "one.png", "--quiet")
    said = run("--from", tmp_path / "one.png", "--out", tmp_path / "two.png", capsys=capsys)
    assert "same pixels" in said  # nothing needs to be asked for


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--control", "{1}"], "needs the network that reads it; give it with --control-net"),
        (["--control-net", "{net}"], "no control picture is for the network 'lines'"),
        (["--control-window", "0-0.5"], "--control-window says how a control picture acts; give it as --control"),
        (["--guess-mode"], "--guess-mode says how a control picture acts"),
        (["--control-reference", "same"], "--control-reference says how a control picture acts"),
        (["--control", "line={1}", "--control-net", "{net}"], "did you mean 'lines'"),
        (["--control", "{1}", "--control-net", "{net}", "--control-net", "b={net}"], "several control networks"),
        (["--control", "{1}:11", "--control-net", "{net}"], "weight is 11"),
        (["--control", "{1}", "--control-net", "{net}", "--control-window", "0.5"], "--control-window is '0.5'"),
        (["--control", "nowhere.png", "--control-net", "{net}"], "nowhere.png"),
        (["--control", "{1}", "--control-net", "nowhere"], "--control-net: no file found at 'nowhere'"),
        (["--control", "{1}", "--control-net", "{net}", "--backend", "onnxruntime"], "does not run control networks"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_a_model_is_loaded(files, words, message, capsys, monkeypatch):
    monkeypatch.setattr("stylefast.commands.model_options.ModelChoice.load", lambda self: pytest.fail("loaded"))
    filled = [word.format("", files / "edges-1.png", net=files / "lines") for word in words]
    assert message in run("a cat", *filled, expect=2, capsys=capsys)
