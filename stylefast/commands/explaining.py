"""`stylefast generate --explain X,Y`: a page of what a point of the picture read of its references."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stylefast.errors import InvalidRequest
from stylefast.values import quoted

if TYPE_CHECKING:
    from stylefast.engine import Engine
    from stylefast.explanation import Explanation
    from stylefast.runtime.plan.request import Request

_POINT = re.compile(r"\s*(\d{1,5})\s*,\s*(\d{1,5})\s*", re.ASCII)
_STEPS = re.compile(r"\d{1,4}(,\d{1,4})*", re.ASCII)


def add_explain_arguments(group: Callable[..., Any]) -> None:
    """Add the options, with `group`, an `add_argument`."""
    group(
        "--explain",
        metavar="X,Y",
        help="also write a page with what this point (in pixels) read of the reference, and where image prompts act; "
        "draws the picture once more",
    )
    group("--explain-layers", metavar="NAMES", help="with --explain: parts of layer names, up_blocks,mid_block")
    group("--explain-steps", metavar="NUMBERS", help="with --explain: 1,10,20 (default: all)")


def check_explain(arguments: argparse.Namespace, requests: Sequence["Request"]) -> None:
    """Raise InvalidRequest for options that make no sense, before anything is loaded."""
    from stylefast.styles.style import ImageStyle, ReferenceStyle

    if arguments.explain is None:
        for name in ("layers", "steps"):
            if getattr(arguments, f"explain_{name}") is not None:
                raise InvalidRequest(f"--explain-{name} needs --explain, the point to explain")
        return
    if len(requests) != 1:
        raise InvalidRequest(f"--explain shows one picture, and the call makes {len(requests)}; give one prompt")
    if not any(isinstance(style, (ReferenceStyle, ImageStyle)) for style in requests[0].styles):
        raise InvalidRequest("--explain shows what a picture reads of references and image prompts; give it a style")
    if _POINT.fullmatch(arguments.explain) is None:
        raise InvalidRequest(f"--explain is {quoted(arguments.explain)}; it must be X,Y in pixels, e.g. 512,300")
    if arguments.explain_steps is not None and _STEPS.fullmatch(arguments.explain_steps) is None:
        raise InvalidRequest(f"--explain-steps is {quoted(arguments.explain_steps)}; it must be numbers, e.g. 1,10,20")


def check_place(engine: "Engine", request: "Request", arguments: argparse.Namespace) -> None:
    """Raise InvalidRequest for a point outside of the picture, before it is made."""
    from stylefast.runtime.explaining import check_point
    from stylefast.runtime.plan.sample import enlarged

    point = _POINT.fullmatch(arguments.explain or "")
    if point is not None:
        check_point((int(point[1]), int(point[2])), enlarged(request.size or engine.native_size, request.upscale))


def explain(engine: "Engine", request: "Request", arguments: argparse.Namespace, picture: Path) -> None:
    """Write the page beside a picture, if one is wanted, and print its path. Raises what `Engine.explain` raises."""
    if arguments.explain is None:
        return
    page, found = write_page(engine, request, arguments, picture)
    print(page)
    if not arguments.quiet and found.shared:
        shares = ", ".join(f"{found.reference_map(i).sum():.0%}" for i in range(len(found.references)))
        print(f"the point reads {shares} of its references, {found.own_map().sum():.0%} of itself", file=sys.stderr)


def write_page(
    engine: "Engine", request: "Request", arguments: argparse.Namespace, picture: Path
) -> tuple[Path, "Explanation"]:
    """Write the page into a folder beside a picture, named after it; return its path, and what it shows."""
    point = _POINT.fullmatch(arguments.explain)
    assert point is not None
    layers, steps = arguments.explain_layers, arguments.explain_steps
    found = engine.explain(
        request,
        (int(point[1]), int(point[2])),
        layers="all" if layers in (None, "all") else layers.split(","),
        steps=None if steps is None else [int(step) for step in steps.split(",")],
    )
    return found.save(picture.with_name(f"{picture.stem}-explained"), arguments.overwrite), found
