"""An installed stylefast works: everything that it is made of does a small piece of its work, once."""

from importlib.metadata import entry_points
from pathlib import Path

import pytest

import stylefast as sf
from stylefast import _extension, naive
from stylefast.commands.files import read_metadata
from stylefast.record import from_record
from tests.support.fp64 import Twins, close


@pytest.fixture(scope="module")
def engine():
    return sf.Engine.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="module")
def requests(engine):
    """One request of each kind."""
    picture = engine.references()["neon"]
    styles = {
        "plain": None,
        "aligned": sf.StyleAligned(picture),
        "instant": sf.InstantStyle(picture),
        "learned": sf.DreamStyler(engine.styles()["chalk"]),
    }
    styles["all"] = [style for style in styles.values() if style is not None]
    return [sf.Request("a fish", style=style, steps=2, seed=1) for style in styles.values()]


@pytest.fixture(scope="module")
def drawn(engine, requests):
    """Their result, and how often the UNet ran."""
    calls = []
    hook = engine.unet.register_forward_hook(lambda *_: calls.append(None))
    result = engine.generate(requests)
    hook.remove()
    return result, len(calls)


@pytest.fixture
def stylefast(capsys):
    """Runs the installed command; what it prints. The call must succeed."""
    (script,) = entry_points(group="console_scripts", name="stylefast")

    def run(*words):
        code = script.load()([str(word) for word in words])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


def test_every_public_name_can_be_imported():
    assert all(getattr(sf, name).__doc__ for name in sf.__all__)


def test_the_extension_is_loaded_or_says_how_to_build_it():
    if list(Path(sf.__file__).parent.glob("_C.*")):
        assert _extension.extension() is not None, _extension.extension_error()
    else:
        assert "make extension" in _extension.extension_error()


def test_all_styles_draw_in_one_batch(drawn, requests):
    result, calls = drawn
    assert calls == 2  # one for each step
    assert [image.size for image in result.images] == [(64, 64)] * len(requests)
    assert len({image.tobytes() for image in result.images}) == len(requests)


def test_the_engine_in_short_makes_the_same_pictures(engine, requests):
    plain_and_all = [requests[0], requests[-1]]
    close(naive.generate(engine, plain_and_all), Twins(engine).drawn(plain_and_all))


def test_a_job_draws_from_a_bank_that_was_saved(engine, tmp_path):
    bank = engine.bake(sf.StyleAligned(prompt="a star in neon style"), steps=2)
    bank = sf.StyleBank.load(bank.save(tmp_path / "neon.bank"))
    job = engine.submit(sf.Request("a fish", style=sf.StyleAligned(bank), **bank.settings))
    assert job.result(timeout=600).images[0].size == (64, 64)


def test_info_says_which_kernels_run(stylefast):
    found = stylefast("info")
    assert sf.__version__ in found and "shared_attention" in found
    assert ("C++ extension found" in found) == (_extension.extension() is not None)


def test_the_command_writes_a_picture_that_says_how_to_make_it_again(engine, stylefast, tmp_path):
    (path,) = stylefast(
        "generate", "a fish", "--steps", 2, "--style-image", "neon", "--device", "cpu", "--out", tmp_path
    ).split()
    metadata, picture = read_metadata(path)
    again = engine.generate(from_record(metadata["call"]))
    assert again.images[metadata["index"]].tobytes() == picture.tobytes()
