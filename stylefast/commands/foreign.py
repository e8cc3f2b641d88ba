"""`stylefast generate --from theirs.png`: make a picture from the settings that another program wrote into one."""

import argparse
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from stylefast import values
from stylefast.commands.control_options import check_controls
from stylefast.commands.explaining import check_explain, check_place, explain
from stylefast.commands.generate import check_schedules, destination_of, load, make, requests_of, save
from stylefast.commands.model_options import Lora, ModelChoice
from stylefast.commands.notices import warn
from stylefast.errors import InvalidRequest, ModelError, PromptError
from stylefast.infotext import LoraTag, Parameters, read
from stylefast.models.prompt_syntax import check
from stylefast.runtime.plan.request import LoraStrength, Request

_SHOWN = 80  # max characters of a value that was not taken
_AUTO = 10  # digits of the shortest hash that identifies a file
# settings of a text that options replace, and those options
_OPTIONS = {
    "prompt": "prompts",
    "negative_prompt": "negative",
    **{name: name for name in ("prompt_2", "negative_prompt_2", "steps", "guidance", "seed", "size", "clip_skip")},
    "scheduler": "scheduler",
}


def run_foreign(arguments: argparse.Namespace, text: str) -> int:
    """Make a picture like the one with this parameters text, and list on stderr what of it was not taken.

    Prompts and settings among the options come first. Raises InvalidRequest or PromptError for settings that stylefast
    does not have, LoRAs whose file is not among `--lora`, and ModelError for a LoRA of other content, unless --force is
    given.
    """
    if arguments.load_recorded:
        raise InvalidRequest(f"{arguments.source} names no files to load; drop --load-recorded")
    own = {name for name, option in _OPTIONS.items() if getattr(arguments, option) not in (None, [])}
    try:
        parameters = read(text, own)
        if arguments.prompt_syntax is None:
            _check_prompts(parameters)
    except InvalidRequest as error:
        raise type(error)(f"{arguments.source}: {error}") from error
    choice = ModelChoice.of(arguments)
    used = loras_of(parameters.loras, choice.row_lora, arguments.force)
    choice = replace(choice, row_lora=used)
    requests = foreign_requests(arguments, parameters, choice.folder, {lora.name: lora.strengths for lora in used})
    check_controls(requests, [net.name for net in choice.control_net])
    check_schedules(requests)
    check_explain(arguments, requests)
    prompts = [request.prompt for request in requests]
    destination = destination_of(arguments, prompts)
    _tell(arguments.source, parameters, own)
    loaded = choice.recorded()
    engine = load(choice, arguments.quiet)
    check_place(engine, requests[0], arguments)
    paths = save(destination, make(engine, requests, arguments.quiet), loaded, arguments.grid)
    explain(engine, requests[0], arguments, paths[0])
    return 0


def foreign_requests(
    arguments: argparse.Namespace, parameters: Parameters, model_folder: Path, loras: Mapping[str, LoraStrength]
) -> list[Request]:
    """Return the requests of settings and options; what neither says is as in `Request`.

    Raises InvalidRequest or a subclass.
    """
    given: dict[str, Any] = {
        f.name: getattr(parameters, f.name)
        for f in fields(Request)
        if f.name != "loras" and getattr(parameters, f.name, None) is not None
    }
    prompt, seed = given.pop("prompt"), given.pop("seed", None)
    arguments = argparse.Namespace(**vars(arguments))
    arguments.prompts = arguments.prompts or [prompt]
    arguments.seed = seed if arguments.seed is None else arguments.seed
    return requests_of(arguments, model_folder, loras, given | {"prompt_syntax": "a1111"})


def _check_prompts(parameters: Parameters) -> None:
    """Raise PromptError, with a way out, for what A1111's prompts can say and ours can't."""
    ways = {"prompt": '--from PICTURE "a fish"', "negative_prompt": "--negative", "prompt_2": "--prompt-2"}
    for name, way in (ways | {"negative_prompt_2": "--negative-prompt-2"}).items():
        try:
            check(name, getattr(parameters, name) or "", "a1111")
        except PromptError as error:
            raise PromptError(f"{error}. Or give your own {name}: {way}") from error


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


def _tell(source: str, parameters: Parameters, own: Collection[str]) -> None:
    for name, value in parameters.not_taken.items():
        shown = name if name.isprintable() else values.quoted(name)
        why = ", which A1111 ignores for SDXL; --clip-skip sets it" if name == "Clip skip" else ""
        warn(f"{source}: not taken: {shown[: values.QUOTED]}: {values.quoted(value)[:_SHOWN]}{why}")
    settings = {"steps": "Steps", "scheduler": "Sampler", "guidance": "CFG scale", "seed": "Seed", "size": "Size"}
    missing = [shown for name, shown in settings.items() if getattr(parameters, name) is None and name not in own]
    if missing:
        warn(f"{source} says nothing of {', '.join(missing)}; the defaults are used")
