"""What goes wrong is told in one line, with an exit code, before a model is loaded where that is possible."""

import json

import pytest

from stylefast.cli import build_parser
from stylefast.commands import generate as generate_command
from stylefast.errors import NumericsError

# without a model: these must be found before one is loaded
BAD_WORDS = {
    "no prompt": ((), "no prompt was given"),
    "an empty prompt": ((" ",), "the prompt is empty"),
    "a size not divisible by 8": (("a cat", "--size", "60x64"), "width is 60; it must be divisible by 8"),
    "a size that is none": (("a cat", "--size", "large"), "WIDTHxHEIGHT"),
    "steps out of range": (("a cat", "--steps", "0"), "steps is 0"),
    "steps that are no number": (("a cat", "--steps", "many"), "invalid int value: 'many'"),
    "an unknown scheduler": (("a cat", "--scheduler", "magic"), "scheduler is 'magic'; choose one of ddim"),
    "an unknown option": (("a cat", "--stile", "x"), "unrecognized arguments: --stile"),
    "an unknown method": (("a cat", "--method", "magic"), "invalid choice: 'magic'"),
    "an interval that is none": (("a cat", "--guidance-interval", "most"), "--guidance-interval is 'most'"),
    "an interval of one number": (("a cat", "--guidance-interval", "0.8"), "such as 0-0.8"),
    "an interval that ends before it starts": (("a cat", "--guidance-interval", "0.8-0.2"), "0 <= start < end <= 1"),
    "an interval beyond the steps": (("a cat", "--guidance-interval", "0-8"), "0 <= start < end <= 1"),
    "an interval between two steps": (
        ("x", "--steps", "2", "--guidance-interval", "0.1-0.2"),
        "contains none of the 2 steps",
    ),
    "an unknown spacing": (("a cat", "--spacing", "magic"), "invalid choice: 'magic'"),
    "a spacing that the sampler does not have": (
        ("a cat", "--scheduler", "lcm", "--spacing", "leading"),
        "lcm chooses its own timesteps",
    ),
    "a spacing with a preset": (("x", "--scheduler", "sdxl_turbo", "--spacing", "leading"), "its own spacing"),
    "a preset's steps": (("a cat", "--scheduler", "sdxl_lightning"), "need 2, 4, 8 steps, not 30"),
    "a memory limit that is no size": (("a cat", "--memory-limit", "much"), "--memory-limit is 'much'"),
    "no memory for banks": (("a cat", "--bank-memory", "0"), "--bank-memory is '0'"),
    "an unknown backend": (("a cat", "--backend", "magic"), "invalid choice: 'magic'"),
    "a negative seed": (("a cat", "--seed=-2"), "seed is -2"),
    "a missing picture": (("a cat", "--style-image", "gone.png"), "no picture found at gone.png"),
    "a missing learned style": (("a cat", "--learned", "gone"), "no learned style found at gone"),
    "an unknown preset": (
        ("a cat", "--style-image", "{photo}", "--method", "instant", "--blocks", "x"),
        "not a preset",
    ),
    "a strength without style": (("a cat", "--scale", "0.5"), "--scale has no effect here"),
    "an option of another method": (("a cat", "--style-image", "{photo}", "--content", "a dog"), "--method instant"),
    "instant without a picture": (("a cat", "--method", "instant"), "needs a picture"),
    "adain that is no number": (("a cat", "--style-image", "{photo}", "--adain", "q=x"), "--adain is 'q=x'"),
    "context without learned": (("a cat", "--context", "x"), "give --learned as well"),
    "a webp to write": (("a cat", "--out", "x.webp"), "written as PNG or JPEG"),
    "two sources": (("--from", "x.png", "--requests", "y.json"), "can't be combined"),
    "prompts with requests": (("a cat", "--requests", "x.json"), "drop prompts"),
    "settings with requests": (("--requests", "x.json", "--steps", "3"), "drop --steps"),
    "a bank with requests": (("--requests", "x.json", "--style", "x.bank"), "drop --style"),
    "an interval with requests": (("--requests", "x.json", "--guidance-interval", "0-0.5"), "drop --guidance-interval"),
    "a missing bank": (("a cat", "--style", "gone.bank"), "no style bank found at gone.bank"),
    "two banks": (("a cat", "--style", "x.bank", "--style", "y.bank"), "--style was given 2 times"),
    "a picture as bank": (("a cat", "--style", "{photo}"), "use --style-image"),
    "a bank as picture": (("a cat", "--style-image", "x.bank"), "use --style x.bank"),
    "a prompt for a bank": (("a cat", "--style", "x.bank", "--style-prompt", "a fox"), "--style-prompt generates"),
    "a bank and both": (("a cat", "--style", "x.bank", "--method", "both"), "give --method instant"),
    "a picture beside a bank": (("a cat", "--style", "x.bank", "--style-image", "{photo}"), "needs --method instant"),
    "a bank and instant without picture": (("a cat", "--style", "x.bank", "--method", "instant"), "needs a picture"),
    "a missing request file": (("--requests", "gone.json"), "the request file gone.json: no file found"),
    "from a missing picture": (("--from", "gone.png"), "no picture found at gone.png"),
    "from a device": (("--from", "/dev/zero"), "/dev/zero is a pipe or a device, not a file"),
    "from a folder": (("--from", "/dev"), "/dev is a folder; pass the path of one picture"),
    "requests from a device": (("--requests", "/dev/zero"), "no file found at /dev/zero"),
    "a device as bank": (("a cat", "--style", "/dev/zero"), "/dev/zero"),
    "a device as learned style": (("a cat", "--learned", "/dev/zero"), "/dev/zero"),
    "a device as picture": (("a cat", "--style-image", "/dev/zero"), "/dev/zero is a pipe or a device"),
    "from a photo": (("--from", "{photo}"), "has no settings"),
    "force without from": (("--force", "a cat"), "--force needs --from"),
}


