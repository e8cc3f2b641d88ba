"""Options for what is loaded and where it runs, and the part of them recorded in pictures."""

import argparse
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stylefast.errors import InvalidRequest, ModelFormatError, ModelNotFound
from stylefast.options import EXPORTED, FLAGS, SIZES, parse_bytes
from stylefast.values import did_you_mean_beside, no_device, quoted, shown_path, typed_path

DEFAULT_MODEL = "tiny"
# model options that name files, folders or hub ids
PATHS = ("model", "adapter", "image_encoder", "vae")
# recorded in pictures so that --from can load the model again; the other options depend on the machine
RECORDED = (*PATHS, "dtype", "prediction_type")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for what is loaded and where it runs."""
    group = parser.add_argument_group("model").add_argument
    group(
        "--model",
        metavar="NAME",
        help="tiny (comes with stylefast, the default), a diffusers folder, a .safetensors file, or a hub id",
    )
    group(
        "--lora",
        dest="row_lora",
        action="append",
        metavar="[NAME=]FILE[:SCALE[:TEXT_SCALE]]",
        help=(
            "a LoRA for the pictures of the prompts, at this strength (default: 1) and one of its own for the text "
            "encoders (default: the same); a request file and --from say themselves which of them a picture uses, by "
            "NAME (default: the file's name without its suffix); may be repeated"
        ),
    )
    group(
        "--merge-lora",
        dest="lora",
        action="append",
        metavar="FILE[:SCALE]",
        help=(
            "a LoRA to merge into the model, for all pictures: DoRA and full differences, which can't differ by "
            "picture, and any LoRA with engines that have no inputs for them; may be repeated"
        ),
    )
    for name, option in FLAGS.items():
        choices = option["choices"]
        shown = {"choices": choices} if choices else {"metavar": option["flag"]}
        shown |= {"type": int} if option["flag"] == "N" else {}
        group(flag(name), help=option["text"], **shown)


def flag(name: str) -> str:
    """Return an option's name on the command line."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Lora:
    """A LoRA file, or a folder with one, and its strength."""

    path: str
    scale: float = 1.0
    text_scale: float | None = None  # of the text encoders; None: `scale`
    _: KW_ONLY
    part: str | None = None  # of a B-LoRA: "content" or "style"
    own_name: str | None = None  # by which requests use it; None: the file's
    stated: bool = field(default=False, compare=False)  # whether its strength was given

    @classmethod
    def merged(cls, text: str) -> "Lora":
        """Parse "FILE" or "FILE:SCALE". Raises InvalidRequest for a missing file."""
        path, scales = split_numbers("--merge-lora", text, 1)
        return cls(found_lora("--merge-lora", path), *scales)

    @classmethod
    def of_rows(cls, text: str, shipped: Mapping[str, Path]) -> "Lora":
        """Parse "[NAME=]FILE[:SCALE[:TEXT_SCALE]]". Raises InvalidRequest for a missing file.

        shipped: LoRAs that come with the model, whose names stand for their files.
        """
        path, scales = split_numbers("--lora", text, 2)
        name, path = named_part("--lora", path)
        return cls(found_lora("--lora", path, shipped), *scales, own_name=name, stated=bool(scales))

    @property
    def name(self) -> str:
        """Return the name by which requests use it: its own, or the file's without its suffix."""
        return self.own_name or _name_of(self.path)

    @property
    def plain(self) -> bool:
        """Return whether no strength was given."""
        return not self.stated

    @property
    def strengths(self) -> float | tuple[float, float]:
        """Return the strength as a request takes it."""
        return self.scale if self.text_scale is None else (self.scale, self.text_scale)

    def words(self) -> str:
        """Return the LoRA as given on the command line."""
        name = "" if self.name == _name_of(self.path) else f"{self.name}="
        scales = [] if self.scale == 1 else [self.scale]
        scales = scales if self.text_scale is None else [self.scale, self.text_scale]
        return ":".join([name + self.path, *(f"{scale:g}" for scale in scales)])

    def digest(self) -> str:
        """Return the SHA-256 (64 hex digits) of the weights and peft's config, if any, as `Engine.loras` has it.

        Raises InvalidRequest.
        """
        from stylefast.models.lora_file import lora_digest

        try:
            return lora_digest(self.path)
        except (ModelFormatError, ModelNotFound) as error:
            raise InvalidRequest(f"the LoRA {quoted(self.path)} can't be read ({error})") from error

    def old_digest(self) -> str:
        """Return what older records have in place of `digest`: a SHA-256 of the SHA-256 of each file."""
        from stylefast.models.lora_file import files_of

        digests = [hashlib.sha256(file.read_bytes()).digest() for file in sorted(files_of(self.path))]
        return hashlib.sha256(b"".join(digests)).hexdigest()


