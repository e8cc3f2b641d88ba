"""Pictures side by side, and a page that shows them with the commands that made them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageDraw, ImageFont, ImageOps

from stylefast.errors import InvalidRequest

GAP = 4  # pixels between pictures
LABEL_HEIGHT = 16
_PAPER, _INK = (255, 255, 255), (20, 20, 20)


@dataclass(frozen=True)
class Figure:
    """One picture of a page. `source`: path relative to the page; `caption`: below it."""

    source: str
    caption: str
    is_reference: bool = False


@dataclass(frozen=True)
class Row:
    """Pictures made by one command. `title` says how the row differs, `command` is the line to type."""

    title: str
    figures: tuple[Figure, ...]
    command: str


@dataclass(frozen=True)
class Section:
    """Rows to compare, below a heading and a sentence on what to look for."""

    title: str
    text: str
    rows: tuple[Row, ...]


def picture_grid(images: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Arrange pictures in rows of `columns` (default: as square as possible), centred in cells of the largest size.

    Raises InvalidRequest without pictures.
    """
    if not images:
        raise InvalidRequest("a grid needs at least one picture")
    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    if columns < 1:
        raise InvalidRequest(f"columns is {columns}; a grid needs at least 1")
    columns = min(columns, len(images))
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), _PAPER)
    for i, image in enumerate(images):
        left = GAP + i % columns * (width + GAP) + (width - image.width) // 2
        top = GAP + i // columns * (height + GAP) + (height - image.height) // 2
        grid.paste(image, (left, top))
    return grid


def labelled_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], scale: int = 1) -> Image.Image:
    """Return rows of pictures, each below a line of text, enlarged `scale` times without smoothing.

    Raises InvalidRequest without rows.
    """
    if not rows or scale < 1:
        raise InvalidRequest(f"a sheet needs at least one row, and a scale of at least 1 (not {scale})")
    font = ImageFont.load_default()
    strips = []
    for _, images in rows:
        large = [ImageOps.scale(image, scale, Image.Resampling.NEAREST) for image in images]
        strips.append(picture_grid(large, columns=len(large)))
    widths = [strip.width for strip in strips] + [math.ceil(font.getlength(label)) + 2 * GAP for label, _ in rows]
    sheet = Image.new("RGB", (max(widths), sum(strip.height + LABEL_HEIGHT for strip in strips)), _PAPER)
    draw, top = ImageDraw.Draw(sheet), 0
    for (label, _), strip in zip(rows, strips, strict=True):
        draw.text((GAP, top + 3), label, fill=_INK, font=font)
        sheet.paste(strip, (0, top + LABEL_HEIGHT))
        top += strip.height + LABEL_HEIGHT
    return sheet


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the picture scaled to fit into `size` (width, height), keeping its aspect ratio."""
    return image if image.size == size else ImageOps.contain(image, size)


def html_page(title: str, text: str, sections: Sequence[Section], width: int) -> str:
    """Return one page of plain HTML and CSS: pictures by relative path, `width` pixels wide without smoothing."""
    body = "\n".join(_section(section) for section in sections)
    return _PAGE.format(title=escape(title), text=escape(text), width=width, body=body)


def _section(section: Section) -> str:
    rows = "\n".join(_row(row) for row in section.rows)
    return f"<section>\n<h2>{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>\n{rows}\n</section>"


def _row(row: Row) -> str:
    figures = "".join(
        f'<figure{" class=reference" if figure.is_reference else ""}><img src="{escape(figure.source)}" '
        f'alt="{escape(figure.caption)}"><figcaption>{escape(figure.caption)}</figcaption></figure>'
        for figure in row.figures
    )
    command = f"<pre>{escape(row.command)}</pre>" if row.command else ""
    return f'<h3>{escape(row.title)}</h3>\n<div class="row">{figures}</div>\n{command}'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --soft: #8884; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ margin-top: 3rem; border-bottom: 1px solid var(--soft); }}
h3 {{ margin: 1.5rem 0 .5rem; font-size: 1rem; }}
.row {{ display: flex; flex-wrap: wrap; gap: 12px; }}
figure {{ margin: 0; }}
img {{ display: block; width: {width}px; image-rendering: pixelated; border-radius: 4px; }}
.reference img {{ outline: 3px solid #c60; outline-offset: 2px; }}
figcaption {{ max-width: {width}px; font-size: .8rem; opacity: .8; padding-top: 4px; }}
pre {{ background: var(--soft); border-radius: 4px; padding: .5rem .75rem; overflow-x: auto; font-size: .8rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{text}</p>
{body}
</body>
</html>
"""
