"""Every kind of value is checked in one place: plain Python comes out, or one of our errors with a short message."""

import ast
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stylefast import values
from stylefast.errors import InvalidRequest, StyleError, StyleFastError
from tests.support.strange_values import Unprintable, deep, python_values

CHECKS = {
    "a whole number": lambda v: values.whole_number("x", v, 0, 100),
    "a number": lambda v: values.real_number("x", v, -5.0, 5.0, also=(-math.inf,)),
    "a number above": lambda v: values.real_number("x", v, above=0),
    "a flag": lambda v: values.flag("x", v),
    "a text": lambda v: values.text("x", v, longest=100, empty=False),
    "a name": lambda v: values.one_of("x", v, ("euler", "ddim")),
    "a list": lambda v: values.several("x", v, least=1, most=2),
    "a mapping": lambda v: values.mapping("x", v),
    "fractions": lambda v: values.fractions("x", v),
    "a seed": lambda v: values.seed("x", v),
    "a path": lambda v: values.path("x", v),
    "a function": lambda v: values.function("x", v, "(step)"),
    "a file of JSON": lambda v: values.read_json(v, "x"),
}


@pytest.mark.parametrize("kind", CHECKS)
@given(value=python_values)
def test_a_check_returns_or_raises_one_of_our_errors_in_few_words(kind, value):
    try:
        CHECKS[kind](value)
    except StyleFastError as error:
        assert len(str(error)) < 600 and "\n" not in str(error)
        str(error).encode()


@given(value=python_values)
def test_a_value_is_quoted_in_one_line_of_at_most_200_characters(value):
    shown = values.quoted(value)
    assert 0 < len(shown) <= 200 and "\n" not in shown
    shown.encode()


@given(names=st.lists(st.one_of(st.text(), st.sampled_from(["x" * 5000, "\ud83d", "a\nb"]), python_values), max_size=9))
def test_names_are_listed_in_few_words(names):
    shown = values.listed(names)
    assert 0 < len(shown) <= 450 and "\n" not in shown
    shown.encode()


def test_a_list_of_names_is_whole_where_it_is_short_and_says_how_long_it_is_otherwise():
    assert values.listed([]) == "none" and values.listed([], "no files") == "no files"
    assert values.listed(["ink", "pixel"]) == "ink, pixel"
    long = values.listed(f"name {i}" for i in range(1000))
    assert long.startswith("name 0, name 1, ") and long.endswith(", ... (1000 in all)") and len(long) < 250
    assert values.listed(["x" * 500]).endswith("... (1 in all)")


def test_a_name_is_shown_as_it_is_unless_it_is_long_or_unprintable():
    assert (
        values.shown("up_blocks.0") == "up_blocks.0" and values.shown("a\nb") == r"'a\nb'" and values.shown("") == "''"
    )
    assert len(values.shown("x" * 5000)) == 200 and values.shown(5) == "5"


def test_messages_quote_by_the_one_function_that_bounds_what_it_quotes(checkout):
    """No f-string of the package has `!r`, which shows a value of any length."""
    found = []
    for folder in ("stylefast", "export", "kernels"):
        for path in (checkout / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FormattedValue) and node.conversion != -1:
                    found.append(f"{path.relative_to(checkout)}:{node.lineno}")
    assert not found, "use stylefast.values.quoted"


def test_values_that_python_itself_can_not_print_are_quoted():
    for value in (
        10**5000,
        [10**5000],
        {"a": 10**5000},
        Unprintable(),
        [Unprintable()],
        deep(50_000),
        ["x" * 9999] * 99,
    ):
        assert 0 < len(values.quoted(value)) <= 200


@pytest.mark.parametrize(
    "value", [np.int64(5), np.uint8(5), np.array(5), torch.tensor(5), torch.tensor(5, dtype=torch.uint8), 5]
)
def test_whole_numbers_of_numpy_and_torch_become_pythons(value):
    assert values.whole_number("steps", value, 1, 10) == 5 and type(values.whole_number("steps", value)) is int


@pytest.mark.parametrize(
    "value",
    [True, np.bool_(True), torch.tensor(True), 5.0, "5", np.array([5]), torch.tensor([5]), None, 0, 11, np.int64(11)],
)
def test_what_is_no_whole_number_in_range_is_refused(value):
    with pytest.raises(StyleError, match="steps is .*; it must be a whole number from 1 to 10"):
        values.whole_number("steps", value, 1, 10, error=StyleError)


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), np.float16(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5).bfloat16()]
)
def test_numbers_of_numpy_and_torch_become_floats(value):
    assert values.real_number("scale", value, 0, 1) == 0.5 and type(values.real_number("scale", value)) is float


@pytest.mark.parametrize(
    "value", [True, "0.5", math.nan, math.inf, 10**400, 1e308, None, np.array("0.5"), np.array([0.5]), 1j]
)
def test_what_is_no_finite_number_in_range_is_refused(value):
    with pytest.raises(InvalidRequest, match=r"scale is .*; it must be a number from -2\.5 to 1000"):
        values.real_number("scale", value, -2.5, 1000)


