"""Prompts as runs of one weight: A1111's and compel's syntax, what is refused, and hostile text."""

import contextlib
import random
import time

import pytest

from stylefast.errors import PromptError
from stylefast.models.prompt_syntax import MAX_DEPTH, check, parse

UP, DOWN = 1.1, 1 / 1.1

# what A1111's parser returns for them
A1111 = {
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", UP), (" word", 1)],
    "(unbalanced": [("unbalanced", UP)],
    r"\(literal\]": [("(literal]", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", UP)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky)))": [
        ("a ", 1),
        ("house", 1.3 * UP * UP),
        (" ", UP),
        ("on", DOWN * UP),
        (" a ", UP),
        ("hill", 0.5 * UP),
        (", sun, ", UP),
        ("sky", UP**4),
    ],
    "a [[dull]] day)": [("a ", 1), ("dull", DOWN**2), (" day)", 1)],
    "stray ] and ) stay": [("stray ] and ) stay", 1)],
    "(a [b)c]": [("a ", UP), ("b", DOWN * UP), ("c", DOWN)],
    "(x: +.5 )": [("x", 0.5)],
    "(x:-1)": [("x", -1)],
    "a:1.3) b": [("a:1.3) b", 1)],
    r"back\slash \\ \( \| ratio\: 1": [(r"backslash \ ( | ratio: 1", 1)],
    "": [],
    "a | b": [("a | b", 1)],
    "at 12:30, ratio 16:9": [("at 12:30, ratio 16:9", 1)],
}
# what compel's parser returns for them
COMPEL = {
    "a cat": [("a cat", 1)],
    "a red++ cat": [("a", 1), ("red", 1.1**2), ("cat", 1)],
    "a red-- cat": [("a", 1), ("red", 0.9**2), ("cat", 1)],
    "a (red cat)1.3": [("a", 1), ("red cat", 1.3)],
    "(a (big)++ cat)0.5": [("a", 0.5), ("big", 0.5 * 1.1**2), ("cat", 0.5)],
    '"a cat"+, on a "hill"-': [("a cat", UP), (", on a", 1), ("hill", 0.9)],
    "a well-known (cat)": [("a well-known cat", 1)],
    "a (cat": [("a (cat", 1)],
    r"a \(cat\)++": [("a", 1), ("(cat)", 1.1**2)],
    "a cat, (red)1.5, big": [("a cat,", 1), ("red", 1.5), (", big", 1)],
    "(a) 1.3": [("a 1.3", 1)],
    r"C\+\+ code": [("C++ code", 1)],
    "C++ code": [("C", 1.1**2), ("code", 1)],
}


def same(found, expected):
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12)


@pytest.mark.parametrize("text", A1111)
def test_a1111(text):
    (found,) = parse(text, "a1111")
    same(found, A1111[text])


@pytest.mark.parametrize("text", COMPEL)
def test_compel(text):
    (found,) = parse(text, "compel")
    same(found, COMPEL[text])


@pytest.mark.parametrize("text", ["a (red:1.3) cat BREAK [x|y] AND <lora:x:1>", "", "("])
def test_plain_text_is_itself(text):
    assert parse(text) == [[(text, 1.0)]]


def test_break_begins_a_section_also_inside_brackets():
    assert parse("a BREAK b\n\nBREAK\nc", "a1111") == [[("a", 1)], [("b", 1)], [("c", 1)]]
    first, second = parse("(a BREAK b:1.3)", "a1111")
    same(first + second, [("a", 1.3), ("b", 1.3)])
    assert parse("BREAK a BREAK", "a1111") == [[], [("a", 1)]]
    assert parse("BREAKFAST, a break", "a1111") == [[("BREAKFAST, a break", 1)]]
    assert parse("a BREAK b", "compel") == [[("a BREAK b", 1)]]


@pytest.mark.parametrize("syntax", ["a1111", "compel"])
@pytest.mark.parametrize("name", ["<x>", "<x-y>", "<a(b>", "<lora:z>", "<a+>"])
def test_placeholders_are_never_syntax(syntax, name):
    weighted = f"a ({name} b:1.3)" if syntax == "a1111" else f"a ({name} b)1.3"
    (found,) = parse(weighted, syntax, [name])
    assert [(text.strip(), weight) for text, weight in found] == [("a", 1), (f"{name} b", 1.3)]


@pytest.mark.parametrize(
    ("syntax", "text", "message"),
    [
        ("a1111", "a (red:1e9) cat", "weight '1e9' at position 7 .* not a finite decimal number"),
        ("a1111", "a (red:nan) cat", "'nan' at position 7"),
        ("a1111", "a (red:-inf)", "'-inf' at position 7"),
        ("a1111", "a (red:1,3)", "'1,3' at position 7"),
        ("a1111", "a (red:1000000000)", "weight of 'red' at position 3 .*comes to 1e.09; .* from -10 to 10"),
        ("a1111", "a (red:" + "9" * 400 + ")", "comes to inf"),
        ("a1111", "((((red:5)))", None),
        ("a1111", "((red:5):5)", "comes to 25"),
        ("a1111", "a [fish:cat:0.5]", r"'\[fish:cat:0.5\]' at position 2 .* change or choice between steps"),
        ("a1111", "a [fish:0.8]", r"weaken words as \(fish:0.8\)"),
        ("a1111", "a [fish|cat]", "change or choice"),
        ("a1111", "a [(x)|cat]", "change or choice"),
        ("a1111", "a [(x|y)]", None),
        ("a1111", r"a \[fish\|cat\] \[x:5\] [ratio\:5]", None),
        ("a1111", "a fish AND a cat", "'AND' at position 7 .* composition of prompts"),
        ("a1111", "a fish <lora:water color:0.8>", "'<lora:water color:0.8>' at position 7 .* extra network"),
        ("a1111", "[" * MAX_DEPTH + "a", None),
        ("a1111", "(" * (MAX_DEPTH + 1), f"position {MAX_DEPTH} .* deeper than {MAX_DEPTH}"),
        ("compel", "(red)1e9", "weight at position 5 .* not a finite decimal"),
        ("compel", "(red)nan", "not a finite decimal"),
        ("compel", "(red)-1", "without sign"),
        ("compel", "(red)1000", "comes to 1000"),
        ("compel", "red" + "+" * 100, "comes to 13780"),
        ("compel", '("a cat", "a dog").and()', r"'.and\(' .* operator of compel"),
        ("compel", '("a cat", "a dog").blend(1, 1)', "operator of compel"),
        ("compel", "a (cat).swap(dog)", "operator of compel"),
        ("compel", "cat withLora(x, 0.5)", "operator of compel"),
        ("compel", "(" * 40 + "a" + ")" * 40, "deeper"),
        ("compel", "a- b " * 65, "more than 64 parts"),
        ("midjourney", "a", "choose one of plain, a1111, compel"),
    ],
)
def test_what_is_refused(syntax, text, message):
    if message is None:
        parse(text, syntax)
        return
    with pytest.raises(PromptError, match=message):
        parse(text, syntax)


def test_a_text_without_words_is_refused():
    for syntax, text in (("a1111", "(([]))"), ("a1111", " BREAK "), ("a1111", "(:1.3)"), ("compel", "()")):
        with pytest.raises(PromptError, match="the prompt .* has no words"):
            check("the prompt", text, syntax)
    check("the prompt", "()", "plain")
    check("the negative prompt", "  ", "a1111")


@pytest.mark.parametrize("syntax", ["a1111", "compel"])
def test_hostile_text_takes_linear_time(syntax):
    n = 100_000
    texts = ["(" * n, ")" * n, "()" * (n // 2), "[" * n, "[a|" * (n // 3), ":" * n, " " * n, "\\" * n, '"' * n]
    texts += [" " * (n // 2) + "BREAK" + " " * (n // 2), "<lora" * (n // 5), "<" + " " * n, "+" * n, "a" + "-" * n]
    texts += ["(a" * 30 + "(b)" * (n // 3), "(" * 30 + "[a]:1" * (n // 5), "(a:" + "1" * n + "x)", "(a:" + " " * n]
    texts += ["(a" + "1" * n, "(a)" + "1" * n + "x", '"a ' * (n // 3), "(a (b, c) x-" * (n // 12), "a, " * (n // 3)]
    start = time.process_time()
    for text in texts:
        with contextlib.suppress(PromptError):
            parse(text, syntax, ["<x>"])
    # what backtracks takes minutes
    assert time.process_time() - start < 20


@pytest.mark.parametrize("syntax", ["a1111", "compel"])
def test_any_text_is_parsed_or_refused_and_loses_no_letters(syntax):
    generator = random.Random(5)
    for _ in range(2000):
        text = "".join(generator.choices('ab  ()[]:\\|+-.,"13', k=generator.randint(0, 14)))
        try:
            sections = parse(text, syntax)
        except PromptError:
            continue
        letters = "".join(run.text for section in sections for run in section)
        assert [c for c in letters if c in "ab"] == [c for c in text if c in "ab"]
