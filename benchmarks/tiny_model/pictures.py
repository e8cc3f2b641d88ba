"""Procedural pictures: 12 contents x 12 styles x 6 palettes, with captions, for training and scoring the tiny model.

`render` draws one picture from names and a random generator; the same generator state gives the same pixels.
One combination of content and style per style and per content (`HELD_OUT`) and one whole style (`UNSEEN_STYLE`) never
reach the text-to-image training, so that scores on them measure composition and learned styles, not memory.
"""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.tiny_model.picture_styles import PAINTERS, Scene
from stylefast.errors import InvalidRequest

CONTENTS = ("star", "heart", "moon", "house", "tree", "fish", "cat", "boat", "flower", "mushroom", "cup", "rocket")
STYLES = tuple(PAINTERS)[:12]
UNSEEN_STYLE = "chalk"
# of the LoRAs that ship with the model, which has never seen them either
LORA_STYLES = ("pixel", "sunset", "gold")
PALETTES = ("warm", "cool", "pastel", "forest", "candy", "mono")

# content k keeps style (5 k + 2) mod 12 for the test: a bijection, as 5 and 12 share no factor
HELD_OUT = frozenset((content, STYLES[(5 * k + 2) % 12]) for k, content in enumerate(CONTENTS))

# hue, saturation, value of the background, the body and the second part
_PALETTE_COLOURS = {
    "warm": ((0.12, 0.32, 0.97), (0.02, 0.85, 0.88), (0.10, 0.90, 0.98)),
    "cool": ((0.53, 0.22, 0.95), (0.61, 0.80, 0.78), (0.48, 0.70, 0.85)),
    "pastel": ((0.15, 0.12, 1.00), (0.93, 0.42, 0.97), (0.55, 0.40, 0.94)),
    "forest": ((0.22, 0.25, 0.88), (0.36, 0.70, 0.48), (0.08, 0.65, 0.55)),
    "candy": ((0.50, 0.30, 0.98), (0.91, 0.78, 0.97), (0.14, 0.75, 1.00)),
    "mono": ((0.00, 0.00, 0.91), (0.00, 0.00, 0.27), (0.00, 0.00, 0.58)),
}
_BODY, _SECOND, _DETAIL, _NOTHING = 1, 2, 3, 0
_MIRRORED = ("moon", "fish", "boat", "cup")
_SUPERSAMPLING = 3


def _palette(rng: np.random.Generator, name: str) -> list[np.ndarray]:
    colours = []
    for hue, saturation, value in _PALETTE_COLOURS[name]:
        saturation *= 1 + rng.normal() * 0.06
        value *= 1 + rng.normal() * 0.03
        hue += rng.normal() * 0.012
        colours.append(np.array(colorsys.hsv_to_rgb(hue % 1, min(max(saturation, 0), 1), min(value, 1)), np.float32))
    return colours


def _ellipse(x: float, y: float, width: float, height: float, points: int = 36) -> list[tuple[float, float]]:
    angles = (2 * math.pi * i / points for i in range(points))
    return [(x + width * math.cos(a), y + height * math.sin(a)) for a in angles]


def _star() -> list:
    spikes = []
    for i in range(10):
        radius = 1.08 if i % 2 == 0 else 0.47
        spikes.append((radius * math.sin(math.pi * i / 5), 0.06 - radius * math.cos(math.pi * i / 5)))
    return [(_BODY, spikes)]


def _heart() -> list:
    curve = []
    for i in range(48):
        a = 2 * math.pi * i / 48
        y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        curve.append((math.sin(a) ** 3, -y / 15.5 - 0.08))
    return [(_BODY, curve)]


def _moon() -> list:
    return [(_BODY, _ellipse(-0.08, 0, 1.02, 1.02, 48)), (_NOTHING, _ellipse(0.42, -0.1, 0.84, 0.84, 48))]


