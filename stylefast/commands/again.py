"""`stylefast generate --from picture.png`: repeat the whole recorded call and keep this one picture."""

import argparse
import hashlib
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from stylefast.commands.control_options import check_controls
from stylefast.commands.explaining import check_explain, check_place, explain
from stylefast.commands.files import read_metadata
from stylefast.commands.generate import check_loras, check_schedules, destination_of, load, make, save
from stylefast.commands.model_options import (
    DEFAULT_MODEL,
    PATHS,
    RECORDED,
    ControlFile,
    Lora,
    ModelChoice,
    model_folder,
)
from stylefast.commands.notices import warn
from stylefast.engine import Result
from stylefast.errors import InvalidRequest, ModelError
from stylefast.models.checkpoint import TINY
from stylefast.models.masks import open_mask
from stylefast.models.pictures import open_picture
from stylefast.options import PREDICTION_TYPES
from stylefast.record import PICTURES, from_record
from stylefast.record_values import pixel_digest, shipped
from stylefast.values import quoted, shown, typed_path

_SHOWN = 600  # max characters of the picture's text quoted in a message


def run_again(arguments: argparse.Namespace) -> int:
    """Make the picture again and report whether its pixels are the same.

    All pictures of the call are made: another batch size would round differently, and a group's first picture is the
    reference of the others. Pictures are untrusted, so files that a picture names are loaded only if the user allows
    it. Raises ModelError if the model or LoRAs have other weights and --force is not given.
    """
    metadata, before = read_metadata(arguments.source)
    recorded = _recorded_choice(metadata)
    if not arguments.load_recorded:
        _check_asked_for(arguments, recorded, metadata)
    choice = replace(
        ModelChoice.of(arguments, recorded),
        row_lora=_row_loras(arguments, metadata),
        control_net=_control_nets(arguments, metadata),
    )
    if not arguments.load_recorded and _from_cache(arguments, recorded):
        choice = replace(choice, cached_only=True)  # never download files missing from the cache
    _check_loras(choice, metadata, arguments)
    call = _with_pictures(metadata["call"], arguments)
    requests = from_record(call, Path(arguments.source).expanduser().resolve().parent, choice.folder)
    check_schedules(requests)
    check_explain(arguments, requests)
    check_loras(requests, [lora.name for lora in choice.row_lora])
    check_controls(requests, [net.name for net in choice.control_net])
    place = metadata["index"]
    destination = destination_of(arguments, [requests[place].prompt])
    loaded = choice.recorded()
    engine = load(choice, arguments.quiet)
    if engine.fingerprint != metadata["fingerprint"]:
        _refuse_unless_forced(
            arguments,
            f"{choice.model} has different weights (fingerprint {engine.fingerprint[:12]}) than the model that made "
            f"{arguments.source} ({shown(metadata['fingerprint'][:12])})",
            "--model",
        )
    for name, file in _lora_files(metadata).items():
        if engine.loras[name].digest != file["sha256"]:
            _refuse_unless_forced(
                arguments,
                f"the LoRA {quoted(name)} has other content than the one that made {arguments.source}",
                "--lora",
            )
    for name, net in _net_files(metadata).items():
        if engine.controls[name].digest != net["sha256"]:
            _refuse_unless_forced(
                arguments,
                f"the control network {quoted(name)} has other weights than the one that made {arguments.source}",
                "--control-net",
            )
    check_place(engine, requests[place], arguments)
    result = make(engine, requests, arguments.quiet)
    now = result.metadata[place]
    for key in ("versions", "device", "dtype"):
        if now.get(key) != metadata.get(key):
            then = shown(metadata.get(key))
            warn(f"{key} differ: {shown(now.get(key))} now, {then} then; pixels may differ slightly")
    if not arguments.quiet:
        if before.info.get("lossy"):
            print(f"pixels not compared: {arguments.source} is a JPEG or WebP, which do not keep them", file=sys.stderr)
        else:
            print(_comparison(before, result.images[place], arguments.source), file=sys.stderr)
    kept = Result([result.images[place]], [result.latents[place]], [now])
    paths = save(destination, kept, loaded, arguments.grid)
    explain(engine, requests[place], arguments, paths[0])
    return 0


