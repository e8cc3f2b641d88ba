"""Long and weighted prompts against the package compel, whose syntax and arithmetic `prompt_syntax="compel"` takes."""

import pytest

from stylefast.models.text import Prompt, TextEncoder
from tests.support.compel_states import states_of
from tests.support.fp64 import close, measured
from tests.support.small_text import small_text_parts

LONG = "a red cat on the house, a dog in the style of an house. " * 8


@pytest.fixture(scope="module")
def parts():
    return small_text_parts()


@pytest.mark.parametrize(
    "text",
    [
        "a cat on the house",
        "a cat++ on- the house",
        "a (red cat)1.4 on the (house)0.6",
        '"red cat"++ (in the (style)1.2 of)0.9 dog--',
        "a (red cat)0.0 on the house",
        "a red cat \\(on\\) the house+",
        LONG,
        LONG + "(a red dog)1.3",
        "(a cat)0.7, " + LONG + "(painting)0.8",
    ],
)
def test_states_are_those_of_compel(parts, text):
    tokenizers, encoders = parts
    (found,) = TextEncoder(tokenizers, encoders, force_zeros=True).encode([Prompt(text, syntax="compel")])
    halves = found.hidden.split([32, 48], dim=-1)
    for half, tokenizer, encoder in zip(halves, tokenizers, encoders, strict=True):
        close(half, measured(states_of, encoder, tokenizer, text))
