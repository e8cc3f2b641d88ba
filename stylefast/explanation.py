"""What a point of a picture read of its references, as numbers, as pictures and as a page."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from stylefast import values
from stylefast.errors import InvalidRequest
from stylefast.presentation import Figure, Row, Section, html_page
from stylefast.whole_files import write_whole

_MOST_STEPS = 12  # that a page shows
_SHOWN_SIDE = 256  # pixels; smaller pictures are enlarged to it
_COLD, _WARM, _HOT = (16, 8, 48), (214, 72, 60), (255, 246, 170)
_CROSS = (255, 255, 255)
_CONTOUR = (0, 0, 0)


@dataclass(frozen=True, eq=False)
class SharedAttention:
    """Where the point's query reads in one self-attention layer in one step, averaged over heads.

    Attributes:
        step: number of the step, from 1.
        layer: name of the transformer block.
        own: float array [h, w], what it reads of its own picture; None in swap mode.
        references: float array [h, w] of each reference; all arrays together sum to 1.
    """

    step: int
    layer: str
    own: np.ndarray | None
    references: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """How much image prompts add to one cross-attention layer in one step.

    Attributes:
        step: number of the step, from 1.
        layer: name of the transformer block.
        share: float array [h, w], at each point of the picture the share, 0 to 1, of the layer's output that comes
            from image prompts.
    """

    step: int
    layer: str
    share: np.ndarray


@dataclass(frozen=True, eq=False)
class Explanation:
    """Result of `Engine.explain`.

    Attributes:
        image: the PIL picture, as `generate` draws it.
        point: (x, y) in pixels.
        references: PIL pictures of the references; None for those of a bank, which has no picture.
        shared: maps of the shared self-attention, in order of steps and layers.
        image_prompts: maps of the image prompts.
    """

    image: Image.Image
    point: tuple[int, int]
    references: tuple[Image.Image | None, ...]
    shared: tuple[SharedAttention, ...]
    image_prompts: tuple[ImagePrompt, ...]

    def reference_map(self, reference: int = 0, step: int | None = None, layer: str | None = None) -> np.ndarray:
        """Return what the point reads of one reference, [h, w] of the finest layer: the mean over steps and layers.

        Its sum is the share of attention that goes to this reference. step, layer: only this step, only layers whose
        names contain this. Raises InvalidRequest if nothing was recorded there.
        """
        values.whole_number("reference", reference, 0, max(len(self.references) - 1, 0))
        return _mean([one.references[reference] for one in _chosen(self.shared, step, layer)], spread=True)

    def own_map(self, step: int | None = None, layer: str | None = None) -> np.ndarray:
        """Return what the point reads of its own picture, as `reference_map`; zeros in swap mode."""
        found = [
            np.zeros_like(one.references[0]) if one.own is None else one.own
            for one in _chosen(self.shared, step, layer)
        ]
        return _mean(found, spread=True)

    def image_prompt_map(self, step: int | None = None, layer: str | None = None) -> np.ndarray:
        """Return the share, 0 to 1, that image prompts have at each point, [h, w]: the mean over steps and layers."""
        return _mean([one.share for one in _chosen(self.image_prompts, step, layer)], spread=False)

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write PNG overlays and `index.html`, which shows them; return the page's path.

        Raises InvalidRequest if the folder has a page already and overwrite is False.
        """
        folder = values.path("folder", folder)
        page = folder / "index.html"
        if page.exists() and not values.flag("overwrite", overwrite):
            raise InvalidRequest(f"{page} exists already; give another folder, or overwrite=True")
        folder.mkdir(parents=True, exist_ok=True)

        def figure(name: str, picture: Image.Image, caption: str, is_reference: bool = False) -> Figure:
            stream = io.BytesIO()
            picture.save(stream, "PNG")
            write_whole(folder / f"{name}.png", stream.getvalue())
            return Figure(f"{name}.png", caption, is_reference)

        sections = [section for section in (self._shared_section(figure), self._image_section(figure)) if section]
        x, y = self.point
        text = f"What the point ({x}, {y}) read while the picture was made. Bright is much; each map has its own scale."
        write_whole(page, html_page("Explained picture", text, sections, _SHOWN_SIDE).encode())
        return page

    def _shared_section(self, figure: Callable[..., Figure]) -> Section | None:
        if not self.shared:
            return None
        picture = figure("picture", marked(_shown(self.image), self.point, self.image.size), "the point")
        own = self.own_map()
        figures = [picture, figure("own", overlay(self.image, own), f"{_percent(own)} of its own picture")]
        rows = []
        for i in range(len(self.references)):
            whole = self.reference_map(i)
            caption = f"{_percent(whole)} of reference {i + 1}"
            figures.append(figure(f"reference-{i + 1}", overlay(self._shown_reference(i), whole), caption, True))
            for title, parts in _parts(self.shared):
                found = []
                for name, caption, chosen in parts:
                    part = self.reference_map(i, **chosen)
                    shown = overlay(self._shown_reference(i), part)
                    found.append(figure(f"reference-{i + 1}-{name}", shown, f"{caption}: {_percent(part)}"))
                rows.append(Row(f"Reference {i + 1}, {title}", tuple(found), ""))
        text = "Shared self-attention, averaged over heads, and over steps and layers where none is named."
        return Section("What the point read", text, (Row("All steps and layers", tuple(figures), ""), *rows))

    def _shown_reference(self, i: int) -> Image.Image:
        return self.references[i] or Image.new("RGB", self.image.size, (96, 96, 96))

    def _image_section(self, figure: Callable[..., Figure]) -> Section | None:
        if not self.image_prompts:
            return None
        whole = self.image_prompt_map()
        first = figure("image-prompt", overlay(self.image, whole, 0, 1), f"{whole.mean():.0%} on average")
        rows = [Row("All steps and layers", (first,), "")]
        for title, parts in _parts(self.image_prompts):
            found = []
            for name, caption, chosen in parts:
                part = self.image_prompt_map(**chosen)
                found.append(
                    figure(f"image-prompt-{name}", overlay(self.image, part, 0, 1), f"{caption}: {part.mean():.0%}")
                )
            rows.append(Row(title, tuple(found), ""))
        text = "Share of the cross-attention's output that comes from image prompts: dark 0 %, bright 100 %."
        return Section("Where image prompts act", text, tuple(rows))