@dataclass(frozen=True)
class ControlFile:
    """A control network's folder or file, and the name by which requests use it."""

    path: str
    own_name: str | None = None  # None: the file's or folder's

    @classmethod
    def of(cls, text: str, shipped: Mapping[str, Path]) -> "ControlFile":
        """Parse "[NAME=]PATH"; shipped: networks that come with the model. Raises InvalidRequest for a missing file."""
        name, path = named_part("--control-net", text)
        return cls(found_lora("--control-net", path, shipped), name)

    @property
    def name(self) -> str:
        """Return the name by which requests use it."""
        return self.own_name or _name_of(self.path)

    def words(self) -> str:
        """Return the network as given on the command line."""
        return self.path if self.name == _name_of(self.path) else f"{self.name}={self.path}"


def _name_of(path: str) -> str:
    # a folder's name may have dots
    return Path(path).name if Path(path).is_dir() else Path(path).stem


def _check_once(option: str, what: str, names: Sequence[str]) -> None:
    """Raise InvalidRequest for a name that two files share, since requests know them by it."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(
            f"{option} names two files called {quoted(twice)}, and requests know {what} by that name; give it once, or "
            f"name one of them: {option} NAME=FILE"
        )


def named_part(option: str, text: str) -> tuple[str | None, str]:
    """Return the name before "=", if there is one and no file of the whole name, and the path."""
    name, mark, rest = text.partition("=")
    named = mark and name and not {"/", "\\"} & set(name) and not typed_path(option, text).exists()
    return (name, rest) if named else (None, text)


def split_numbers(option: str, text: str, most: int) -> tuple[str, list[float]]:
    """Return the path before up to `most` numbers behind colons, and the numbers; the file's own name may end so."""
    scales: list[float] = []
    while len(scales) < most and not typed_path(option, text).exists():
        before, colon, after = text.rpartition(":")
        try:
            scales.insert(0, float(after if colon else ""))
        except ValueError:
            break
        text = before
    return text, scales


def found_lora(option: str, path: str, shipped: Mapping[str, Path] = MappingProxyType({})) -> str:
    """Return the absolute path of a LoRA or control network, or of one that comes with the model.

    Raises InvalidRequest, with the option's name, for a missing file.
    """
    found = typed_path(option, path)
    if not found.exists():
        if path in shipped:
            return str(shipped[path])
        raise InvalidRequest(f"{option}: no file found at {quoted(path)}{did_you_mean_beside(found)}")
    no_device(f"{option}:", found)
    return str(found.resolve())


def model_folder(model: str) -> Path:
    """Return the folder in which a model's own references, learned styles and LoRAs are looked for."""
    from stylefast.models.checkpoint import TINY

    return TINY if model == DEFAULT_MODEL else Path(model)


