"""`stylefast generate --from theirs.png`: make a picture from the settings that another program wrote into one."""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from stylefast import values
from stylefast.commands.files import Destination
from stylefast.commands.generate import check_schedules, load, make, save
from stylefast.commands.model_options import Lora, ModelChoice
from stylefast.commands.notices import warn
from stylefast.errors import InvalidRequest, ModelError
from stylefast.infotext import LoraTag, Parameters, read
from stylefast.runtime.plan.request import LoraStrength, Request

_SHOWN = 80  # max characters of a value that was not taken
_AUTO = 10  # digits of the shortest hash that identifies a file


def run_foreign(arguments: argparse.Namespace, text: str) -> int:
    """Make a picture like the one with this parameters text, and list on stderr what of it was not taken.

    Raises InvalidRequest or PromptError for settings that stylefast does not have, LoRAs whose file is not among
    `--lora`, and ModelError for a LoRA of other content, unless --force is given.
    """
    if arguments.load_recorded:
        raise InvalidRequest(f"{arguments.source} names no files to load; drop --load-recorded")
    try:
        parameters = read(text)
    except InvalidRequest as error:
        raise type(error)(f"{arguments.source}: {error}") from error
    choice = ModelChoice.of(arguments)
    used = loras_of(parameters.loras, choice.row_lora, arguments.force)
    choice = replace(choice, row_lora=used)
    request = request_of(parameters, {lora.name: lora.strengths for lora in used})
    check_schedules([request])
    destination = Destination(arguments.out, [request.prompt], arguments.overwrite, arguments.metadata == "a1111")
    _tell(arguments.source, parameters)
    loaded = choice.recorded()
    engine = load(choice, arguments.quiet)
    save(destination, make(engine, [request], arguments.quiet), loaded, arguments.grid)
    return 0


def request_of(parameters: Parameters, loras: Mapping[str, LoraStrength]) -> Request:
    """Return the request of settings; what they don't say is as in `Request`. Raises InvalidRequest or a subclass."""
    given: dict[str, Any] = {
        f.name: getattr(parameters, f.name) for f in fields(Request) if getattr(parameters, f.name, None) is not None
    }
    return Request(**given | {"loras": loras, "prompt_syntax": "a1111"})


def loras_of(wanted: Sequence[LoraTag], given: Sequence[Lora], force: bool = False) -> tuple[Lora, ...]:
    """Return the files given as `--lora` with the weights that the settings name; further ones keep their own.

    Raises InvalidRequest for a LoRA without a file, or with two strengths, and ModelError for a file of other content
    unless `force`.
    """
    files: dict[str, Lora] = {}
    for lora in given:
        files[lora.name] = lora
    for tag in wanted:
        if tag.name not in files:
            known = ", ".join(files) or "none"
            raise InvalidRequest(
                f"the picture was made with the LoRA {values.quoted(tag.name)}; give its file, or the name of one that "
                f"comes with the model: --lora FOLDER/{tag.name[:100]}.safetensors (given: {known[:600]}"
                f"{values.did_you_mean(tag.name, files)})"
            )
        lora = files[tag.name]
        if not lora.plain and lora.strengths != tag.strengths:
            raise InvalidRequest(
                f"--lora gives {values.quoted(tag.name)} the strength {lora.strengths}, and the picture's settings "
                f"{tag.strengths}; leave it out of --lora"
            )
        _check_hash(tag, lora, force)
        files[tag.name] = Lora(lora.path, tag.weight, tag.text_weight, own_name=tag.name)
    return tuple(files.values())


def _check_hash(tag: LoraTag, lora: Lora, force: bool) -> None:
    """Compare the hash that the settings name, A1111's of the tensors or that of the whole file."""
    path, wanted = Path(lora.path), tag.hash.lower()
    if not wanted:
        return
    if len(wanted) < _AUTO or not path.is_file():
        warn(f"the hash {values.quoted(tag.hash)} of the LoRA {values.quoted(tag.name)} was not compared with {path}")
        return
    content = path.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    if any(hashlib.sha256(part).hexdigest().startswith(wanted) for part in (tensors, content)):
        return
    message = f"{path} has other content (hash {wanted[:20]}) than the LoRA that made the picture"
    if not force:
        raise ModelError(f"{message}; name the right file with --lora, or pass --force for another picture")
    warn(message)


def _tell(source: str, parameters: Parameters) -> None:
    for name, value in parameters.not_taken.items():
        shown = name if name.isprintable() else values.quoted(name)
        warn(f"{source}: not taken: {shown[: values.QUOTED]}: {values.quoted(value)[:_SHOWN]}")
    settings = {"steps": "Steps", "scheduler": "Sampler", "guidance": "CFG scale", "seed": "Seed", "size": "Size"}
    missing = [shown for name, shown in settings.items() if getattr(parameters, name) is None]
    if missing:
        warn(f"{source} says nothing of {', '.join(missing)}; the defaults are used")
