"""Long and weighted prompts through the engine: batches of several lengths, styles, records and backends."""

import json
from dataclasses import replace

import pytest
import torch

import stylefast as sf
from stylefast import naive
from stylefast.errors import ExportError, PromptError, StyleError
from stylefast.models.text import Prompt
from stylefast.record import from_record, to_record
from tests.support.fp64 import Twins, close
from tests.support.scene import apart

LONG = "a fish, a star, a house, " * 15
SETTINGS = {"steps": 2, "size": (64, 64)}


@pytest.fixture(scope="module")
def engine():
    with sf.Engine.from_pretrained("tiny") as engine:
        yield engine


@pytest.fixture(scope="module")
def drawn(engine):
    return Twins(engine).drawn


def latents(engine, *requests):
    return engine.generate(list(requests), output="latents").latents


def request(prompt, **options):
    return sf.Request(prompt, **{**SETTINGS, **options})


def requests(engine):
    learned = sf.DreamStyler(next(iter(engine.styles().values())))
    return [
        request("a fish"),
        request(LONG),
        request("a (fish:1.4) BREAK [a star]", negative_prompt="(blue:1.2), " + LONG, prompt_syntax="a1111"),
        request("a fish++ (and a star)0.5", prompt_syntax="compel", clip_skip=0),
        request("a fish", prompt_2="a star", negative_prompt_2="a house"),
        request(LONG + f"(a fish in the style of <{learned.name}>:1.3)", style=learned, prompt_syntax="a1111"),
        request("a fish++", style=learned, prompt_2="a star", prompt_syntax="compel"),
        request("a (cat:1.2)", style=sf.StyleAligned(prompt="a (star:1.4)"), prompt_2=LONG, prompt_syntax="a1111"),
    ]


def test_a_batch_of_all_lengths_and_syntaxes_equals_the_short_form_and_each_alone(engine, drawn):
    wanted = requests(engine)
    together = latents(engine, *wanted)
    # each by itself, so that its texts are padded to nobody's length
    short = [naive.generate(engine, [one])[0] for one in wanted]
    for one, found, other in zip(wanted, together, short, strict=True):
        alone = drawn([one])
        close([found], alone)
        close([other], alone)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_2": "a star"},
        {"negative_prompt_2": "a star"},
        {"prompt": "a (fish:1.5)", "prompt_syntax": "a1111"},
        {"prompt": "a fish--", "prompt_syntax": "compel"},
        {"prompt": LONG + "a fish"},
        {"negative_prompt": "(a star:1.5)", "prompt_syntax": "a1111"},
    ],
)
def test_each_setting_changes_the_picture(engine, change):
    plain, other = latents(engine, request("a fish"), request(**{"prompt": "a fish", **change}))
    assert (plain - other).abs().max() > 1e-3


def test_all_that_readme_promises_shares_one_call_a_step_and_equals_each_alone(engine, drawn):
    for name, file in engine.lora_files().items():
        engine.loras.add(file, name)
    neon = sf.StyleAligned(prompt="a star in neon style")
    bank = engine.bake(neon, loras={"gold": 0.8}, steps=2)
    learned = sf.DreamStyler(engine.styles()["chalk"])
    instant = sf.InstantStyle(engine.references()["neon"])
    long = "a (house:1.3), a [boat], a tree, a star, " * 17
    wanted = [
        request("a fish"),
        sf.Request("a cat", style=sf.StyleAligned(bank), loras={"gold": 0.8}, **bank.settings),
        request(long, style=instant, loras={"pixel": 0.6, "sunset": 0.4}, prompt_syntax="a1111"),
        request("a mushroom in the style of {style}", style=learned),
    ]
    assert engine.text_encoder.check([Prompt(long, syntax="a1111")]) > 200
    before = engine.runner.calls
    together = latents(engine, *wanted)
    assert engine.runner.calls == before + 2
    live = [*wanted]
    live[1] = replace(wanted[1], style=neon)
    for one, other, found in zip(wanted, live, together, strict=True):
        close([found], drawn([one], in_fp64=[other]))
    for name in engine.lora_files():
        engine.loras.remove(name)


def test_a_record_replays_syntax_and_both_prompts(engine):
    wanted = requests(engine)[:5]
    again = from_record(json.loads(json.dumps(to_record(wanted))))
    assert all(torch.equal(a, b) for a, b in zip(latents(engine, *wanted), latents(engine, *again), strict=True))


def test_a_bank_keeps_the_syntax_of_its_negative_prompt(engine, drawn, tmp_path):
    style, options = sf.StyleAligned(prompt="a (star:1.4)"), {"negative_prompt": "(blue:1.3)", "prompt_syntax": "a1111"}
    bank = engine.bake(style, steps=2, negative_prompt_2="a house", **options)
    bank = sf.StyleBank.load(bank.save(tmp_path / "star.bank"))
    assert {name: bank.settings[name] for name in options} == options
    assert bank.settings["negative_prompt_2"] == "a house"
    live = drawn([request("a fish", style=style, negative_prompt_2="a house", **options)])
    close(engine.generate("a fish", sf.StyleAligned(bank), **bank.settings, output="latents").latents, live)


