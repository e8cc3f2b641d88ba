"""What is taken and will disappoint gets one warning: unknown words, and styles with nothing to align with."""

import json
import logging

import pytest

import stylefast as sf
from benchmarks.tiny_model.captions import WORDS
from stylefast.errors import ModelFormatError
from stylefast.models.checkpoint import TINY
from stylefast.models.known_words import known_words
from stylefast.runtime.plan.notices import Notices
from stylefast.styles.dream_styler import DreamStyler
from tests.support.watch import WAIT

CHALK = TINY / "styles" / "chalk.safetensors"


@pytest.fixture
def said(caplog):
    """Has a model with tiny's vocabulary look at requests; the warnings."""
    notices = Notices("tiny", known_words(TINY))

    def look(*requests, **options):
        caplog.clear()
        notices(requests, **options)
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    return look


def test_the_vocabulary_in_the_models_folder_is_the_one_that_it_was_trained_on():
    assert sorted(known_words(TINY)) == sorted(word for word in WORDS if word.isalpha())


def test_an_unknown_word_is_named_with_what_the_model_knows(said):
    (warning,) = said(sf.Request("a dragon"))
    assert "model tiny does not know the word 'dragon'" in warning and "star, heart, moon, house" in warning


def test_unknown_words_of_a_call_are_one_warning_with_the_known_ones_nearby(said):
    requests = sf.Request("A Dragon, watercolour!"), sf.Request("fishes and a dragon", "ugly 3")
    (warning,) = said(*requests)
    assert "the words 'dragon', 'watercolour' (watercolor?), 'fishes' (fish?), 'ugly', '3', which" in warning


@pytest.mark.parametrize("text", ["a FISH in Neon style.", "a fish, cat-boat", "two cup and three moon", "."])
def test_known_words_are_no_reason_to_warn(said, text):
    assert said(sf.Request(text)) == []


@pytest.mark.parametrize("text", ["a (fish:1.2)", "a fish BREAK a cat", "a fish <lora:paint:0.8>", "a fish --ar 3:2"])
def test_what_another_program_reads_as_an_instruction_is_not_called_an_unknown_word_as_well(said, text):
    (warning,) = said(sf.Request(text))
    assert "other programs interpret this as instructions" in warning
    assert len(said(sf.Request(text.replace("fish", "dragon")))) == 2


def test_all_texts_that_are_encoded_are_read_and_learned_tokens_are_no_words(said):
    learned = DreamStyler(str(CHALK), context="a sailor")
    instant = sf.InstantStyle(str(TINY / "references" / "neon.png"), content="a bridge")
    (warning,) = said(sf.Request("a fish, <chalk>", style=[sf.StyleAligned(prompt="a knight"), instant, learned]))
    assert "the words 'knight', 'bridge', 'sailor', which" in warning
    assert said(sf.Request("a fish in {style}", style=DreamStyler(str(CHALK)))) == []
    (warning,) = said(sf.Request("a fish, <chalk>"))  # where the style is not part of the request, it is one
    assert "'chalk'" in warning


def test_many_and_long_unknown_words_are_shown_in_part(said):
    (warning,) = said(sf.Request("x" * 5000 + " " + " ".join(f"y{'z' * i}" for i in range(100))))
    assert len(warning) < 1000 and "and 89 more" in warning


def test_a_model_that_was_trained_on_any_text_knows_all_words(caplog):
    Notices("sdxl", None)([sf.Request("a dragon")])
    assert not caplog.records


def test_a_bare_style_aligned_of_one_prompt_has_nothing_to_align_with(said):
    (warning,) = said(sf.Request("a fish", style=sf.StyleAligned()))
    assert "request 0: StyleAligned() has neither reference nor prompt" in warning
    requests = [sf.Request("a fish", style=sf.StyleAligned()) for _ in range(2)]
    assert "request 0; request 1: StyleAligned()" in said(*requests)[0]


def test_a_style_with_something_to_align_with_is_no_reason_to_warn(said):
    shared = sf.StyleAligned()
    assert said(*(sf.Request("a fish", style=shared) for _ in range(2))) == []
    assert said(sf.Request("a fish", style=sf.StyleAligned(prompt="neon style"))) == []


def test_baking_looks_at_the_reference_alone(said):
    request = sf.Request("anything", style=sf.StyleAligned(prompt="a dragon in neon style"))
    assert "the word 'dragon'" in said(request, baking=True)[0]


def test_the_engine_warns_once_however_a_picture_is_asked_for(caplog):
    with sf.Engine.from_pretrained("tiny") as engine:
        style = sf.StyleAligned(prompt="a dragon")
        for ask in (
            lambda: engine.generate("a dragon", steps=1, guidance=1, output="latents"),
            lambda: engine.submit(sf.Request("a dragon", steps=1, guidance=1), output="latents").result(WAIT),
            lambda: engine.bake(style, steps=1, guidance=1, store="latents"),
        ):
            caplog.clear()
            ask()
            assert len([record for record in caplog.records if "'dragon'" in record.getMessage()]) == 1


def test_guidance_on_a_distilled_model_is_said_once_and_stays_in_every_picture(caplog):
    with sf.Engine.from_pretrained("tiny") as engine:
        for _ in range(2):
            guided = sf.Request("a fish", steps=4, scheduler="dmd2", guidance=7.0)
            fitting = sf.Request("a fish", steps=4, scheduler="dmd2", guidance=1.0)
            result = engine.generate([guided, fitting], output="latents")
            assert [len(entry["warnings"]) for entry in result.metadata] == [1, 0]
            assert "distilled to guidance 1; guidance 7 doubles" in result.metadata[0]["warnings"][0]
        assert len([one for one in caplog.records if "distilled to guidance" in one.getMessage()]) == 1


@pytest.mark.parametrize("content", [{}, [1], ["a", ""], "x"], ids=json.dumps)
def test_a_list_of_words_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "known_words.json").write_text(json.dumps(content))
    with pytest.raises(ModelFormatError, match="known_words.json"):
        known_words(tmp_path)


def test_folders_without_such_a_list_know_any_word(tmp_path):
    assert known_words(tmp_path) is None