@dataclass(frozen=True)
class ModelChoice:
    """A model and where it runs: those options of `EngineOptions` that the command line gives.

    `cached_only`: nothing is downloaded. Raises InvalidRequest for malformed memory limits, for engines that the
    backend does not read, and for LoRAs that it can't take.
    """

    model: str = DEFAULT_MODEL
    lora: tuple[Lora, ...] = ()  # merged into the model
    row_lora: tuple[Lora, ...] = ()  # for requests that name them
    control_net: tuple[ControlFile, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    cached_only: bool = False

    def __post_init__(self):
        for name in SIZES:
            parse_bytes(flag(name), self.options.get(name))
        backend, engines, trust = (self.options.get(name) for name in ("backend", "engines", "trust"))
        if engines is not None and backend not in EXPORTED:
            raise InvalidRequest(f"--engines is used by the backends {', '.join(EXPORTED)}; give --backend as well")
        if backend == "tensorrt" and engines is None:
            raise InvalidRequest("--backend tensorrt needs --engines FOLDER, created by `stylefast export tensorrt`")
        if trust is not None and engines is None:
            raise InvalidRequest("--trust applies to the folder of --engines; give --engines as well")
        if trust is not None and not _DIGEST.fullmatch(trust):
            raise InvalidRequest(
                f"--trust is {quoted(trust)}; a digest is 64 hex digits (`stylefast export` prints it)"
            )
        if self.lora and backend == "onnxruntime" and engines is None:
            raise InvalidRequest(
                "the graphs that --backend onnxruntime exports by itself contain the model's weights without a "
                "LoRA; use another backend, or --engines with an export that includes the LoRA"
            )
        paths = [lora.path for lora in self.lora]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise InvalidRequest(
                f"--merge-lora names {shown_path(twice)} twice; give it once, with the strength you want"
            )

        if self.row_lora and backend in EXPORTED and engines is None:
            raise InvalidRequest(
                f"the graphs that --backend {backend} exports by itself have no inputs for LoRAs; export the model "
                "with --lora-rank and give the folder as --engines, or use --backend torch"
            )
        _check_once("--lora", "LoRAs", [lora.name for lora in self.row_lora])
        _check_once("--control-net", "control networks", [net.name for net in self.control_net])
        if self.control_net and backend in EXPORTED:
            raise InvalidRequest(
                f"--backend {backend} does not run control networks; use --backend torch or compile with --control-net"
            )

    @classmethod
    def of(cls, arguments: argparse.Namespace, recorded: Mapping[str, Any] | None = None) -> "ModelChoice":
        """Return the options given, with recorded ones as defaults. Paths become absolute."""
        chosen = {name: value for name, value in (recorded or {}).items() if value is not None}
        for name in ("model", *FLAGS):
            value = getattr(arguments, name, None)
            if value is not None and name in (*PATHS, "engines") and value != DEFAULT_MODEL:
                path = typed_path(flag(name), value)
                chosen[name] = str(path.resolve()) if path.exists() else value
            elif value is not None:
                chosen[name] = value
        if arguments.lora is not None:
            chosen["lora"] = tuple(map(Lora.merged, arguments.lora))
        if getattr(arguments, "row_lora", None) is not None:
            from stylefast.record_values import shipped

            own = shipped(model_folder(chosen.get("model", DEFAULT_MODEL)), "loras")
            chosen["row_lora"] = tuple(Lora.of_rows(text, own) for text in arguments.row_lora)
        if getattr(arguments, "control_net", None) is not None:
            from stylefast.record_values import shipped

            own = shipped(model_folder(chosen.get("model", DEFAULT_MODEL)), "control")
            chosen["control_net"] = tuple(ControlFile.of(text, own) for text in arguments.control_net)
        fields = {name: chosen.pop(name) for name in ("model", "lora", "row_lora", "control_net") if name in chosen}
        return cls(**fields, options=chosen)

    @property
    def folder(self) -> Path:
        """Return the model's `model_folder`."""
        return model_folder(self.model)

    def load(self):
        """Load the engine and its LoRAs."""
        from stylefast.engine import Engine
        from stylefast.models.lora_factors import NotLowRank

        hub: dict[str, Any] = {"local_files_only": True} if self.cached_only else {}
        engine = Engine.from_pretrained(self.model, **self.options, **hub)
        names: list[str] = []
        for lora in self.lora:
            stem = Path(lora.path).stem
            name = stem if stem not in names else f"{stem}-{len(names) + 1}"
            names.append(engine.load_lora(lora.path, lora.scale, name))
        for lora in self.row_lora:
            try:
                engine.loras.add(lora.path, lora.name, lora.part)
            except NotLowRank as error:
                raise NotLowRank(f"{error}. On the command line that is --merge-lora", error.reason) from error
        for net in self.control_net:
            engine.controls.add(net.path, net.name)
        return engine

    def recorded(self) -> dict[str, Any]:
        """Return the part recorded in pictures."""
        given: dict[str, Any] = {"model": self.model}
        given |= {name: self.options[name] for name in RECORDED if name in self.options}
        if self.lora:
            given["lora"] = [{"path": lora.path, "scale": lora.scale, "sha256": lora.digest()} for lora in self.lora]
        return given

    def words(self) -> list[str]:
        """Return the options as given on the command line."""
        words = [word for lora in self.lora for word in ("--merge-lora", lora.words())]
        words += [word for lora in self.row_lora for word in ("--lora", lora.words())]
        words += [word for net in self.control_net for word in ("--control-net", net.words())]
        words += ["--model", self.model] if self.model != DEFAULT_MODEL else []
        return words + [word for name, value in self.options.items() for word in (flag(name), str(value))]