def overlay(picture: Image.Image, heat: np.ndarray, low: float | None = None, high: float | None = None) -> Image.Image:
    """Return a picture in grey with a map [h, w] over it in colour; low, high: ends of the scale, or the map's own."""
    shown = _shown(picture)
    low, high = float(heat.min()) if low is None else low, float(heat.max()) if high is None else high
    grey = ((heat - low) / max(high - low, 1e-30)).clip(0, 1) * 255
    large = Image.fromarray(grey.round().astype(np.uint8)).resize(shown.size, Image.Resampling.BICUBIC)
    warm = ImageOps.colorize(large, black=_COLD, mid=_WARM, white=_HOT)
    return Image.blend(ImageOps.grayscale(shown).convert("RGB"), warm, 0.65)


def marked(picture: Image.Image, point: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """Return a copy with a ring around a point of a picture of `size`."""
    found = picture.copy()
    draw = ImageDraw.Draw(found)
    x, y = ((place + 0.5) * shown / side for place, shown, side in zip(point, picture.size, size, strict=True))
    radius = max(picture.size) / 32
    for colour, width, extra in ((_CONTOUR, 5, 1), (_CROSS, 3, 0)):
        reach = radius + extra
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=colour, width=width)
    return found


def _shown(picture: Image.Image) -> Image.Image:
    """Return a picture of at least the size that pages show, in whole multiples so that pixels stay square."""
    factor = -(-_SHOWN_SIDE // max(picture.size))
    return picture.convert("RGB") if factor <= 1 else ImageOps.scale(picture, factor, Image.Resampling.NEAREST)


def _parts(maps: Sequence) -> Iterator[tuple[str, list[tuple[str, str, dict[str, Any]]]]]:
    """Yield what a page shows of maps: a title, and of every picture its file's name, its caption and what it is of."""
    steps = _distinct(one.step for one in maps)
    few = steps[:: -(-len(steps) // _MOST_STEPS)]
    title = "by step" if len(few) == len(steps) else f"by step, {len(few)} of {len(steps)}"
    yield title, [(f"step-{step}", f"step {step}", {"step": step}) for step in few]
    modules = _distinct(one.layer.rpartition(".transformer_blocks.")[0] for one in maps)
    yield "by block", [(module, module, {"layer": f"{module}."}) for module in modules]


def _chosen(maps: Sequence, step: int | None, layer: str | None) -> list:
    found = [one for one in maps if step in (None, one.step) and (layer is None or layer in f"{one.layer}.")]
    if not found:
        steps, layers = _distinct(one.step for one in maps), _distinct(one.layer for one in maps)
        raise InvalidRequest(
            f"nothing was recorded for step={step}, layer={values.quoted(layer)}; there are steps "
            f"{values.listed(list(map(str, steps)))} and layers {values.listed(layers)}"
        )
    return found


def _mean(maps: Sequence[np.ndarray], spread: bool) -> np.ndarray:
    """Return the mean of maps in the finest one's size; spread: keep the sums of coarser maps, instead of values."""
    height, width = max((one.shape for one in maps), key=lambda shape: shape[0] * shape[1])
    total = np.zeros((height, width))
    for one in maps:
        fine = np.asarray(Image.fromarray(one.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
        total += fine * (float(one.sum()) / max(float(fine.sum()), 1e-30)) if spread else fine
    return total / len(maps)


def _percent(heat: np.ndarray) -> str:
    return f"{heat.sum():.0%}"


def _distinct(entries) -> list:
    return list(dict.fromkeys(entries))