def _house() -> list:
    return [
        (_BODY, [(-0.74, -0.12), (0.74, -0.12), (0.74, 0.98), (-0.74, 0.98)]),
        (_SECOND, [(-1.05, -0.1), (0, -1.05), (1.05, -0.1)]),
        (_DETAIL, [(-0.5, 0.35), (-0.1, 0.35), (-0.1, 0.98), (-0.5, 0.98)]),
        (_DETAIL, [(0.2, 0.2), (0.52, 0.2), (0.52, 0.52), (0.2, 0.52)]),
    ]


def _tree() -> list:
    return [
        (_SECOND, [(-0.17, 0.6), (0.17, 0.6), (0.17, 1.1), (-0.17, 1.1)]),
        (_BODY, [(0, -0.25), (0.95, 0.72), (-0.95, 0.72)]),
        (_BODY, [(0, -0.7), (0.74, 0.2), (-0.74, 0.2)]),
        (_BODY, [(0, -1.12), (0.52, -0.32), (-0.52, -0.32)]),
    ]


def _fish() -> list:
    return [
        (_SECOND, [(0.4, 0), (1.15, -0.68), (0.98, 0), (1.15, 0.68)]),
        (_SECOND, [(-0.42, -0.42), (0.34, -0.86), (0.3, -0.3)]),
        (_BODY, _ellipse(-0.22, 0, 0.9, 0.6, 48)),
        (_DETAIL, _ellipse(-0.68, -0.13, 0.14, 0.14, 20)),
    ]


def _cat() -> list:
    return [
        (_SECOND, [(-0.92, -1.05), (-0.12, -0.5), (-0.85, 0.1)]),
        (_SECOND, [(0.92, -1.05), (0.12, -0.5), (0.85, 0.1)]),
        (_BODY, _ellipse(0, 0.17, 0.95, 0.8, 48)),
        (_DETAIL, _ellipse(-0.38, 0.02, 0.15, 0.19, 20)),
        (_DETAIL, _ellipse(0.38, 0.02, 0.15, 0.19, 20)),
        (_DETAIL, [(-0.17, 0.36), (0.17, 0.36), (0, 0.58)]),
    ]


def _boat() -> list:
    return [
        (_DETAIL, [(-0.07, -1.05), (0.07, -1.05), (0.07, 0.4), (-0.07, 0.4)]),
        (_SECOND, [(0.16, -1.0), (0.98, 0.2), (0.16, 0.2)]),
        (_SECOND, [(-0.16, -0.72), (-0.16, 0.2), (-0.82, 0.2)]),
        (_BODY, [(-1.1, 0.38), (1.1, 0.38), (0.68, 0.98), (-0.68, 0.98)]),
    ]


def _flower() -> list:
    stalk = [(_SECOND, [(-0.08, 0.2), (0.08, 0.2), (0.08, 1.12), (-0.08, 1.12)])]
    leaf = [(_SECOND, [(0.04, 0.95), (0.28, 0.55), (0.68, 0.5), (0.44, 0.86)])]
    angles = [2 * math.pi * i / 5 for i in range(5)]
    petals = [(_BODY, _ellipse(0.42 * math.sin(a), -0.36 - 0.42 * math.cos(a), 0.33, 0.33, 28)) for a in angles]
    return [*stalk, *leaf, *petals, (_DETAIL, _ellipse(0, -0.36, 0.21, 0.21, 24))]


def _mushroom() -> list:
    cap = [(x, min(y, 0.1)) for x, y in _ellipse(0, 0.1, 1.05, 1.05, 64)]
    return [
        (_SECOND, [(-0.3, 0.05), (0.3, 0.05), (0.42, 1.0), (-0.42, 1.0)]),
        (_BODY, cap),
        (_SECOND, _ellipse(-0.45, -0.3, 0.2, 0.2, 20)),
        (_SECOND, _ellipse(0.1, -0.58, 0.2, 0.2, 20)),
        (_SECOND, _ellipse(0.52, -0.18, 0.17, 0.17, 20)),
    ]


