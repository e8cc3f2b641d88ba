"""Styles from command-line options; an option that the chosen method does not use is an error."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stylefast.errors import InvalidRequest, StyleError
from stylefast.values import load_json, quoted, shown_path, typed_path

_ALIGNED = ("style_prompt", "adain", "shift", "layers", "share_group_norm", "mode", "calibrate")
_INSTANT = ("blocks", "content", "content_scale", "clean", "clean_negative")


def styles_of(arguments: argparse.Namespace, model_folder: Path) -> list:
    """Return the styles that the options select, possibly none. Raises InvalidRequest, StyleError and ImageError."""
    pictures = find_pictures(arguments.style_image, model_folder)
    methods = _methods(arguments)
    _check_options(arguments, methods)
    bank = _bank(arguments.style[0]) if arguments.style else None
    styles = []
    if "aligned" in methods:
        styles.append(_aligned(arguments, pictures, bank, with_scale="instant" not in methods))
    if "instant" in methods:
        styles.append(_instant(arguments, pictures))
    return styles + _learned(arguments, model_folder)


def find_pictures(given: Sequence[str] | None, model_folder: Path) -> list[str]:
    """Return the paths of the pictures that --style-image names. Raises StyleError for a style bank, ImageError."""
    from stylefast.models.pictures import open_picture
    from stylefast.record_values import find_picture, is_bank

    pictures = []
    for text in given or []:
        if is_bank(text):
            raise StyleError(f"--style-image is {text}, which is a style bank; use --style {text} with `generate`")
        pictures.append(find_picture(text, model_folder))
        open_picture(pictures[-1])
    return pictures


def bank_settings(styles: Sequence, given: Mapping) -> dict:
    """Return the request settings required by a style bank among `styles`; {} without a bank.

    given: the settings that the user chose. Raises StyleError naming the first of them that the bank does not fit.
    """
    bank = next((style.bank for style in styles if getattr(style, "bank", None) is not None), None)
    if bank is None:
        return {}
    bank.check_fits(**{name: given[name] for name in ("scheduler", "steps", "size") if name in given})
    if "guidance" in given:
        bank.check_fits(branches=("null", "full") if given["guidance"] > 1 else ("full",))
    # a bank without a null branch can't serve guidance
    return ({} if "null" in bank.info.branches else {"guidance": 1.0}) | bank.settings


def _methods(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the requested methods, among "aligned" and "instant"."""
    has_picture, has_prompt = bool(arguments.style_image), arguments.style_prompt is not None
    if arguments.style:
        return _methods_beside_bank(arguments)
    if arguments.method in ("instant", "both") and not has_picture:
        raise InvalidRequest(f"--method {arguments.method} needs a picture; give --style-image photo.jpg")
    if arguments.method == "both":
        return ("aligned", "instant")
    return (arguments.method,) if arguments.method else ("aligned",) if has_picture or has_prompt else ()


def _methods_beside_bank(arguments: argparse.Namespace) -> tuple[str, ...]:
    if len(arguments.style) > 1:
        raise InvalidRequest(f"--style was given {len(arguments.style)} times; a call can use only one style bank")
    if arguments.style_prompt is not None:
        raise InvalidRequest(
            "--style-prompt generates a reference, but --style already has a baked one; drop one of them"
        )
    if arguments.method == "both":
        raise InvalidRequest(
            "--style replaces the reference of --method aligned; to use a picture as a prompt, give --method instant"
        )
    if arguments.method == "instant" and not arguments.style_image:
        raise InvalidRequest("--method instant needs a picture as well as --style; give --style-image photo.jpg")
    if arguments.style_image and arguments.method != "instant":
        raise InvalidRequest(
            "--style-image with --style needs --method instant; --style is the reference of --method aligned"
        )
    return ("aligned", "instant") if arguments.method == "instant" else ("aligned",)


def _bank(text: str):
    from stylefast.models.pictures import SUFFIXES
    from stylefast.styles.bank import StyleBank

    path = typed_path("--style", text, error=StyleError)
    if path.suffix.lower() in SUFFIXES:
        raise StyleError(
            f"--style is {shown_path(path)}, a picture; use --style-image, or bake it: stylefast bake --style-image"
        )
    return StyleBank.load(path)


