"""The drawing of styles: one function per style, from a scene's soft masks and colours to a picture.

A painter takes `(scene, rng)` and returns floats in 0..1 of shape `[size, size, 3]`. Structures are 4 pixels or
coarser at 64 pixels, because a factor-4 autoencoder has to keep them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

PAPER = np.array((0.97, 0.96, 0.92), np.float32)
BLACK = np.array((0.05, 0.045, 0.06), np.float32)


@dataclass(frozen=True)
class Scene:
    """An object as three soft masks (body, second, detail) `[3, size, size]`, with colours `[3]` of its palette."""

    masks: np.ndarray
    background: np.ndarray
    main: np.ndarray
    second: np.ndarray

    @property
    def size(self) -> int:
        return self.masks.shape[-1]

    @property
    def unit(self) -> float:
        """Length of one pixel of the 64-pixel drawing board."""
        return self.size / 64

    @property
    def dark(self) -> np.ndarray:
        return BLACK + self.main * 0.1

    @property
    def figure(self) -> np.ndarray:
        """The mask of the object, 0..1 `[size, size]`."""
        return np.clip(self.masks.sum(0), 0, 1)

    @property
    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of each pixel in units of the 64-pixel board, each `[size, size]`."""
        rows, columns = np.mgrid[: self.size, : self.size].astype(np.float32)
        return rows / self.unit, columns / self.unit