def assert_one_line(code, err, expected_code, message):
    assert code == expected_code, err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize("words, message", BAD_WORDS.values(), ids=BAD_WORDS.keys())
def test_bad_words_are_one_line_and_exit_code_2(stylefast, photo, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = stylefast("generate", *(word.format(photo=photo) for word in words), "--model", tmp_path / "gone")
    assert_one_line(code, err, 2, message)
    assert out == "" and sorted(tmp_path.iterdir()) == [photo]


LONG = ("x" * 5000, "9" * 3000, "x/" * 1500, "x=" + "y" * 5000, ",".join(["down_block"] * 999))


def options_of(*command):
    """The options of a command that take a value."""
    parser = build_parser()
    for name in command:
        parser = parser._subparsers_by_name()[name]
    actions = [action for action in parser._actions if action.option_strings and action.nargs != 0]
    return [(command, action.option_strings[-1]) for action in actions]


@pytest.mark.parametrize(
    "command, option", [*options_of("generate"), *options_of("bake"), *options_of("export", "onnx")], ids=str
)
def test_a_long_value_is_quoted_in_few_words(stylefast, tmp_path, monkeypatch, command, option):
    monkeypatch.chdir(tmp_path)
    for value in LONG:
        words = ("a cat",) if command == ("generate",) and option not in ("--from", "--requests") else ()
        model = () if option == "--model" else ("--model", tmp_path / "gone")
        code, _, err = stylefast(*command, *words, *model, f"{option}={value}")
        assert code in (1, 2) and len(err) < 2000, err
        assert err.splitlines()[-1].startswith("error: ") and "unexpected" not in err, err


def test_an_unknown_command_is_one_line(stylefast):
    code, _, err = stylefast("paint")
    assert_one_line(code, err, 2, "invalid choice: 'paint'")


def test_a_picture_that_is_none_is_refused(stylefast, tmp_path):
    (tmp_path / "x.png").write_bytes(b"this is no picture")
    code, _, err = stylefast("generate", "a cat", "--style-image", tmp_path / "x.png")
    assert_one_line(code, err, 2, "is no PNG, JPEG, WEBP")


def test_a_model_that_is_not_there_is_exit_code_1(stylefast, tmp_path):
    code, _, err = stylefast("generate", "a cat", "--model", tmp_path / "gone", "--quiet")
    assert_one_line(code, err, 1, "gone")


def test_a_file_that_exists_is_kept(stylefast, model_folder, tmp_path):
    target = tmp_path / "a.png"
    target.write_bytes(b"precious")
    code, _, err = stylefast("generate", "a cat", "--model", model_folder, "--out", target)
    assert_one_line(code, err, 2, "--overwrite")
    assert target.read_bytes() == b"precious"


def test_a_folder_below_a_file_is_refused(stylefast, model_folder, photo):
    code, _, err = stylefast("generate", "a cat", "--model", model_folder, "--out", photo / "deeper")
    assert_one_line(code, err, 2, "is a file")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not valid JSON"),
        ('[{"prompt": "a cat", "prompt": "a dog"}]', "'prompt'"),
        ('[{"prompt": "a cat", "guidance": NaN}]', "NaN"),
        ('[{"prompt": "a cat", "guidance": 1e999}]', "1e999"),
        ("[" * 100_000, "nested too deep"),
        (json.dumps(["a cat"] * 1001), "has 1001 requests; at most 1000"),
        (" " * 2**24 + " []", "16777216 bytes"),
        ("[]", "a list of at least one request"),
        ('[{"promt": "a cat"}]', "unknown field 'promt'; the known ones are prompt, negative_prompt, style"),
        ('[{"prompt": "a cat"}, {"prompt": ""}]', "request 1: the prompt is empty"),
        ('[{"prompt": "a cat", "style": "brand"}]', "request 0: style is 'brand'"),
        ('[{"prompt": "a cat", "style": {"kind": "Cubism"}}]', "style kind 'Cubism' is unknown"),
        ('[{"prompt": "a cat", "style": {"kind": "InstantStyle", "image": "gone.png"}}]', "no picture found at"),
    ],
    ids=lambda value: value[:40],
)
def test_a_bad_request_file_is_one_line(stylefast, tmp_path, content, message):
    (tmp_path / "calls.json").write_text(content)
    code, _, err = stylefast("generate", "--requests", tmp_path / "calls.json", "--out", tmp_path / "out")
    assert_one_line(code, err, 2, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_request_file_may_begin_with_a_byte_order_mark(generate, tmp_path, encoding):
    (tmp_path / "calls.json").write_text('[{"prompt": "a café", "steps": 1, "guidance": 1}]', encoding=encoding)
    assert len(generate("--requests", tmp_path / "calls.json", "--out", tmp_path / "out")) == 1


def test_a_picture_without_settings_is_named(stylefast, model_folder):
    code, _, err = stylefast("generate", "--from", model_folder / "references" / "blot.png")
    assert_one_line(code, err, 2, "has no settings")


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_picture_that_unpacks_to_gigabytes_is_refused_unread(stylefast, tmp_path, side):
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(content)
    code, _, err = stylefast("generate", "--from", tmp_path / "x.png")
    assert_one_line(code, err, 2, "can't be read as PNG")


@pytest.mark.parametrize("change", [{"index": 7}, {"call": 3}, {"index": None}], ids=str)
def test_damaged_settings_are_named(stylefast, tmp_path, change):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    metadata = {"index": 0, "fingerprint": "ab", "call": {"requests": [{"prompt": "a cat"}]}} | change
    info = PngInfo()
    info.add_text("stylefast", json.dumps(metadata))
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png", pnginfo=info)
    code, _, err = stylefast("generate", "--from", tmp_path / "x.png")
    assert_one_line(code, err, 2, "damaged")


def test_a_failure_while_generating_leaves_nothing_behind(stylefast, model_folder, tmp_path, monkeypatch):
    from stylefast.engine import Engine

    def fail(*arguments, **options):
        raise NumericsError("the latents of picture(s) 0 contain NaN")

    monkeypatch.setattr(Engine, "generate", fail)
    words = ("generate", "a cat", "--model", model_folder, "--quiet", "--out", tmp_path / "out")
    code, _, err = stylefast(*words)
    assert_one_line(code, err, 1, "NaN")
    assert not (tmp_path / "out").exists()


def test_a_mistake_of_ours_is_one_line_and_shows_its_traceback_on_request(stylefast, monkeypatch):
    def fail(arguments):
        raise KeyError("surprise")

    monkeypatch.setattr(generate_command, "run", fail)
    code, _, err = stylefast("generate", "a cat")
    assert_one_line(code, err, 1, "unexpected KeyError: 'surprise'; STYLEFAST_DEBUG=1")
    monkeypatch.setenv("STYLEFAST_DEBUG", "1")
    code, _, err = stylefast("generate", "a cat")
    assert code == 1 and "Traceback" in err
