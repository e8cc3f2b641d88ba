"""Control pictures from ordinary ones: edges by OpenCV, and what the package controlnet-aux makes."""

from typing import Any

import numpy as np
from PIL import Image

from stylefast import values
from stylefast.errors import InvalidRequest, MissingDependency
from stylefast.models.pictures import PictureSource, open_picture


def canny(picture: PictureSource, low: float = 100, high: float = 200) -> Image.Image:
    """Return the edges of a picture, white on black, in its size, by Canny's method (1986) as OpenCV has it.

    Args:
        picture: a path, bytes, a PIL image or an array.
        low, high: thresholds of the gradient, 0 to 1000: an edge begins where it is above `high` and goes on as long as
            it is above `low`.

    Raises MissingDependency without OpenCV, ImageError for a picture that can't be read, InvalidRequest for thresholds
    out of range.
    """
    low, high = (values.real_number(name, value, 0, 1000) for name, value in (("low", low), ("high", high)))
    if low > high:
        raise InvalidRequest(f"low is {low:g} and high {high:g}; low must not be above high")
    try:
        import cv2
    except ImportError:
        raise MissingDependency(
            "canny needs OpenCV, which is not installed: pip install 'stylefast[control]'; or give a picture of edges"
        ) from None
    found = cv2.Canny(np.ascontiguousarray(open_picture(picture)), low, high)
    return Image.fromarray(found).convert("RGB")


def preprocess(picture: PictureSource, kind: str) -> Image.Image:
    """Return the control picture of a kind, such as edges or depth, in the picture's size.

    Args:
        picture: a path, bytes, a PIL image or an array.
        kind: "canny", or a processor of controlnet-aux by its own name, such as "depth_midas", "lineart_realistic",
            "openpose" or "softedge_pidinet"; that package downloads their weights when they are first used.

    Raises MissingDependency without the package that a kind needs, InvalidRequest for an unknown kind, ImageError for a
    picture that can't be read.
    """
    kind = values.text("kind", kind, longest=values.QUOTED, empty=False)
    if kind == "canny":
        return canny(picture)
    try:
        from controlnet_aux import processor
    except ImportError:
        raise MissingDependency(
            f"the preprocessor {values.quoted(kind)} needs controlnet-aux, which is not installed: pip install "
            "controlnet-aux; canny needs only stylefast[control]"
        ) from None
    known: dict[str, Any] = processor.MODELS
    if kind not in known:
        raise InvalidRequest(
            f"kind is {values.quoted(kind)}; it must be one of {values.listed(['canny', *known])}"
            f"{values.did_you_mean(kind, known)}"
        )
    opened = open_picture(picture)
    return processor.Processor(kind)(opened).convert("RGB").resize(opened.size)