def _check_options(arguments: argparse.Namespace, methods: tuple[str, ...]) -> None:
    unused = [] if "aligned" in methods else [(name, "aligned") for name in _ALIGNED]
    unused += [] if "instant" in methods else [(name, "instant") for name in _INSTANT]
    unused += [] if methods else [("scale", "instant")]
    for name, wanted in unused:
        if getattr(arguments, name) is not None:
            picture = "" if arguments.style_image else " and a --style-image"
            raise InvalidRequest(f"--{name.replace('_', '-')} has no effect here; it needs --method {wanted}{picture}")
    if arguments.content_scale is not None and arguments.content is None:
        raise InvalidRequest("--content-scale sets how much of --content is subtracted; give --content as well")
    if arguments.clean_negative is not None and arguments.clean is None:
        raise InvalidRequest("--clean-negative is a part of --clean; give that as well")
    if arguments.weights is not None and len(arguments.style_image or ()) < 2:
        raise InvalidRequest("--weights weights several reference pictures; give more than one --style-image")
    if arguments.context is not None and not arguments.learned:
        raise InvalidRequest("--context applies to a learned style; give --learned as well")
    if arguments.share is not None and arguments.towards is None:
        raise InvalidRequest("--share says how far a learned style is turned --towards another; give that as well")
    if arguments.towards is not None and len(arguments.learned or ()) != 1:
        raise InvalidRequest("--towards turns one learned style towards another; give one --learned")


def _aligned(arguments: argparse.Namespace, pictures: list[str], bank, with_scale: bool):
    from stylefast.styles.style import style_of_option

    given = {
        "reference": bank if bank is not None else one_or_all(pictures),
        "prompt": arguments.style_prompt,
        "adain": None if arguments.adain is None else parse_adain(arguments.adain),
        "scale": arguments.scale if with_scale else None,
        "shift": arguments.shift,
        "layers": parse_names(arguments.layers),
        "share_group_norm": arguments.share_group_norm,
        "mode": arguments.mode,
        "calibrate": arguments.calibrate,
        "weights": parse_weights(arguments.weights),
    }
    return style_of_option("aligned")(**{name: value for name, value in given.items() if value is not None})


def _instant(arguments: argparse.Namespace, pictures: list[str]):
    from stylefast.styles.style import style_of_option

    given = {
        "blocks": None if arguments.blocks is None else parse_blocks(arguments.blocks),
        "scale": arguments.scale,
        "content": arguments.content,
        "content_scale": arguments.content_scale,
        "clean": _clean(arguments),
        "weights": parse_weights(arguments.weights),
    }
    given = {name: value for name, value in given.items() if value is not None}
    return style_of_option("instant")(one_or_all(pictures), **given)


def _learned(arguments: argparse.Namespace, model_folder: Path) -> list:
    from stylefast.record_values import find_learned
    from stylefast.styles.style import style_of_option

    sources = [find_learned(text, model_folder) for text in arguments.learned or []]
    # the first style's context serves all learned styles of a prompt
    learned = style_of_option("learned")
    between: dict[str, Any] = {}
    if arguments.towards is not None:
        between["towards"] = find_learned(arguments.towards, model_folder)
    if arguments.share is not None:
        between["share"] = arguments.share
    return [
        learned(source, context=arguments.context if i == 0 else None, **between) for i, source in enumerate(sources)
    ]


def _clean(arguments: argparse.Namespace) -> Any:
    from stylefast.styles.clean_style import CleanStyle

    if arguments.clean is None:
        return None
    given = {} if arguments.clean_negative is None else {"negative": arguments.clean_negative}
    return CleanStyle(strength=arguments.clean, **given)


def parse_weights(text: str | None) -> tuple[float, ...] | None:
    """Return (3.0, 1.0) for "3,1". Raises InvalidRequest."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InvalidRequest(f"--weights is {quoted(text)}; it must be numbers, e.g. 3,1") from None


def parse_adain(text: str) -> tuple[str, ...] | dict[str, float]:
    """Parse "q,k", "q=1,k=0.5" or "none". Raises InvalidRequest."""
    if text.strip() == "none":
        return ()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not any("=" in part for part in parts):
        return tuple(parts)
    try:
        return {name.strip(): float(value) for name, value in (part.split("=") for part in parts)}
    except ValueError as error:
        raise InvalidRequest(f"--adain is {quoted(text)}; write q,k or q=1,k=0.5 or none") from error


def parse_blocks(text: str) -> str | list[str] | dict:
    """Parse a preset's name, a JSON object in diffusers' format, or parts of layer names. Raises InvalidRequest."""
    if text.lstrip().startswith("{"):
        return load_json(text, "--blocks", kind=dict)
    return (parse_names(text) if "_block" in text else None) or text


def one_or_all(pictures: list[str]) -> str | list[str] | None:
    """Return a style's picture: the only one, the list of several, or None."""
    return pictures[0] if len(pictures) == 1 else pictures or None


def parse_names(text: str | None) -> str | list[str] | None:
    """Return parts of layer names from "up_blocks,mid_block"; "all" and None as they are."""
    if text is None or text == "all":
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
