"""A fourth method in one file outside the package: it is composed, recorded, replayed, and needs no other file.

`FadingStyle` gives the prompt further words in the first steps, and lets the reference fade in the last ones: it writes
prompts for each step and columns of the row table. docs/styles.md explains how to write such a style.
"""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch

import stylefast as sf
from stylefast import values
from stylefast.errors import StyleError
from stylefast.sampling.guidance import NULL
from stylefast.styles.style import Style
from tests.cli.conftest import pixels
from tests.support.fp64 import Twins, close

FEW = {"steps": 4, "guidance": 3.0, "seed": 5}


@dataclass(frozen=True, eq=False)
class FadingStyle(Style):
    """Words for the share `until` of the steps, and a reference whose tokens count `fade` times within `window`."""

    words: str
    until: float = 0.5
    fade: float = 1.0
    window: tuple[float, float] = (0.5, 1.0)

    def __post_init__(self):
        values.prompt("words", self.words, error=StyleError)
        values.real_number("until", self.until, 0, 1, error=StyleError)
        values.real_number("fade", self.fade, 0, 1, error=StyleError)
        object.__setattr__(self, "window", values.fractions("window", self.window, error=StyleError))

    @property
    def texts(self):
        return [("the style's words", self.words)]

    @classmethod
    def write_prompts(cls, styles, texts):
        for branch, prompts in texts.per_step.items():
            if branch != NULL:
                texts.per_step[branch] = [cls._with_words(p, styles, i / len(prompts)) for i, p in enumerate(prompts)]

    @staticmethod
    def _with_words(prompt, styles, place):
        words = [style.words for style in styles if place < style.until]
        return replace(prompt, text=", ".join([prompt.text, *words]))

    def write_rows(self, rows, row, layout, leads):
        rows.self_shift[row] += math.log(self.fade) if self.fade else -math.inf


def styles_of(engine, *own):
    pictures, learned = engine.references(), engine.styles()
    return [
        sf.StyleAligned(pictures["blot"]),
        sf.InstantStyle(pictures["splash"], blocks="all", scale=0.7),
        sf.DreamStyler(learned["chalk"]),
        *own,
    ]


@pytest.fixture(scope="module")
def engine(model_folder):
    return sf.Engine.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def in_fp64(engine):
    return Twins(engine).drawn


def drawn(engine, prompts, style, **options):
    return engine.generate(prompts, style, **FEW | options, output="latents").latents


def test_it_is_composed_with_the_three_in_one_call_per_step(engine, in_fp64):
    fading = FadingStyle("in neon", fade=0.3)
    requests = [
        sf.Request("a cat", style=styles_of(engine, fading), **FEW),
        sf.Request("a dog", **FEW),
        sf.Request("a cat", style=styles_of(engine), **FEW),
        sf.Request("a cat", style=fading, **FEW),
    ]
    calls = engine.runner.calls
    found = engine.generate(requests, output="latents").latents
    assert engine.runner.calls - calls == FEW["steps"]
    for latents, request in zip(found, requests):
        close([latents], in_fp64([request]))
    assert len({latents.sum().item() for latents in found}) == len(found), "a style changed nothing"


def test_its_prompts_are_those_of_requests_that_say_the_same(engine):
    neon = FadingStyle("in neon", until=1.0)
    assert torch.equal(drawn(engine, "a cat", neon)[0], drawn(engine, "a cat, in neon", None)[0])
    assert torch.equal(drawn(engine, "a cat", FadingStyle("in neon", until=0.0))[0], drawn(engine, "a cat", None)[0])
    more = {"prompt_syntax": "a1111", "prompt_2": "a dog"}
    assert torch.equal(drawn(engine, "(cat:2)", neon, **more)[0], drawn(engine, "(cat:2), in neon", None, **more)[0])


def test_its_words_keep_the_place_and_the_vectors_of_a_learned_style(engine):
    learned = sf.DreamStyler(engine.styles()["chalk"])
    before = drawn(engine, "a cat", [FadingStyle("in neon", until=1.0), learned])
    assert torch.equal(before[0], drawn(engine, "a cat, in neon", learned)[0])
    after = drawn(engine, "a cat", [learned, FadingStyle("in neon", until=1.0)])
    named = drawn(engine, "a cat, in the style of <chalk>, in neon", learned)
    assert torch.equal(after[0], named[0]) and not torch.equal(after[0], before[0])


def test_its_columns_are_those_that_the_reference_would_have_itself(engine):
    aligned = sf.StyleAligned(engine.references()["blot"], shift=0.5)
    whole = FadingStyle("x", until=0.0, fade=0.25, window=(0.0, 1.0))
    faded = drawn(engine, "a cat", [aligned, whole])
    assert torch.equal(faded[0], drawn(engine, "a cat", replace(aligned, shift=0.5 + math.log(0.25)))[0])
    late = drawn(engine, "a cat", [aligned, replace(whole, window=(0.5, 1.0))])
    assert not torch.equal(late[0], faded[0]) and not torch.equal(late[0], drawn(engine, "a cat", aligned)[0])


def test_it_is_baked_with_the_reference_that_shares_it(engine, in_fp64):
    style = [sf.StyleAligned(engine.references()["blot"], prompt="a fish"), FadingStyle("in neon")]
    bank = engine.bake(style, steps=4, guidance=3.0)
    read = drawn(engine, "a cat", [sf.StyleAligned(bank), style[1]])
    close(read, in_fp64([sf.Request("a cat", style=style, **FEW)]))


def test_it_is_replayed_from_a_request_file_and_from_its_picture(stylefast, model_folder, tmp_path):
    first = {"kind": "fading_style", "words": "in neon", "until": 0.6, "fade": 0.5}
    second = [{"kind": "StyleAligned", "reference": "blot"}, {"kind": "FadingStyle", "words": "x"}]
    call = [{"prompt": "a cat", "steps": 2, "style": style} for style in (first, second)]
    (tmp_path / "call.json").write_text(json.dumps(call))
    words = ("--requests", tmp_path / "call.json", "--model", model_folder, "--no-grid", "--out", tmp_path / "made")
    code, out, err = stylefast("generate", *words)
    assert code == 0, err
    for made in out.split():
        words = ("--from", made, "--out", tmp_path / "again.png", "--load-recorded", "--overwrite")
        code, again, err = stylefast("generate", *words)
        assert code == 0 and "same pixels" in err and pixels(again.strip()) == pixels(made), err


def test_what_is_wrong_with_it_is_said_as_of_any_style(stylefast, model_folder, tmp_path):
    call = [{"prompt": "a cat", "style": {"kind": "FadingStyle", "word": "x"}}]
    (tmp_path / "call.json").write_text(json.dumps(call))
    code, _, err = stylefast("generate", "--requests", tmp_path / "call.json", "--model", model_folder)
    assert code == 2 and "FadingStyle has the unknown field 'word'" in err and "did you mean 'words'" in err
