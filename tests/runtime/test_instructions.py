"""What other programs read as instructions in a prompt is told of, once a request; ordinary prose is not."""

import time

import pytest

from stylefast.runtime.plan import instructions as told
from stylefast.runtime.plan.instructions import instructions, warn_of_instructions
from stylefast.runtime.plan.request import Request
from stylefast.styles.style_aligned import StyleAligned

INSTRUCTIONS = {
    "a (fish:1.2)": "(fish:1.2)",
    "a (fish:1.0), ((red:.5))": "(fish:1.0)",
    "a [fish:0.8]": "[fish:0.8]",
    "a (fish:NaN)": "(fish:NaN)",
    "a (fish: -inf), red": "(fish: -inf)",
    "a (fish:1e999)": "(fish:1e999)",
    "(a fish, in a bowl: 1.3 )": "(a fish, in a bowl: 1.3 )",
    "fish <lora:water color:0.8>": "<lora:water color:0.8>",
    "<LyCO:x:1:lbw=ALL> fish": "<LyCO:x:1:lbw=ALL>",
    "a fish BREAK a cat": "BREAK",
    "a fish AND a cat :1.2": "AND",
    "a fish++": "fish++",
    "a fish--, red": "fish--",
    "(a fish)++": ")++",
    "(a fish)1.3": ")1.3",
    "(a fish)-": ")-",
    "a {red|blue} fish": "{red|blue}",
    "a __color__ fish": "__color__",
    "[fish:cat:0.5]": "[fish:cat:0.5]",
    "[fish|cat] in a bowl": "[fish|cat]",
    "embedding:negativeXL, ugly": "embedding:negativeXL,",
    "a fish --ar 16:9": "--ar 16:9",
    "fish::2 cat::1": "h::2",
}
PROSE = [
    "a fish",
    "a fish (red)",
    "a portrait (1890) by nobody",
    r"a \(fish:1.2\)",
    r"a fish \[red:0.5\]",
    "at 12:30, noon",
    "A CAT AND A DOG",
    "a break in the clouds",
    "C++ code on a screen",
    "18+ years, size 2+1",
    "a fish :-) (:",
    "ratio 16:9",
    "a {style} fish, {prompt}",
    "a <chalk> fish",
    "snake_case__name",
    "well-known -- or not -- fish",
    "the year 19--",
    "a fish, in the style of {style}, {context}",
    "a_fish__",
    "rock'n'roll & jazz | blues",
    "time: 5",
    "(note: red)",
    "(bread: naan)",
    "(notes: info)",
    "(one) 2 cats",
]


@pytest.fixture
def said(caplog):
    """Messages of a call with these requests."""

    def said(*requests):
        caplog.clear()
        warn_of_instructions(requests)
        return [record.getMessage() for record in caplog.records]

    return said


@pytest.mark.parametrize("text", INSTRUCTIONS)
def test_an_instruction_is_found_as_it_is_written(text):
    assert INSTRUCTIONS[text] in instructions(text)


@pytest.mark.parametrize("text", PROSE)
def test_prose_holds_no_instruction(text):
    assert instructions(text) == {}


def test_a_request_gets_one_warning_that_quotes_what_it_holds(said):
    style = StyleAligned(prompt="a (fox:1.5)")
    first, second = said(Request("a (fish:1.2) BREAK a <lora:x:0.8>", "(ugly:1.4)", style), Request("b (cat:0.5)"))
    for part in (
        "'(fish:1.2)' (a weight)",
        "'BREAK' (a keyword)",
        "<lora:x:0.8>",
        "or with --lora",
        "encoded as plain words",
        "and 1 more",
    ):
        assert part in first
    assert "'(cat:0.5)'" in second
    assert len(said(*(Request("a (fish:1.2)", seed=seed) for seed in range(4)))) == 1


@pytest.mark.parametrize(
    ("syntax", "text", "parts"),
    [
        ("compel", "a (fish:nan)", ("'(fish:nan)' (a weight)", "(x)1.3")),
        ("compel", "a (fish:1.3)", ("'(fish:1.3)' (a weight)", "with prompt_syntax='compel' it", "(x)1.3", "a1111")),
        ("compel", "a fish BREAK a __color__ cat", ("'BREAK' (a keyword)", "'__color__' (a wildcard)")),
        ("a1111", "a (fish)1.3, cat++", ("')1.3' (a weight)", "'cat++' (a weight)", "with prompt_syntax='a1111' it")),
        ("a1111", "a {red|blue} fish, embedding:bad", ("'{red|blue}' (a choice)", "give its file as a learned style")),
    ],
)
def test_what_is_words_in_a_requests_own_syntax_is_told_too(said, syntax, text, parts):
    (message,) = said(*(Request(text, prompt_syntax=syntax, seed=seed) for seed in range(2)))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        ("a1111", "a (fish:1.3) BREAK ((red)) [blue], (1girl) 2 cats"),
        ("compel", "a (fish)1.3, red++ cat--, (a star)-, (one) 2"),
    ],
)
def test_what_the_syntax_of_a_request_reads_is_no_reason_to_warn(said, syntax, text):
    told._say_of_brackets.cache_clear()
    assert said(Request(text, prompt_syntax=syntax)) == []


def test_the_text_that_holds_the_instruction_is_the_one_that_is_quoted(said):
    (message,) = said(Request("a plain fish", "(ugly:1.4)"))
    assert message.startswith("the negative prompt '(ugly:1.4)' contains ") and "plain fish" not in message
    (message,) = said(Request("a fish", style=StyleAligned(prompt="a (fox:1.5)")))
    assert message.startswith("the style's prompt 'a (fox:1.5)' contains ")
    (message,) = said(Request("a (cat:2)", "(ugly:1.4)"))
    assert message.startswith("the prompt 'a (cat:2)' and the negative prompt '(ugly:1.4)' contain ")


def test_plain_brackets_are_told_of_once_and_never_beside_a_weight(said):
    told._say_of_brackets.cache_clear()
    assert said(Request("a fish")) == []
    (message,) = said(Request("a ((red)) fish"), Request("a [blue] fish"))
    assert "here they change no weights" in message
    assert said(Request("a (green) fish")) == []
    assert said(Request(r"a \(green\) fish")) == []


def test_a_long_prompt_of_brackets_is_read_in_linear_time():
    # a pattern that backtracks would take minutes
    for text in ("(" * 30_000, "[a|" * 10_000, "<lora:" * 5_000, "{a|" * 9_000, "a:1" * 9_000, "__a" * 9_000):
        instructions(text)


@pytest.mark.parametrize("text", ["x" * 32_000, "(" + "a" * 31_000, "[" + ":" * 31_000, "{" + "|" * 31_000])
def test_looking_for_them_takes_no_longer_than_reading(text):
    began = time.process_time()
    instructions(text)
    told._BRACKETS.search(text)
    assert time.process_time() - began < 0.2
