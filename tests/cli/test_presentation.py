"""Grids, sheets and pages."""

import pytest
from PIL import Image

from stylefast.errors import InvalidRequest
from stylefast.presentation import GAP, Figure, Row, Section, html_page, labelled_sheet, picture_grid


def squares(*colours, size=(8, 8)):
    return [Image.new("RGB", size, colour) for colour in colours]


def test_a_grid_is_as_square_as_possible_and_reads_left_to_right():
    grid = picture_grid(squares("red", "lime", "blue", "black", "white"))
    assert grid.size == (3 * (8 + GAP) + GAP, 2 * (8 + GAP) + GAP)
    step = 8 + GAP
    assert [grid.getpixel((GAP + i * step, GAP)) for i in range(3)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert grid.getpixel((GAP, GAP + step)) == (0, 0, 0)


def test_pictures_of_other_sizes_are_centred_in_a_grid():
    grid = picture_grid([*squares("red", size=(8, 8)), *squares("blue", size=(4, 4))])
    assert grid.getpixel((GAP + 8 + GAP + 2, GAP + 2)) == (0, 0, 255)
    assert grid.getpixel((GAP + 8 + GAP + 1, GAP + 1)) == (255, 255, 255)


def test_a_grid_of_nothing_is_refused():
    with pytest.raises(InvalidRequest, match="at least one picture"):
        picture_grid([])


def test_a_sheet_has_a_line_of_text_over_each_enlarged_row():
    sheet = labelled_sheet([("a label wider than its pictures", squares("red")), ("b", squares("blue"))], scale=2)
    assert sheet.width > 16 + 2 * GAP
    colours = {colour for _, colour in sheet.getcolors(2**16)}
    assert {(255, 0, 0), (0, 0, 255)} <= colours
    assert any(max(colour) < 100 for colour in colours), "no ink of a label"


def test_a_page_shows_captions_and_commands_as_text():
    figures = (Figure("a/1.png", "a <b> fish"), Figure("references/r.png", "reference", is_reference=True))
    row = Row("one & two", figures, "stylefast generate 'a fish' --out x")
    page = html_page("title", "text", [Section("heading", "words", (row,))], 192)
    assert "a &lt;b&gt; fish" in page and "one &amp; two" in page and "--out x</pre>" in page
    assert page.count("<img ") == 2 and page.count("class=reference") == 1
    assert "image-rendering: pixelated" in page and "width: 192px" in page
