"""What a wrong word leads to: the help that knows better, the word that was meant; and how a command is stopped."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from stylefast.cli import COMMANDS
from stylefast.commands import generate as generate_command
from stylefast.sampling.few_step import FEW_STEP_PRESETS
from stylefast.sampling.schedule import KARRAS_SCHEDULERS, SCHEDULERS
from tests.cli.test_errors import assert_one_line


def test_without_a_word_the_help_is_printed(stylefast):
    code, out, err = stylefast()
    assert code == 0 and out.startswith("usage: stylefast") and err == ""
    assert all(re.search(rf"^    {name}\s", out, re.M) for name in COMMANDS) and "exit codes: 0 done" in out


def test_a_command_that_needs_another_word_prints_its_own_help(stylefast):
    code, out, err = stylefast("export")
    assert code == 0 and out.startswith("usage: stylefast export") and err == ""


MEANT = {
    "a command": (("genrate", "x"), "did you mean 'generate'? (see `stylefast --help`)"),
    "a kind of export": (("export", "onx"), "did you mean 'onnx'? (see `stylefast export --help`)"),
    "an option": (("generate", "x", "--sede", "1"), "did you mean '--seed'? (see `stylefast generate --help`)"),
    "an option with =": (("bake", "--stpes=3"), "did you mean '--steps'? (see `stylefast bake --help`)"),
    "an option of a kind": (("export", "onnx", "--flavor", "x"), "'--flavour'? (see `stylefast export onnx --help`)"),
    "another tool's option": (("generate", "x", "--guidance-scale", "3"), "here that is --guidance (see"),
    "an option before its command": (("--model", "tiny"), "invalid choice: 'tiny'"),
    "a flag before its command": (("--quiet",), "it goes after the command: stylefast generate ... --quiet"),
    "a choice": (("generate", "x", "--method", "aligend"), "did you mean 'aligned'?"),
    "a word too many": (("info", "x"), "unrecognized arguments: x (see `stylefast info --help`)"),
    "prompts apart": (("generate", "a", "--seed", "1", "b"), "write all prompts together"),
    "a value that is missing": (("bake", "--steps"), "expected one argument (see `stylefast bake --help`)"),
    "a scheduler": (("generate", "x", "--scheduler", "dpmpp_2m_karas"), "did you mean 'dpmpp_2m_karras'?"),
    "a preset for few steps": (("generate", "x", "--scheduler", "sdxl_lightening"), "did you mean 'sdxl_lightning'?"),
    "a scheduler to bake with": (("bake", "--style-prompt", "x", "--scheduler", "Eulr"), "did you mean 'euler'?"),
    "a picture of the model": (("generate", "x", "--style-image", "watercolour"), "did you mean 'watercolor'?"),
    "a learned style": (("generate", "x", "--learned", "chlak"), "did you mean 'chalk'?"),
    "blocks": (("generate", "x", "--style-image", "neon", "--method", "instant", "--blocks", "stile"), "mean 'style'?"),
    "a model": (("generate", "x", "--model", "tinny"), "did you mean 'tiny'?"),
}


@pytest.mark.parametrize("words, message", MEANT.values(), ids=MEANT.keys())
def test_a_misspelt_word_is_answered_with_the_one_that_was_meant(stylefast, words, message):
    code, out, err = stylefast(*words)
    assert_one_line(code, err.removeprefix("loading tinny ...\n"), 1 if "tinny" in words else 2, message)
    assert out == ""


BESIDE = {
    "a model": (("--model", "my-sdlx"), 1, "did you mean 'my-sdxl'?"),
    "a bank": (("--style", "brnd.bank"), 2, "did you mean 'brand.bank'?"),
    "a LoRA": (("--lora", "brnad.safetensors:0.5"), 2, "did you mean 'brand.safetensors'?"),
    "a picture": (("--style-image", "phto.jpg"), 2, "did you mean 'photo.jpg'?"),
}


@pytest.mark.parametrize("words, code, message", BESIDE.values(), ids=BESIDE.keys())
def test_a_file_beside_the_one_that_was_named_is_offered(stylefast, tmp_path, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-sdxl").mkdir()
    for name in ("my-sdlx.txt", "brand.bank", "brnd.bnk", "brand.safetensors", "photo.jpg"):
        (tmp_path / name).touch()
    found, _, err = stylefast("generate", "x", "--quiet", *words)
    assert_one_line(found, err, code, message)


def test_a_long_word_is_quoted_in_part(stylefast):
    code, _, err = stylefast("generate", "x", "--stile", "y" * 5000)
    assert_one_line(code, err, 2, "unrecognized arguments: --stile")
    assert len(err) < 500


@pytest.mark.parametrize("command", ["generate", "bake"])
def test_the_help_names_every_scheduler_with_every_ending_and_every_preset(stylefast, command):
    words = set(stylefast(command, "--help")[1].replace(",", " ").split())
    endings = {f"{name}_{ending}" for name in KARRAS_SCHEDULERS for ending in ("karras", "exponential")}
    assert {*SCHEDULERS, *endings, *FEW_STEP_PRESETS} <= words


@pytest.fixture
def stopping(monkeypatch):
    """Has `generate` do what a function says, with the handlers of signals that a fresh process has."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield lambda function: monkeypatch.setattr(generate_command, "run", function)
    for number, handler in before.items():
        signal.signal(number, handler)


STOPS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_a_signal_cleans_up_and_leaves_a_word_and_an_exit_code(stylefast, stopping, tmp_path, number):
    def run(arguments):
        part = tmp_path / "part"
        part.touch()
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            part.unlink()

    stopping(run)
    code, _, err = stylefast("generate", "x")
    assert_one_line(code, err, STOPS[number][0], STOPS[number][1])
    assert not list(tmp_path.iterdir())


def test_a_library_that_is_interrupted_while_it_loads_is_not_called_missing(stylefast, stopping):
    def run(arguments):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            raise ImportError("numpy.core.multiarray failed to import") from None

    stopping(run)
    code, _, err = stylefast("generate", "x")
    assert_one_line(code, err, 130, "interrupted")


@pytest.mark.parametrize("words", [("--version",), ("generate", "--help")], ids=" ".join)
def test_output_that_nobody_reads_is_no_error(checkout, words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "stylefast.cli", *words], cwd=checkout, stdout=write, text=True, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_closed_streams_are_no_error_and_no_file_takes_their_place(checkout, tmp_path):
    out = tmp_path / "x.txt"
    program = "import sys; from stylefast import cli; code = cli.main(['--version']); file = open(sys.argv[1], 'w'); "
    program += "file.write(str(file.fileno())); sys.exit(code)"
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", program, out], cwd=checkout
        )
        assert done.returncode == 0 and int(out.read_text()) > 2


def test_handlers_of_signals_are_given_back(stylefast, stopping):
    before = [signal.getsignal(number) for number in STOPS]
    stopping(lambda arguments: os.kill(os.getpid(), signal.SIGTERM))
    assert stylefast("generate", "x")[0] == 143
    assert [signal.getsignal(number) for number in STOPS] == before


def test_a_signal_that_was_ignored_before_stays_ignored(stylefast, stopping):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as nohup does with SIGHUP
    stopping(lambda arguments: os.kill(os.getpid(), signal.SIGTERM) or 0)
    assert stylefast("generate", "x")[0] == 0