def _with_pictures(call: Mapping, arguments: argparse.Namespace) -> Mapping:
    """Return a recorded call with the files of options for pictures of which it has the digest alone.

    Raises InvalidRequest for a file that is none of them, ImageError for one that can't be read.
    """
    given = {}
    options = [("--style-image", file) for file in arguments.style_image or ()]
    options += [(f"--{name}", getattr(arguments, name)) for name in PICTURES if getattr(arguments, name) is not None]
    options += [("--control", file) for file in arguments.control or ()]
    for option, file in options:
        path = typed_path(option, file).absolute()
        opened = open_mask if option == "--mask" else open_picture
        given[pixel_digest(opened(path))] = f"{option} {quoted(file)}", {"path": str(path)}
    used: set[str] = set()

    def filled(value: Any) -> Any:
        if isinstance(value, Mapping):
            digest = value.get("sha256") if "in_memory" in value else None
            if isinstance(digest, str) and digest in given:
                used.add(digest)
                return {**given[digest][1], "sha256": digest}
            return {name: filled(one) for name, one in value.items()}
        return [filled(one) for one in value] if isinstance(value, list) else value

    found = filled(call) if given else call
    for digest, (file, _) in given.items():
        if digest not in used:
            raise InvalidRequest(
                f"{file} has the sha256 {digest[:12]}, and {arguments.source} lacks no such "
                "picture; give the very picture that it was made with, or drop the option"
            )
    return found


def _recorded_choice(metadata: Mapping) -> dict[str, Any]:
    """Return the recorded model options; for pictures saved from Python, only the model's name and types."""
    recorded = metadata.get("load")
    if not isinstance(recorded, dict):
        kind = metadata.get("prediction_type")
        recorded = {"model": metadata.get("model"), "prediction_type": kind if kind in PREDICTION_TYPES else None}
    known = {name: value for name, value in recorded.items() if name in RECORDED and isinstance(value, str)}
    loras, dtype = tuple(lora for lora, _ in _recorded_loras(metadata)), metadata.get("dtype")
    return {"dtype": dtype if isinstance(dtype, str) else None, **known, "lora": loras}


def _lora_files(metadata: Mapping) -> dict[str, dict[str, Any]]:
    """Return name -> path, part and digest of the LoRAs that the recorded requests use. Raises InvalidRequest."""
    found = metadata.get("lora_files", {})
    if not isinstance(found, dict) or not all(
        isinstance(file, dict)
        and all(isinstance(file.get(key), str) for key in ("path", "sha256"))
        and file.get("part") in (None, "content", "style")
        for file in found.values()
    ):
        raise InvalidRequest("the recorded LoRAs are damaged; use an unedited picture")
    return found


def _net_files(metadata: Mapping) -> dict[str, dict[str, Any]]:
    """Return name -> path and digest of the control networks that the recorded requests use. Raises InvalidRequest."""
    found = metadata.get("control_nets", {})
    if not isinstance(found, dict) or not all(
        isinstance(net, dict) and isinstance(net.get("sha256"), str) and isinstance(net.get("path"), (str, type(None)))
        for net in found.values()
    ):
        raise InvalidRequest("the recorded control networks are damaged; use an unedited picture")
    return found