def _cup() -> list:
    return [
        (_SECOND, _ellipse(0.62, 0.05, 0.5, 0.46, 36)),
        (_NOTHING, _ellipse(0.62, 0.05, 0.27, 0.24, 36)),
        (_BODY, [(-0.98, -0.55), (0.62, -0.55), (0.4, 0.85), (-0.76, 0.85)]),
        (_DETAIL, [(-0.98, -0.68), (0.62, -0.68), (0.6, -0.46), (-0.95, -0.46)]),
    ]


def _rocket() -> list:
    return [
        (_SECOND, [(-0.3, 0.1), (-0.85, 0.85), (-0.3, 0.7)]),
        (_SECOND, [(0.3, 0.1), (0.85, 0.85), (0.3, 0.7)]),
        (_DETAIL, [(-0.22, 0.72), (0.22, 0.72), (0, 1.15)]),
        (_BODY, [(0, -1.15), (0.3, -0.72), (0.4, -0.25), (0.34, 0.75), (-0.34, 0.75), (-0.4, -0.25), (-0.3, -0.72)]),
        (_DETAIL, _ellipse(0, -0.28, 0.19, 0.19, 24)),
    ]


_SHAPES = {
    "star": _star,
    "heart": _heart,
    "moon": _moon,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "cat": _cat,
    "boat": _boat,
    "flower": _flower,
    "mushroom": _mushroom,
    "cup": _cup,
    "rocket": _rocket,
}


def _masks(rng: np.random.Generator, content: str, size: int) -> np.ndarray:
    """Draw the object at a random place, size and tilt as soft masks `[3, size, size]`."""
    board = size * _SUPERSAMPLING
    scale = rng.uniform(0.34, 0.405) * board
    x0, y0 = (0.5 + rng.uniform(-0.05, 0.05, 2)) * board
    tilt = rng.uniform(-0.14, 0.14)
    cosine, sine = math.cos(tilt), math.sin(tilt)
    mirror = -1 if content in _MIRRORED and rng.random() < 0.5 else 1
    image = Image.new("L", (board, board), _NOTHING)
    draw = ImageDraw.Draw(image)
    for label, polygon in _SHAPES[content]():
        points = [(mirror * x, y) for x, y in polygon]
        points = [(x0 + scale * (x * cosine - y * sine), y0 + scale * (x * sine + y * cosine)) for x, y in points]
        draw.polygon(points, fill=label)
    labels = np.asarray(image).reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING)
    return np.stack([(labels == label).mean((1, 3), dtype=np.float32) for label in (_BODY, _SECOND, _DETAIL)])


def outlines(rng: np.random.Generator, content: str, palette: str, size: int = 64) -> np.ndarray:
    """Draw in plain greys what `render` shows with the same arguments, `rng` in the same state: `[size, size]`."""
    _palette(rng, palette)
    body, second, detail = _masks(rng, content, size)
    return (255 * np.clip(0.45 * body + 0.7 * second + detail, 0, 1) + 0.5).astype(np.uint8)


def render(rng: np.random.Generator, content: str, style: str, palette: str, size: int = 64) -> np.ndarray:
    """Draw `content` in `style` and `palette`: uint8 `[size, size, 3]`, `size` a multiple of 64.

    Raises `InvalidRequest` on an unknown name or another size.
    """
    given = (("content", content, CONTENTS), ("style", style, PAINTERS), ("palette", palette, PALETTES))
    for kind, name, known in given:
        if name not in known:
            raise InvalidRequest(f"{kind} {name!r} is unknown; choose one of {', '.join(known)}")
    if size < 64 or size % 64:
        raise InvalidRequest(f"size {size} is not a positive multiple of 64")
    background, main, second = _palette(rng, palette)
    scene = Scene(_masks(rng, content, size), background, main, second)
    return (np.clip(PAINTERS[style](scene, rng), 0, 1) * 255 + 0.5).astype(np.uint8)