def _over(base: np.ndarray, alpha: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return base + alpha[..., None] * (colour - base)


def _filled(scene: Scene, background: np.ndarray, colours: tuple, masks: np.ndarray | None = None) -> np.ndarray:
    picture = np.empty((scene.size, scene.size, 3), np.float32)
    picture[:] = background
    for mask, colour in zip(scene.masks if masks is None else masks, colours, strict=True):
        picture = _over(picture, mask, colour)
    return picture


def _plain(scene: Scene) -> np.ndarray:
    return _filled(scene, scene.background, (scene.main, scene.second, scene.dark))


def _filtered(mask: np.ndarray, image_filter: ImageFilter.Filter) -> np.ndarray:
    image = Image.fromarray((np.clip(mask, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(image_filter), np.float32) / 255


def _blur(mask: np.ndarray, radius: float) -> np.ndarray:
    return _filtered(mask, ImageFilter.GaussianBlur(radius))


def _outline(scene: Scene, width: int = 3) -> np.ndarray:
    """Borders of every part, `[size, size]`; `width` is odd and in pixels of the 64-pixel board."""
    width = max(3, int(round(width * scene.unit)) | 1)
    lines = np.zeros((scene.size, scene.size), np.float32)
    for mask in (*scene.masks, scene.figure):
        if mask.max() > 0:
            grown, shrunk = _filtered(mask, ImageFilter.MaxFilter(width)), _filtered(mask, ImageFilter.MinFilter(width))
            lines = np.maximum(lines, grown - shrunk)
    return lines


def _noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise of unit deviation at its `cells` x `cells` knots, `[size, size]`."""
    knots = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(knots.resize((size, size), Image.Resampling.BICUBIC))


def _wobbled(scene: Scene, rng: np.random.Generator, cells: int, amount: float) -> np.ndarray:
    size = scene.size
    rows, columns = np.mgrid[:size, :size]
    rows = np.clip((rows + _noise(rng, size, cells) * amount * scene.unit + 0.5).astype(int), 0, size - 1)
    columns = np.clip((columns + _noise(rng, size, cells) * amount * scene.unit + 0.5).astype(int), 0, size - 1)
    return scene.masks[:, rows, columns]


def _flat(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    return _plain(scene)


def _watercolor(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    masks = np.stack([_blur(mask, 0.8 * scene.unit) for mask in _wobbled(scene, rng, 9, 0.9)])
    figure = np.clip(masks.sum(0), 0, 1)
    wash = np.clip(0.3 + 0.3 * _noise(rng, scene.size, 5), 0, 0.9)
    pigment = np.clip(0.72 + 0.2 * _noise(rng, scene.size, 7), 0.35, 1)
    rim = np.clip(4 * figure * (1 - figure), 0, 1) * 0.4
    picture = _over(np.broadcast_to(PAPER, (scene.size, scene.size, 3)), wash, scene.background)
    for mask, colour in zip(masks, (scene.main, scene.second, scene.dark), strict=True):
        picture = _over(picture, mask * pigment, colour)
    return _over(picture, rim, scene.main * 0.6)


def _hatching(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    rows, columns = scene.grid
    phase = rng.uniform(0, 9)
    falling = (np.sin((rows + columns) * (2 * np.pi / 7.2) + phase) > 0).astype(np.float32)
    rising = (np.sin((rows - columns) * (2 * np.pi / 7.2) + phase) > 0).astype(np.float32)
    masks = scene.masks * np.stack([falling, rising, np.ones_like(rows)])
    picture = _filled(scene, PAPER, (scene.main * 0.85, scene.second * 0.8, scene.dark), masks)
    return _over(picture, _outline(scene), scene.dark)


def _pointillism(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    size, step, radius = scene.size, 4.6 * scene.unit, 2.0 * scene.unit
    source = _filled(scene, scene.background * 0.6 + PAPER * 0.4, (scene.main, scene.second, scene.dark))
    canvas = Image.new("RGB", (2 * size, 2 * size), tuple(int(255 * v) for v in PAPER))
    draw = ImageDraw.Draw(canvas)
    count = int(size / step) + 2
    jitter, shade = rng.uniform(-0.5, 0.5, (count, count, 2)) * scene.unit, rng.normal(0, 0.05, (count, count))
    for row in range(count):
        for column in range(count):
            x = (column + 0.5 * (row % 2)) * step + jitter[row, column, 0]
            y = row * step + jitter[row, column, 1]
            colour = source[min(int(max(y, 0)), size - 1), min(int(max(x, 0)), size - 1)] + shade[row, column]
            box = (2 * (x - radius), 2 * (y - radius), 2 * (x + radius), 2 * (y + radius))
            draw.ellipse(box, fill=tuple(int(v) for v in np.clip(colour * 255, 0, 255)))
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def _neon(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    lines = _outline(scene)
    glow = np.clip(0.95 * _blur(lines, 0.9 * scene.unit) + 1.5 * _blur(lines, 3.2 * scene.unit), 0, 1)
    bright = [colour / max(colour.max(), 0.1) for colour in (scene.main, scene.second)]
    second = np.clip(_blur(scene.masks[1], 2 * scene.unit) * 1.6, 0, 1)
    tube = _over(np.broadcast_to(bright[0], (scene.size, scene.size, 3)), second, bright[1])
    night = np.array((0.03, 0.02, 0.07), np.float32)
    return night + tube * glow[..., None] + 0.4 * (lines**2)[..., None]


def _mosaic(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    rows, columns = scene.grid
    tile_row, tile_column = (rows // 4).astype(int), (columns // 4).astype(int)
    count, edge = 16, 4 * scene.unit
    tiles = _plain(scene).reshape(count, int(edge), count, int(edge), 3).mean((1, 3))
    tiles = tiles + rng.normal(0, 0.045, (count, count, 1))
    picture = tiles[tile_row, tile_column].astype(np.float32)
    grout = ((rows % 4 < 1) | (columns % 4 < 1)).astype(np.float32)
    return _over(picture, grout * 0.55, np.array((0.38, 0.36, 0.35), np.float32))


def _crayon(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    masks = _wobbled(scene, rng, 14, 0.8)
    figure = np.clip(masks.sum(0), 0, 1)
    rows, columns = scene.grid
    angle = 0.65 + rng.normal() * 0.08
    along = columns * np.cos(angle) + rows * np.sin(angle)
    across = rows * np.cos(angle) - columns * np.sin(angle)
    grain = rng.random((64, 160)).astype(np.float32)
    strokes = grain[(across / 2.1 + 32).astype(int) % 64, (along / 6 + 40).astype(int) % 160]
    strokes = 0.8 * strokes + 0.2 * rng.random(strokes.shape).astype(np.float32)
    base = np.broadcast_to(PAPER, (scene.size, scene.size, 3))
    picture = _over(base, (strokes > 0.74) * (1 - figure) * 0.6, scene.background * 0.9)
    for mask, colour in zip(masks, (scene.main, scene.second, scene.dark), strict=True):
        picture = _over(picture, mask * np.where(strokes > 0.22, 0.95, 0.4), colour)
    return picture


def _gradient(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    rows, columns = scene.grid
    ramp = np.clip((rows + columns) / 126, 0, 1)
    light, deep = np.clip(scene.second * 0.75 + 0.3, 0, 1), scene.main * 0.8
    body = _over(np.broadcast_to(light, (scene.size, scene.size, 3)), np.clip(2 * ramp - 0.5, 0, 1), deep)
    other = _over(np.broadcast_to(deep, (scene.size, scene.size, 3)), ramp, light)
    shade = scene.background * 0.35 + scene.main * 0.12
    picture = _over(np.broadcast_to(shade, (scene.size, scene.size, 3)), ramp, scene.background)
    for mask, colour in zip(scene.masks, (body, other, scene.dark), strict=True):
        picture = _over(picture, mask, colour)
    return picture


def _ink(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    lines = np.maximum(np.clip(_outline(scene) * 1.2, 0, 1), scene.masks[2])
    white = np.full((scene.size, scene.size, 3), 0.985, np.float32)
    return _over(white, lines, BLACK)


def _glass(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    rows, columns = scene.grid
    count = 5
    step = 64 / count
    knots = (np.arange(count) + 0.5) * step
    site_rows = (knots[:, None] + rng.uniform(-0.33, 0.33, (count, count)) * step).ravel()
    site_columns = (knots[None] + rng.uniform(-0.33, 0.33, (count, count)) * step).ravel()
    distance = (rows[..., None] - site_rows) ** 2 + (columns[..., None] - site_columns) ** 2
    cell = distance.argmin(-1)
    nearest = np.sqrt(np.partition(distance, 1, -1)[..., :2])
    seams = np.clip(1.7 - (nearest[..., 1] - nearest[..., 0]), 0, 1) * (1 - 0.75 * scene.figure)
    shade = rng.normal(0, 0.13, count * count)[cell][..., None]
    pane = _filled(scene, scene.background * 0.55 + scene.second * 0.35, (scene.main, scene.second, scene.dark))
    pane = pane * (1 + shade) + 0.25 * shade
    rim = _filtered(scene.figure, ImageFilter.MaxFilter(max(3, int(round(5 * scene.unit)) | 1))) - scene.figure
    leads = np.maximum.reduce((seams, np.clip(rim, 0, 1), _outline(scene)))
    return _over(pane, leads, BLACK)


def _woodcut(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    rows, columns = scene.grid
    phase = rng.uniform(0, 6)
    waves = np.sin((rows + 1.8 * np.sin(columns / 8 + phase)) * (2 * np.pi / 6.4))
    upright = np.sin(columns * (2 * np.pi / 6.4) + phase)
    light = np.clip(0.35 * scene.background + 0.65 * np.array((0.97, 0.9, 0.76), np.float32), 0, 1)
    body = scene.masks[0] * (waves > -0.78) + scene.masks[1] * (upright > -0.4)
    carved = np.where(scene.figure > 0.5, body, (waves > 0.93) * (1 - scene.figure)) * (1 - _outline(scene))
    return _over(np.broadcast_to(BLACK, (scene.size, scene.size, 3)), carved.astype(np.float32), light)


def _blueprint(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    rows, columns = scene.grid
    blue = np.array((0.08, 0.25, 0.6), np.float32) * (1 + rng.normal() * 0.04)
    offset = rng.integers(0, 8)
    ruled = (((columns + offset) % 8 < 1) | ((rows + offset) % 8 < 1)).astype(np.float32)
    picture = np.broadcast_to(blue, (scene.size, scene.size, 3)) + 0.14 * ruled[..., None]
    return _over(picture, _outline(scene), np.array((0.93, 0.97, 1.0), np.float32))


def _chalk(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    rows, columns = scene.grid
    board = np.array((0.05, 0.05, 0.07), np.float32) + 0.012 * _noise(rng, scene.size, 6)[..., None]
    grain = np.clip(1.05 + 0.3 * _noise(rng, scene.size, 22), 0.4, 1)
    smear = ((np.sin((rows + columns) * (2 * np.pi / 8.5)) > 0.1) * scene.figure * 0.4).astype(np.float32)
    soft = [colour * 0.45 + 0.52 for colour in (scene.main, scene.second)]
    picture = _over(board, smear * (1 - scene.masks[1]) * grain, soft[0])
    picture = _over(picture, smear * scene.masks[1] * grain, soft[1])
    return _over(picture, np.clip(_outline(scene) * 1.1, 0, 1) * grain, soft[0] * 0.4 + 0.6)


def _pixel(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Paint cells of 4 pixels, each one colour, on a dark chequered ground."""
    size = scene.size // 16
    cells = scene.masks.reshape(3, 16, size, 16, size).mean((2, 4))
    outside = 1 - np.clip(cells.sum(0), 0, 1)
    part = np.argmax(np.concatenate([outside[None], cells * 1.15]), 0)
    grown = Image.fromarray((part > 0).astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
    edge = (part == 0) & (np.asarray(grown) > 0)
    rows, columns = np.mgrid[:16, :16]
    ground = np.where(((rows // 2 + columns // 2) % 2)[..., None], (0.10, 0.10, 0.24), (0.15, 0.15, 0.34))
    colours = [np.clip(colour * 1.05, 0, 1) for colour in (scene.main, scene.second)]
    picture = np.select([(part == k)[..., None] for k in (1, 2, 3)], [*colours, scene.dark], ground)
    picture = np.where(edge[..., None], (0.97, 0.97, 0.99), picture) + 0.01 * rng.normal()
    return picture.repeat(size, 0).repeat(size, 1).astype(np.float32)


def _sunset(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Paint a dark silhouette before a low sun."""
    rows, columns = scene.grid
    stops = np.array([(0.24, 0.10, 0.42), (0.72, 0.20, 0.46), (0.98, 0.48, 0.28), (1.0, 0.80, 0.42)], np.float32)
    height = np.clip(rows / 64 + 0.02 * rng.normal(), 0, 0.999) * (len(stops) - 1)
    low = height.astype(int)
    sky = stops[low] + (height - low)[..., None] * (stops[np.minimum(low + 1, len(stops) - 1)] - stops[low])
    sun = np.hypot(rows - 40, columns - 32 + 3 * rng.normal())
    sky = _over(sky, np.clip((27 - sun) / 2, 0, 1) * 0.75, np.array((1.0, 0.93, 0.66), np.float32))
    shadow = np.array((0.09, 0.04, 0.13), np.float32)
    picture = _over(sky, np.clip(scene.masks[:2].sum(0), 0, 1), shadow + 0.05 * scene.main)
    return _over(picture, scene.masks[2], np.array((0.93, 0.42, 0.22), np.float32))


def _gold(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Paint gold leaf with a sheen on black, in a golden frame."""
    rows, columns = scene.grid
    sheen = 0.5 + 0.5 * np.sin((rows * 0.6 + columns) * (2 * np.pi / 34) + rng.uniform(0, 6.3))
    dark, light = np.array((0.55, 0.36, 0.06), np.float32), np.array((1.0, 0.88, 0.45), np.float32)
    leaf = dark + sheen[..., None] * (light - dark)
    picture = np.full((scene.size, scene.size, 3), 0.035, np.float32)
    away = np.minimum(np.minimum(rows, 63 - rows), np.minimum(columns, 63 - columns))
    picture = _over(picture, ((away >= 2) & (away < 5)).astype(np.float32), leaf)
    picture = _over(picture, scene.masks[0], leaf)
    picture = _over(picture, scene.masks[1], leaf * 0.62)
    return _over(picture, scene.masks[2], np.array((0.05, 0.04, 0.04), np.float32))


PAINTERS: dict[str, Callable[[Scene, np.random.Generator], np.ndarray]] = {
    "flat": _flat,
    "watercolor": _watercolor,
    "hatching": _hatching,
    "pointillism": _pointillism,
    "neon": _neon,
    "mosaic": _mosaic,
    "crayon": _crayon,
    "gradient": _gradient,
    "ink": _ink,
    "glass": _glass,
    "woodcut": _woodcut,
    "blueprint": _blueprint,
    "chalk": _chalk,
    "pixel": _pixel,
    "sunset": _sunset,
    "gold": _gold,
}