def _control_nets(arguments: argparse.Namespace, metadata: Mapping) -> tuple[ControlFile, ...]:
    """Return the recorded requests' control networks, those given first. Raises InvalidRequest."""
    own, recorded = shipped(TINY, "control"), _net_files(metadata)
    given = {net.name: net for net in (ControlFile.of(text, own) for text in arguments.control_net or ())}
    unused = [name for name in given if name not in recorded]
    if unused:
        raise InvalidRequest(f"{arguments.source} uses no control network called {quoted(unused[0])}; drop it here")
    found = []
    for name, net in recorded.items():
        path = given[name].path if name in given else str(own[name]) if name in own else net["path"]
        if path is None:
            raise InvalidRequest(
                f"{arguments.source} was made with the control network {quoted(name)}, which was never in a file; give "
                f"it with --control-net {quoted(name)}=FOLDER"
            )
        found.append(ControlFile(path, name))
    return tuple(found)


def _given(arguments: argparse.Namespace) -> list[Lora]:
    shipped_loras = shipped(model_folder(arguments.model or DEFAULT_MODEL), "loras")
    return [Lora.of_rows(text, shipped_loras) for text in arguments.row_lora or ()]


def _with_stylefast(file: Mapping[str, Any]) -> str | None:
    """Return the path of the LoRA that comes with stylefast and is the recorded one, None if it is none of them."""
    own = shipped(TINY, "loras").values()
    return next((str(path) for path in own if hashlib.sha256(path.read_bytes()).hexdigest() == file["sha256"]), None)


def _row_loras(arguments: argparse.Namespace, metadata: Mapping) -> tuple[Lora, ...]:
    """Return the files of the recorded requests' LoRAs, those given first. Raises InvalidRequest."""
    given = {lora.name: lora for lora in _given(arguments)}
    scaled = next((lora for lora in given.values() if not lora.plain), None)
    if scaled is not None:
        raise InvalidRequest(f"--lora {scaled.words()} has a strength, but the picture records its own; drop it here")
    files = {
        name: Lora(
            given[name].path if name in given else _with_stylefast(file) or file["path"],
            part=file.get("part"),
            own_name=name,
        )
        for name, file in _lora_files(metadata).items()
    }
    return (*files.values(), *(lora for name, lora in given.items() if name not in files))


def _recorded_loras(metadata: Mapping) -> list[tuple[Lora, str]]:
    """Return the recorded LoRAs with their digests. Raises InvalidRequest for malformed entries."""
    recorded = metadata.get("load")
    entries = recorded.get("lora", []) if isinstance(recorded, dict) else []
    try:
        return [(Lora(str(entry["path"]), float(entry["scale"])), str(entry["sha256"])) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"the recorded LoRAs are damaged ({error}); use an unedited picture") from error


def _check_asked_for(arguments: argparse.Namespace, recorded: Mapping, metadata: Mapping) -> None:
    """Raise InvalidRequest for files named only by the picture, which is untrusted."""
    named = {}
    for name in PATHS:
        value = recorded.get(name)
        if value is None or getattr(arguments, name) is not None or _is_at_hand(name, value):
            continue
        named[f"the {name.replace('_', ' ')} {value}"] = [f"--{name.replace('_', '-')}", value]
    if arguments.lora is None:
        named |= {f"the LoRA {lora.path}": ["--merge-lora", lora.words()] for lora in recorded["lora"]}
    given = {lora.name for lora in _given(arguments)}
    for name, file in _lora_files(metadata).items():
        if name not in given and _with_stylefast(file) is None:
            named[f"the LoRA {file['path']}"] = ["--lora", Lora(file["path"], own_name=name).words()]
    nets = {ControlFile.of(text, shipped(TINY, "control")).name for text in arguments.control_net or ()}
    for name, net in _net_files(metadata).items():
        if name not in nets and name not in shipped(TINY, "control") and net["path"] is not None:
            words = ControlFile(net["path"], name).words()
            named[f"the control network {net['path']}"] = ["--control-net", words]
    options = [word for words in named.values() for word in words]
    styles = [f"the style file {path}" for path in _style_files(metadata["call"])]
    if not named and not styles:
        return
    by_hand = f", or with {shlex.join(options)}" if not styles else ""
    raise InvalidRequest(
        f"{arguments.source} asks to load {', '.join([*named, *styles])[:_SHOWN]}, and a picture may come from an "
        f"untrusted source; if you trust it, pass --load-recorded{by_hand[:_SHOWN]}"
    )