def test_only_true_and_false_are_flags():
    assert values.flag("x", True) is True and values.flag("x", np.bool_(False)) is False
    for value in (1, 0, "false", None, [], np.int64(1), np.array([True])):
        with pytest.raises(InvalidRequest, match="x is .*; it must be true or false"):
            values.flag("x", value)


def test_half_an_emoji_is_refused_with_its_place_and_whole_ones_are_taken():
    assert values.text("prompt", "a 🐟") == "a 🐟"
    with pytest.raises(InvalidRequest, match=r"half of a character \(U\+D83D, a lone surrogate\) at position 7"):
        values.text("prompt", json.loads('"a fish \\ud83d"'))


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(InvalidRequest, match="scheduler is 'eulr'; choose one of euler, ddim; did you mean 'euler'?"):
        values.one_of("scheduler", "eulr", ("euler", "ddim"))
    with pytest.raises(InvalidRequest, match="choose one of euler, ddim$"):
        values.one_of("scheduler", ["euler"], ("euler", "ddim"))


def test_a_seed_takes_64_bits_and_none_draws_another_one_each_time():
    assert values.seed("seed", 2**64 - 1) == 2**64 - 1 and values.seed("seed", np.uint64(2**64 - 1)) == 2**64 - 1
    assert len({values.seed("seed", wanted) for wanted in (None, -1) * 8}) > 8
    for value in (-2, 2**64, "7", 7.0, True, [1]):
        with pytest.raises(InvalidRequest, match="from 0 to 2\\^64 - 1, or None .or -1. for a random one"):
            values.seed("seed", value)


def test_seeds_count_up_within_64_bits_or_are_given_one_by_one():
    assert values.seeds("seed", 2**64 - 1, 3) == [2**64 - 1, 0, 1]
    assert values.seeds("seed", [3, np.int64(9)], 2) == values.seeds("seed", np.array([3, 9]), 2) == [3, 9]
    first, second = values.seeds("seed", None, 2)
    assert second == first + 1
    with pytest.raises(InvalidRequest, match="seed has 3 entries for 2 prompts"):
        values.seeds("seed", [1, 2, 3], 2)
    with pytest.raises(InvalidRequest, match="seed 1 is '7'"):
        values.seeds("seed", [1, "7"], 2)


@pytest.mark.parametrize("value", ["", "a\0b", b"a", 5, "\ud83d", None, "é" * 128, "a/" * 2049, "~no-such-user/a"])
def test_what_can_be_no_path_is_refused(value):
    with pytest.raises(InvalidRequest, match="the file"):
        values.path("the file", value)


# JSON


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf[1]", "\ufeff[1]", "\ufeff[1]".encode("utf-16"), b"[1]", "[1]", bytearray(b" [1] ")]
)
def test_json_is_read_with_and_without_a_byte_order_mark(content):
    assert values.load_json(content, "the file", kind=list) == [1]


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"steps": 1, "steps": 2}', "'steps' occurs twice in one object"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "Infinity is not a JSON number"),
        ("[1e999]", "1e999 is too large"),
        ("[-1e999]", "too large"),
        (f"[{'9' * 400}]", "a whole number has 400 digits"),
        (f"[{'9' * 9000}]", "9000 digits"),
        ("[" * 200_000, "nested too deep"),
        ('{"a":' * 200_000, "nested too deep"),
        ("[" * 65 + "]" * 65, "nested too deeply; at most 64"),
        ("{", "not valid JSON .*line 1 column 2"),
        ("", "not valid"),
        (b"\xff\xfe\xfd", "not UTF-8 text"),
        (b"\xe9a", "not UTF-8 text"),
        ("7", "contains 7, but must be a list"),
        ('{"a": 1}', "but must be a list"),
        (" " * 1001, "has 1001 bytes; at most 1000"),
    ],
    ids=range(17),
)
def test_json_that_is_broken_or_ambiguous_is_refused(content, said):
    largest = 1000 if len(content) == 1001 else values.JSON_BYTES
    with pytest.raises(StyleError, match=f"^the request file .*{said}"):
        values.load_json(content, "the request file", kind=list, error=StyleError, largest=largest)


@given(content=st.one_of(st.text(), st.binary()))
def test_no_content_gets_out_of_the_tree_of_errors(content):
    try:
        values.load_json(content, "the file")
    except StyleFastError as error:
        str(error).encode()


def test_64_levels_are_read():
    found, levels = values.load_json("[" * 64 + "]" * 64, "the file"), 1
    while found:
        found, levels = found[0], levels + 1
    assert levels == 64


def test_a_file_is_read_up_to_its_limit_and_no_further(tmp_path):
    file = tmp_path / "calls.json"
    file.write_bytes(b"\xef\xbb\xbf[1, 2]")
    assert values.read_json(file, "the request file") == [1, 2]
    with pytest.raises(InvalidRequest, match="longer than the allowed 4 bytes"):
        values.read_json(file, "the request file", largest=4)
    for missing in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(InvalidRequest, match="the request file: no file found at"):
            values.read_json(missing, "the request file")
