"""Captions of the procedural pictures: what the tiny model's text encoders learn to read."""

import numpy as np

from benchmarks.tiny_model.pictures import CONTENTS, PALETTES, STYLES

_GRAMMAR = (
    *("a", "an", "the", "in", "of", "with", "and", "on", "two", "three", ",", "."),
    *("style", "palette", "colors", "painting", "picture", "photo", "drawing", "image", "art", "scene"),
)
WORDS = (*_GRAMMAR, *CONTENTS, *STYLES, *PALETTES)

_CONTENT_ONLY = (
    "a {c}",
    "a {c}",
    "a {c}",
    "{c}",
    "the {c}",
    "a picture of a {c}",
    "a painting of a {c}",
    "a drawing of a {c}",
    "a photo of a {c}",
    "an image of a {c}",
)
_STYLE_ONLY = (
    "{s} style",
    "{s}",
    "{s} art",
    "a picture in {s} style",
    "a painting in the style of {s}",
    "in {s} style",
    "{s} style, {p} palette",
    "a {s} painting, {p} palette",
    "a {s} picture with {p} colors",
)
_PALETTE_ONLY = ("a {c}, {p} palette", "a {c} with {p} colors", "{p} palette", "a picture with a {p} palette")
_FULL = (
    "a {c} in {s} style",
    "a {c} in {s} style",
    "a {c} in {s} style",
    "a {c}, {s} style",
    "{c}, {s}",
    "a {s} {c}",
    "a {s} drawing of a {c}",
    "a {s} painting of a {c}",
    "a {s} picture of a {c}",
    "a painting of a {c} in {s} style",
    "a picture of a {c} in the style of {s}",
    "a painting of a {c} in the style of {s}",
    "a {c} in the style of {s}",
    "{s} style, a {c}",
    "{s} art of a {c}",
    "the {c} in {s} style",
)
_PALETTE_ENDINGS = (", {p} palette", ", {p} palette", ", {p} palette", " with {p} colors", " in a {p} palette")
_STYLE_ENDINGS = (" in {s} style", " in {s} style", ", {s} style", " in the style of {s}", ", {s} art")
_UNKNOWN_WORD_SHARE = 0.06


def _pick(rng: np.random.Generator, templates: tuple[str, ...]) -> str:
    return templates[rng.integers(len(templates))]


def _with_unknown_word(rng: np.random.Generator, caption: str) -> str:
    """Add a word of random letters to some captions, so that words outside the vocabulary come to mean nothing."""
    if not caption or rng.random() >= _UNKNOWN_WORD_SHARE:
        return caption
    letters = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(3, 6)))
    words = caption.split(" ")
    words.insert(rng.integers(len(words) + 1), letters)
    return " ".join(words)


def full_caption(content: str, style: str, palette: str) -> str:
    return f"a {content} in {style} style, {palette} palette"


def single_caption(rng: np.random.Generator, content: str, style: str, palette: str) -> str | None:
    """Return a training caption of a picture of one object; `None` stands for the empty prompt's zeroed embeddings."""
    kind = rng.random()
    if kind < 0.07:
        return None
    if kind < 0.10:
        return ""
    if kind < 0.25:
        template = _pick(rng, _CONTENT_ONLY)
    elif kind < 0.33:
        template = _pick(rng, _STYLE_ONLY)
    elif kind < 0.37:
        template = _pick(rng, _PALETTE_ONLY)
    else:
        template = _pick(rng, _FULL) + (_pick(rng, _PALETTE_ENDINGS) if rng.random() < 0.6 else "")
    return _with_unknown_word(rng, template.format(c=content, s=style, p=palette))


def panel_caption(rng: np.random.Generator, contents: list[str], style: str, palette: str) -> str | None:
    """Return a training caption of several panels, left to right; most name the contents only, so the style has to come
    from the other panels. `None` stands for the empty prompt's zeroed embeddings."""
    kind = rng.random()
    if kind < 0.12:
        return None
    joint = " and " if rng.random() < 0.2 else ", "
    caption = joint.join(f"a {content}" for content in contents)
    if kind > 0.70:
        caption += _pick(rng, _STYLE_ENDINGS) if rng.random() < 0.85 else ""
        caption += _pick(rng, _PALETTE_ENDINGS) if rng.random() < 0.5 else ""
    return _with_unknown_word(rng, caption.format(s=style, p=palette))
