"""The result of a call, and the combination of several errors into one."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from stylefast.errors import NumericsError
from stylefast.runtime.core import not_finite


@dataclass(frozen=True, eq=False)
class Result:
    """Result of `Engine.generate`, in the order of the prompts.

    `images`: PIL images, or for output="np" float arrays [height, width, 3] in 0..1, or empty for "latents". `latents`:
    per picture [channels, h, w] fp32, before the VAE. `metadata`: per picture, enough to make it again.
    """

    images: list
    latents: list[torch.Tensor]
    metadata: list[dict] = field(repr=False)


def joined(errors: Sequence[Exception]) -> Exception:
    """Return one error for a call with failed groups: the first, or one naming all pictures that are not finite."""
    if all(isinstance(error, NumericsError) for error in errors):
        return not_finite([picture for error in errors for picture in error.pictures])
    return errors[0]
