"""Optimisation profiles: the sizes that a TensorRT engine accepts, and those that it is tuned for.

Written as text, one profile is

    rows=1:4:8,size=512x512:1024x1024:1024x1536,pages=1:2:8

with the least, usual and most of each; a single number fixes the dimension. `size` is a picture's width x height in
pixels, `latents` the same in latent elements. Omitted values follow from the rest (`Profile`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType

from stylefast.errors import InvalidRequest
from stylefast.export.unet_graph import DIMENSIONS, Tensor
from stylefast.values import quoted

LATENT_PIXELS = 8  # width in pixels of one of SDXL's latent elements

# dims (least, usual, most) of every input with varying dims
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Range:
    """Least, usual and most of a dimension. Raises InvalidRequest unless 1 <= least <= usual <= most."""

    least: int
    usual: int
    most: int

    def __post_init__(self):
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in self)
        if not whole or not 1 <= self.least <= self.usual <= self.most:
            raise InvalidRequest(f"the range {self} is none: it takes whole numbers with 1 <= least <= usual <= most")

    def __str__(self) -> str:
        return f"{self.least}:{self.usual}:{self.most}"

    def __iter__(self):
        return iter((self.least, self.usual, self.most))


def _fixed(size: int) -> Range:
    return Range(size, size, size)


@dataclass(frozen=True)
class Profile:
    """Ranges of one profile; `height` and `width` are latent elements, `image_tokens` those of one picture.

    A count of None follows from the rows: per row, at most one text page, two pictures, and one mask per picture.
    Raises InvalidRequest for ranges outside those that graphs are exported for (`unet_graph.DIMENSIONS`).
    """

    rows: Range = Range(1, 4, 8)
    height: Range = _fixed(128)
    width: Range = _fixed(128)
    text_pages: Range | None = None
    image_pages: Range | None = None
    image_tokens: Range = Range(1, 4, 16)
    masks: Range | None = None
    pages: Range = Range(1, 1, 8)

    def __post_init__(self):
        usual, most = self.rows.usual, self.rows.most
        follow = {
            "text_pages": Range(1, usual, most),
            "image_pages": Range(1, usual, 2 * most),
            "masks": Range(1, 1, 2 * most),
        }
        for name, found in follow.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, found)
        for name, (low, high) in DIMENSIONS.items():
            found = getattr(self, name)
            if not isinstance(found, Range):
                raise InvalidRequest(f"{name} of a profile is {quoted(found)}; it must be a Range")
            if found.least < low or found.most > high:
                raise InvalidRequest(f"{name}={found} of a profile is not within {low} to {high}")

    @classmethod
    def parse(cls, text: str, scale: int = LATENT_PIXELS) -> "Profile":
        """Parse the text that the module describes. Raises InvalidRequest, naming the part that can't be read.

        scale: width in pixels of the model's latent elements.
        """
        given: dict[str, Range] = {}
        known = [*DIMENSIONS, "size", "latents"]
        for part in text.split(","):
            name, _, numbers = (piece.strip() for piece in part.partition("="))
            if name not in known or not numbers:
                raise InvalidRequest(
                    f"{quoted(part.strip())} in the profile {quoted(text)} is not understood; write "
                    f"name=least:usual:most, with the names {', '.join(known)}"
                )
            if name in ("size", "latents"):
                unit = scale if name == "size" else 1
                pairs = [_pair(size, part, unit) for size in numbers.split(":")]
                found = {"width": _range([w for w, _ in pairs], part), "height": _range([h for _, h in pairs], part)}
            else:
                found = {name: _range([_number(n, part) for n in numbers.split(":")], part)}
            twice = sorted(given.keys() & found.keys())
            if twice:
                raise InvalidRequest(f"the profile {quoted(text)} says {twice[0]} twice")
            given |= found
        return cls(**given)

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    def to_dict(self) -> dict[str, list[int]]:
        """Return dimension -> [least, usual, most], the manifest's form."""
        return {field.name: list(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Sequence[int]]) -> "Profile":
        """Return the profile from the result of `to_dict`."""
        return cls(**{name: Range(*numbers) for name, numbers in found.items()})

    def sizes(self, attention_sizes: Callable[[int, int], Sequence[tuple[int, int]]] | None = None) -> list[dict]:
        """Return the least, usual and most sizes, by the names of dimensions.

        attention_sizes: of the UNet; adds the token counts of attention levels.
        """
        corners = []
        for corner in range(3):
            sizes = {field.name: tuple(getattr(self, field.name))[corner] for field in fields(self)}
            if attention_sizes is not None:
                maps = attention_sizes(sizes["height"], sizes["width"])
                sizes |= {f"tokens_{level}": h * w for level, (h, w) in enumerate(maps)}
            corners.append(sizes)
        return corners

    def shapes(
        self,
        inputs: Sequence[Tensor],
        attention_sizes: Callable[[int, int], Sequence[tuple[int, int]]] | None = None,
        more: Mapping[str, tuple[int, int, int]] = MappingProxyType({}),
    ) -> Shapes:
        """Return the least, usual and most shape of every input with a varying dimension.

        inputs: from `unet_graph.graph_inputs`, or of another component's graph. attention_sizes: see `sizes`. more:
        ranges of dimensions that no profile has, such as those of `unet_graph.shape_ranges`.
        """
        added = ({name: numbers[corner] for name, numbers in more.items()} for corner in range(3))
        corners = [sizes | one for sizes, one in zip(self.sizes(attention_sizes), added)]
        found: Shapes = {}
        for tensor in inputs:
            missing = [dim for dim in tensor.dims if isinstance(dim, str) and dim not in corners[0]]
            if missing:
                raise InvalidRequest(
                    f"{tensor.name} has a dimension {quoted(missing[0])}, of which profiles know nothing"
                )
            if any(isinstance(dim, str) for dim in tensor.dims):
                least, usual, most = (tensor.shape(sizes) for sizes in corners)
                found[tensor.name] = (least, usual, most)
        return found


def _number(text: str, part: str) -> int:
    if not text.strip().isdecimal():
        raise InvalidRequest(f"{quoted(text.strip())} in {quoted(part.strip())} is no whole number")
    return int(text)


def _pair(text: str, part: str, unit: int) -> tuple[int, int]:
    """Return width and height in latent elements."""
    sides = text.lower().split("x")
    if len(sides) != 2:
        raise InvalidRequest(
            f"{quoted(text.strip())} in {quoted(part.strip())} is no size; write width x height, as 1024x768"
        )
    found = tuple(_number(side, part) for side in sides)
    if any(side % unit for side in found):
        raise InvalidRequest(f"{quoted(text.strip())} in {quoted(part.strip())} must be multiples of {unit} pixels")
    return found[0] // unit, found[1] // unit


def _range(numbers: list[int], part: str) -> Range:
    if len(numbers) not in (1, 3):
        raise InvalidRequest(f"{quoted(part.strip())} has {len(numbers)} values; write one, or least:usual:most")
    return Range(*(numbers if len(numbers) == 3 else numbers * 3))
