"""From command-line options to styles; an option that the chosen method has no use for is an error."""

import argparse
import json
from pathlib import Path

from stylefast.errors import InvalidRequest

_ALIGNED = ("style_prompt", "adain", "shift", "layers", "share_group_norm")
_INSTANT = ("blocks", "content", "content_scale")


def styles_of(arguments: argparse.Namespace, model_folder: Path) -> list:
    """The styles that the options ask for, possibly none. Raises InvalidRequest, StyleError and ImageError."""
    from stylefast.models.pictures import open_picture
    from stylefast.record_values import find_picture

    pictures = [find_picture(text, model_folder) for text in arguments.style_image or []]
    for picture in pictures:
        open_picture(picture)
    method = _method(arguments)
    _check_options(arguments, method)
    styles = []
    if method in ("aligned", "both"):
        styles.append(_aligned(arguments, pictures, with_scale=method == "aligned"))
    if method in ("instant", "both"):
        styles.append(_instant(arguments, pictures))
    return styles + _learned(arguments, model_folder)


def _method(arguments: argparse.Namespace) -> str | None:
    has_picture, has_prompt = bool(arguments.style_image), arguments.style_prompt is not None
    if arguments.method in ("instant", "both") and not has_picture:
        raise InvalidRequest(f"--method {arguments.method} needs a picture; give --style-image photo.jpg")
    return arguments.method or ("aligned" if has_picture or has_prompt else None)


def _check_options(arguments: argparse.Namespace, method: str | None) -> None:
    unused = [] if method in ("aligned", "both") else [(name, "aligned") for name in _ALIGNED]
    unused += [] if method in ("instant", "both") else [(name, "instant") for name in _INSTANT]
    unused += [("scale", "instant")] if method is None else []
    for name, wanted in unused:
        if getattr(arguments, name) is not None:
            picture = "" if arguments.style_image else " and a --style-image"
            raise InvalidRequest(f"--{name.replace('_', '-')} does nothing here; it needs --method {wanted}{picture}")
    if arguments.content_scale is not None and arguments.content is None:
        raise InvalidRequest("--content-scale says how much of --content is subtracted; give --content as well")
    if arguments.context is not None and not arguments.learned:
        raise InvalidRequest("--context belongs to a learned style; give --learned as well")


def _aligned(arguments: argparse.Namespace, pictures: list[str], with_scale: bool):
    from stylefast.styles.style_aligned import StyleAligned

    given = {
        "reference": pictures[0] if len(pictures) == 1 else pictures or None,
        "prompt": arguments.style_prompt,
        "adain": None if arguments.adain is None else parse_adain(arguments.adain),
        "scale": arguments.scale if with_scale else None,
        "shift": arguments.shift,
        "layers": _names(arguments.layers),
        "share_group_norm": arguments.share_group_norm,
    }
    return StyleAligned(**{name: value for name, value in given.items() if value is not None})


def _instant(arguments: argparse.Namespace, pictures: list[str]):
    from stylefast.styles.instant_style import InstantStyle

    given = {
        "blocks": None if arguments.blocks is None else parse_blocks(arguments.blocks),
        "scale": arguments.scale,
        "content": arguments.content,
        "content_scale": arguments.content_scale,
    }
    image = pictures[0] if len(pictures) == 1 else pictures
    return InstantStyle(image, **{name: value for name, value in given.items() if value is not None})


def _learned(arguments: argparse.Namespace, model_folder: Path) -> list:
    from stylefast.record_values import find_learned
    from stylefast.styles.dream_styler import DreamStyler

    sources = [find_learned(text, model_folder) for text in arguments.learned or []]
    # one context serves all learned styles of a prompt
    return [DreamStyler(source, context=arguments.context if i == 0 else None) for i, source in enumerate(sources)]


def parse_adain(text: str) -> tuple[str, ...] | dict[str, float]:
    """ "q,k", "q=1,k=0.5" or "none". Raises InvalidRequest."""
    if text.strip() == "none":
        return ()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not any("=" in part for part in parts):
        return tuple(parts)
    try:
        return {name.strip(): float(value) for name, value in (part.split("=") for part in parts)}
    except ValueError as error:
        raise InvalidRequest(f"--adain is {text!r}; write q,k or q=1,k=0.5 or none") from error


def parse_blocks(text: str) -> str | list[str] | dict:
    """A preset's name, a JSON object in diffusers' format, or parts of layer names. Raises InvalidRequest."""
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise InvalidRequest(f"--blocks is no JSON object ({error})") from error
    return _names(text) if "_block" in text else text


def _names(text: str | None) -> str | list[str] | None:
    if text is None or text == "all":
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
