"""Checks of the arguments of `Engine.generate` and `submit`."""

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from stylefast import values
from stylefast.errors import InvalidRequest
from stylefast.runtime.plan.request import Request

OUTPUTS = ("pil", "np", "latents")
MOST_REQUESTS = 1000  # of a call


def check_output(name: str) -> None:
    """Raise InvalidRequest for an unknown kind of output."""
    values.one_of("output", name, OUTPUTS)


def check_deadline(seconds: float | None) -> float | None:
    """Return a number of seconds above 0, or None. Raises InvalidRequest."""
    return None if seconds is None else values.real_number("deadline", seconds, above=0, also=(math.inf,))


def prompts_of(given: Any) -> list:
    """Return a call's prompts, one text or `Request` or an iterable of them, as a list. Raises InvalidRequest."""
    if isinstance(given, (str, Request)):
        return [given]
    if isinstance(given, (bytes, bytearray, Mapping)) or not isinstance(given, Iterable) or _is_scalar(given):
        raise InvalidRequest(f"prompts is {values.quoted(given)}; give a text, a Request, or a list of them")
    several = values.entries(given)
    prompts = list(islice(given if several is None else several, MOST_REQUESTS + 1))
    if len(prompts) > MOST_REQUESTS:
        raise InvalidRequest(f"prompts has more than {MOST_REQUESTS} entries; make several calls of it")
    if not prompts:
        raise InvalidRequest("no prompt was given; pass one or several")
    return prompts


def _is_scalar(given) -> bool:
    # 0-d arrays are instances of Iterable but can't be iterated
    return getattr(given, "ndim", 1) == 0


def as_list(value: Any) -> list:
    """Return None, one value or several as a list."""
    several = values.entries(value)
    return several if several is not None else [] if value is None else [value]
