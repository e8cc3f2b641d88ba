"""Options for control pictures and the networks that follow them."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stylefast.commands.model_options import flag, named_part, split_numbers
from stylefast.errors import InvalidRequest
from stylefast.values import did_you_mean, listed, quoted

_INTERVAL = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*-\s*(\d+\.?\d*|\.\d+)\s*")


def add_control_arguments(group: Callable[..., Any]) -> None:
    """Add the options for control pictures, with `group`, an `add_argument`."""
    group(
        "--control",
        action="append",
        metavar="[NAME=]PICTURE[:WEIGHT]",
        help=(
            "a picture, such as edges or depth, that a control network follows, at this weight (default: 1); NAME is "
            "the network's, if there are several; may be repeated"
        ),
    )
    group(
        "--control-mode",
        action="append",
        metavar="TYPE",
        help=(
            "the type of a picture that a union network reads, as a name or number: canny, depth, openpose ...; one "
            "for all pictures, or one for each, in their order"
        ),
    )
    group("--control-window", metavar="A-B", help="fractions of the steps in which they act (default: 0-1)")
    group(
        "--guess-mode",
        action="store_true",
        default=None,
        help="let the control pictures decide more than the prompt; for ControlNets",
    )
    group(
        "--control-reference",
        metavar="none|same|PICTURE",
        help="what steers the style's reference: nothing, the same pictures, or one of its own (default: none)",
    )
    add_control_net(group)


def add_control_net(group: Callable[..., Any]) -> None:
    """Add the option for control networks, with `group`, an `add_argument`."""
    group(
        "--control-net",
        action="append",
        metavar="[NAME=]PATH",
        help=(
            "a ControlNet or T2I-Adapter for SDXL that control pictures can use: a folder, a .safetensors file, or the "
            "name of one that comes with the model; may be repeated"
        ),
    )


def controls_of(arguments: argparse.Namespace, model_folder: Path) -> list:
    """Return the control pictures. Raises InvalidRequest and ImageError."""
    from stylefast.record_values import find_picture
    from stylefast.runtime.plan.control import NONE, SAME, Control

    shared: dict[str, Any] = {}
    if arguments.control_window is not None:
        shared["window"] = parse_interval(arguments.control_window, "--control-window")
    if arguments.guess_mode is not None:
        shared["guess_mode"] = True
    if arguments.control_reference is not None:
        given = arguments.control_reference
        shared["reference"] = given if given in (NONE, SAME) else find_picture(given, model_folder)
    if arguments.control is None:
        for name in ("control_mode", "control_window", "guess_mode", "control_reference"):
            if getattr(arguments, name) is not None:
                raise InvalidRequest(f"{flag(name)} says how a control picture acts; give it as --control")
        return []
    found, modes = [], _modes(arguments.control_mode, len(arguments.control))
    for text, mode in zip(arguments.control, modes, strict=True):
        text, weights = split_numbers("--control", text, 1)
        name, path = named_part("--control", text)
        picture = find_picture(path, model_folder)
        weight = weights[0] if weights else 1.0
        found.append(Control(picture, name, weight, mode=mode, **shared))
    return found


def _modes(given: Sequence[str] | None, pictures: int) -> list[str | int | None]:
    """Return the type of each control picture, None where it has none. Raises InvalidRequest for another number."""
    modes: list[str | int | None] = [int(mode) if mode.isdecimal() else mode for mode in given or ()]
    if len(modes) not in (0, 1, pictures):
        raise InvalidRequest(
            f"{flag('control_mode')} is given {len(modes)} times for {pictures} control pictures; give one for all, or "
            "one for each"
        )
    return (modes or [None]) * pictures if len(modes) < 2 else modes


def check_controls(requests: Sequence, names: Sequence[str]) -> None:
    """Raise InvalidRequest for control pictures without a network, and for networks that none uses."""
    controls = [control for request in requests for control in request.controls]
    for control in controls:
        if not names:
            raise InvalidRequest(
                "a control picture needs the network that reads it; give it with --control-net FOLDER, or in a request "
                'file as "controls": {"lines": "folder"}'
            )
        if control.network is None and len(names) > 1:
            raise InvalidRequest(
                f"there are several control networks ({listed(names)}); name one: --control NAME=PICTURE"
            )
        if control.network is not None and control.network not in names:
            raise InvalidRequest(
                f"no control network is called {quoted(control.network)}; there are: {listed(names)}"
                f"{did_you_mean(control.network, names)}. Give it with --control-net {quoted(control.network)}=FOLDER"
            )
    used = {control.network or names[0] for control in controls}
    unused = [name for name in names if name not in used]
    if unused:
        raise InvalidRequest(
            f"no control picture is for the network {quoted(unused[0])}; drop its --control-net, or give --control"
        )


def parse_interval(text: str, option: str = "--guidance-interval") -> tuple[float, float]:
    """Return (0.0, 0.8) for "0-0.8". Raises InvalidRequest."""
    match = _INTERVAL.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"{option} is {quoted(text)}; give two fractions of the steps, such as 0-0.8")
    return float(match[1]), float(match[2])