def _from_cache(arguments: argparse.Namespace, recorded: Mapping) -> bool:
    """Return whether the picture, not the user, names something that comes from the hub's cache."""
    values = (recorded.get(name) for name in PATHS if getattr(arguments, name) is None)
    return any(value is not None and value != DEFAULT_MODEL for value in values)


def _is_at_hand(name: str, value: str) -> bool:
    """Return whether `value` comes with stylefast or is a hub repository that was downloaded before."""
    from stylefast.models.hub import cached_ids, is_hub_id

    if name == "model" and value == DEFAULT_MODEL:
        return True
    return is_hub_id(value) and value in cached_ids() and not os.path.exists(value)


def _style_files(call: Mapping) -> Iterator[str]:
    """Yield the files of banks, learned styles and image embeddings in a recorded call that don't come with the model.

    Pictures are left out: they are only decoded, and their pixels are compared with the recorded ones.
    """
    requests = call["requests"]
    places = [call.get("styles"), *(one.get("style") for one in requests if isinstance(one, Mapping))]
    for place in places:
        if isinstance(place, Mapping) and "kind" not in place and "type" not in place:
            place = list(place.values())
        for style in place if isinstance(place, (list, tuple)) else [place]:
            if isinstance(style, Mapping):
                yield from _files_of(style)


def _files_of(style: Mapping) -> Iterator[str]:
    from stylefast.record_values import is_bank

    stages = style.get("stages")
    sources = [style.get(name) for name in ("embedding", "path", "towards", "image_embeds")]
    sources += stages.values() if isinstance(stages, Mapping) else ()
    if is_bank(style.get("reference")):
        sources.append(style["reference"])
    for source in sources:
        paths = source.get("path") if isinstance(source, Mapping) else source
        yield from (one for one in (paths if isinstance(paths, (list, tuple)) else [paths]) if isinstance(one, str))


def _check_loras(choice: ModelChoice, metadata: Mapping, arguments: argparse.Namespace) -> None:
    """Raise unless the LoRAs are those that made the picture; compares contents before anything is loaded."""
    on = metadata.get("loras")
    on = on if isinstance(on, dict) else {}
    if on and not choice.lora:
        words = ", ".join(shown(f"{name} at {scale}") for name, scale in on.items())[:_SHOWN]
        raise InvalidRequest(
            f"{arguments.source} was made with LoRAs ({words}); name their files: --merge-lora FILE:SCALE"
        )
    then = sorted((digest, lora.scale) for lora, digest in _recorded_loras(metadata))
    recorded = {digest for digest, _ in then}
    digests = [lora.digest() for lora in choice.lora]
    digests = [one if one in recorded else lora.old_digest() for one, lora in zip(digests, choice.lora, strict=True)]
    now = sorted((digest, lora.scale) for digest, lora in zip(digests, choice.lora, strict=True))
    if (then and now != then) or Counter(str(scale) for _, scale in now) != Counter(map(str, on.values())):
        words = ", ".join(lora.words() for lora in choice.lora) or "none"
        _refuse_unless_forced(
            arguments,
            f"the LoRAs ({words}) differ in content or strength from those that made {arguments.source}",
            "--merge-lora",
        )


def _refuse_unless_forced(arguments: argparse.Namespace, message: str, option: str) -> None:
    if not arguments.force:
        raise ModelError(f"{message}; name the right one with {option}, or pass --force for another picture")
    warn(message)


def _comparison(before: Image.Image, after: Image.Image, name: str) -> str:
    if before.size != after.size:
        return f"warning: {name} has (width, height) {before.size} in pixels, the new picture {after.size}"
    largest = max(ImageChops.difference(before, after.convert("RGB")).tobytes(), default=0)
    if largest == 0:
        return f"same pixels as {name}"
    return f"warning: pixels differ from {name} by up to {largest} of 255"
