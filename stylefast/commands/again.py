"""`stylefast generate --from picture.png`: the whole recorded call once more, of which this one picture is kept."""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageChops

from stylefast.commands.files import Destination, read_metadata
from stylefast.commands.generate import RECORDED, ModelChoice, check_schedules, load, make, save
from stylefast.engine import Result
from stylefast.errors import InvalidRequest, ModelError
from stylefast.record import from_record


def run_again(arguments: argparse.Namespace) -> int:
    """Make the picture again and say whether its pixels are the same.

    All pictures of the call are made, since a batch of another size rounds differently and a group's first picture is
    the reference of the others. Raises ModelError when the model has other weights and --force is not given.
    """
    metadata, before = read_metadata(arguments.source)
    if metadata.get("loras"):
        raise InvalidRequest(
            f"{arguments.source} was made with LoRAs ({', '.join(metadata['loras'])}), which the command line can't "
            "load; make it again from Python: engine.load_lora, then stylefast.record.from_record"
        )
    choice = ModelChoice.of(arguments, _recorded_choice(metadata))
    requests = from_record(metadata["call"], Path(arguments.source).resolve().parent, choice.folder)
    check_schedules(requests)
    place = metadata["index"]
    destination = Destination(arguments.out, [requests[place].prompt], arguments.overwrite)
    engine = load(choice, arguments.quiet)
    if engine.fingerprint != metadata["fingerprint"]:
        message = (
            f"{choice.model} has other weights (fingerprint {engine.fingerprint[:12]}) than the model that made "
            f"{arguments.source} ({metadata['fingerprint'][:12]})"
        )
        if not arguments.force:
            raise ModelError(f"{message}; name the right one with --model, or pass --force for another picture")
        _warn(message)
    result = make(engine, requests, arguments.quiet)
    now = result.metadata[place]
    for key in ("versions", "device", "dtype"):
        if now.get(key) != metadata.get(key):
            _warn(f"{key} differ: {now.get(key)} now, {metadata.get(key)} then; pixels may differ slightly")
    if not arguments.quiet:
        print(_comparison(before, result.images[place], arguments.source), file=sys.stderr)
    kept = Result([result.images[place]], [result.latents[place]], [now])
    save(destination, kept, choice, arguments.grid)
    return 0


def _recorded_choice(metadata: dict) -> dict:
    """What the picture's model was loaded from; pictures saved from Python know no more than its name."""
    recorded = metadata.get("load")
    if not isinstance(recorded, dict):
        return {"model": metadata.get("model"), "dtype": metadata.get("dtype")}
    known = {name: value for name, value in recorded.items() if name in RECORDED and isinstance(value, str)}
    return {"dtype": metadata.get("dtype")} | known


def _comparison(before: Image.Image, after: Image.Image, name: str) -> str:
    if before.size != after.size:
        return f"warning: {name} has (width, height) {before.size} in pixels, the new picture {after.size}"
    largest = max(high for _, high in ImageChops.difference(before, after.convert("RGB")).getextrema())
    if largest == 0:
        return f"same pixels as {name}"
    return f"warning: pixels differ from {name} by up to {largest} of 255"


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