def test_a_bank_keeps_its_clip_skip_and_fits_no_other(engine, drawn):
    style = sf.StyleAligned(prompt="a star")
    bank = engine.bake(style, steps=2, clip_skip=1)
    assert bank.settings["clip_skip"] == 1
    live = drawn([request("a fish", style=style, clip_skip=1)])
    close(engine.generate("a fish", sf.StyleAligned(bank), **bank.settings, output="latents").latents, live)
    with pytest.raises(StyleError, match="baked with clip_skip=1, but clip_skip=0"):
        engine.submit(request("a fish", style=sf.StyleAligned(bank)))


def test_the_content_of_a_picture_is_read_in_the_requests_syntax(engine, drawn):
    def wanted(content, syntax):
        style = sf.InstantStyle(engine.references()["neon"], blocks="all", content=content)
        return request("a fish", style=style, prompt_syntax=syntax)

    plain, weighted = wanted("star", "plain"), wanted("(star)", "a1111")
    expected = drawn([plain])
    for found in (naive.generate(engine, [plain]), latents(engine, weighted), naive.generate(engine, [weighted])):
        close(found, expected)
    shared = sf.InstantStyle(engine.references()["neon"], blocks="all", content="(star)")
    both = [request("a fish", style=shared, prompt_syntax=syntax) for syntax in ("plain", "a1111")]
    literal, read = latents(engine, *both)
    close([read], expected)
    assert (literal - read).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a (fish:nan)", "prompt_syntax": "a1111"}, "'nan' at position 8"),
        ({"prompt": "a", "negative_prompt": "[a|b]", "prompt_syntax": "a1111"}, "change or choice"),
        ({"prompt": "()", "prompt_syntax": "a1111"}, "prompt '()' has no words"),
        ({"prompt": "a", "prompt_2": "(x)1e9", "prompt_syntax": "compel"}, "not a finite decimal"),
        ({"prompt": "a" * 100_000}, "100000 characters; at most 32000 are allowed, so shorten it"),
        ({"prompt": "a", "prompt_2": 3}, "prompt_2 is 3"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(options, message):
    with pytest.raises(PromptError, match=message.replace("(", r"\(").replace(")", r"\)")):
        request(**options)


def test_a_prompt_of_too_many_chunks_is_refused_before_anything_runs(engine):
    with pytest.raises(PromptError, match="at most 16 chunks"):
        engine.submit(request("a " * 2000))


def test_a_prompt_may_be_as_long_as_the_engine_was_told():  # in chunks of 22 tokens here
    prompt = "a fish, a star, a house, " * 350
    with sf.Engine.from_pretrained("tiny", max_text_chunks=150) as engine:
        assert engine.text_encoder.check([Prompt(prompt)]) > 3000
        (found,) = latents(engine, request(prompt))
        (short,) = latents(engine, request(prompt[: len(prompt) // 2]))
        apart([found], [short])
        alone = Twins(engine).drawn([request(prompt)])
        close([found], alone)
        close(naive.generate(engine, [request(prompt)]), alone)
        with pytest.raises(
            PromptError, match="4500 tokens in 2.. chunks; at most 150 chunks .* a larger max_text_chunks"
        ):
            engine.submit(request("a star " * 2250))


def test_pages_of_long_texts_that_were_given_back_do_not_disturb_later_ones(engine, drawn):
    given = [request("a fish, " * count, steps=1, seed=count) for count in (1, 10, 30)]
    for wanted in (given, given[:2], given):
        for one, latent in zip(wanted, latents(engine, *wanted), strict=True):
            close([latent], drawn([one]))
        engine.generate(given[1], callback=lambda *_: engine.runner.make_room(), output="latents")


def test_exported_graphs_refuse_long_texts(engine, monkeypatch):
    monkeypatch.setattr(type(engine.runner.backend), "takes_long_texts", False)
    with pytest.raises(ExportError, match="48 tokens in 2 chunks.*take only 24.*shorten it to 22 "):
        engine.submit(request("a " * 23))
    assert len(latents(engine, request("a " * 22))) == 1


def test_a_style_that_drops_the_second_text_is_told(engine, monkeypatch):
    def write(cls, styles, texts):
        for branch, prompts in texts.per_step.items():
            texts.per_step[branch] = [Prompt(prompt.text, prompt.vectors) for prompt in prompts]

    monkeypatch.setattr(sf.StyleAligned, "write_prompts", classmethod(write))
    for options in ({"prompt_2": "a star"}, {"prompt_syntax": "compel"}):
        with pytest.raises(StyleError, match="dataclasses.replace"):
            engine.submit(request("a fish", style=sf.StyleAligned(prompt="a star"), **options))
