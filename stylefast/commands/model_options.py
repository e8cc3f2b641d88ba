"""Options for what is loaded and where it runs, and the part of them recorded in pictures."""

import argparse
import hashlib
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from stylefast.errors import InvalidRequest
from stylefast.values import did_you_mean_beside, no_device, quoted, typed_path

DEFAULT_MODEL = "tiny"
PREDICTION_TYPES = ("epsilon", "v_prediction")
# backends that run the output of `stylefast export`
EXPORTED_BACKENDS = ("onnxruntime", "tensorrt", "aoti")
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
        action="append",
        metavar="FILE[:SCALE]",
        help="a LoRA to put on the model, at this strength (default: 1); may be repeated",
    )
    group("--adapter", metavar="FILE", help="IP-Adapter (default: the one that comes with the model, if any)")
    group("--image-encoder", metavar="DIR", help="CLIP image encoder of --adapter (default: the model's own)")
    group("--vae", metavar="NAME", help="a VAE in place of the model's own")
    group(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="what the UNet predicts, for checkpoints that don't say or say wrong (default: as the model says)",
    )
    group("--device", help="auto, cpu, cuda or cuda:1 (default: auto)")
    group("--dtype", help="auto, float32, bfloat16 or float16 (default: auto)")
    group(
        "--backend",
        choices=("auto", "torch", "compile", *EXPORTED_BACKENDS),
        help="what runs the steps; the last three run what `stylefast export` wrote (default: auto)",
    )
    group(
        "--engines",
        metavar="FOLDER",
        help="an export for --backend; without it, onnxruntime and aoti export the "
        "model once into the cache folder, which takes minutes",
    )
    group(
        "--trust",
        metavar="DIGEST",
        help="run engines that others wrote, which are code; the digest is what `stylefast export` printed there",
    )
    group("--memory-limit", metavar="BYTES", help="for all that the engine holds on its device, e.g. 8GB")
    group("--bank-memory", metavar="BYTES", help="for the pages of style banks there, e.g. 512MiB")


@dataclass(frozen=True)
class Lora:
    """A LoRA file, or a folder with one, and its strength."""

    path: str
    scale: float = 1.0

    @classmethod
    def of(cls, text: str) -> "Lora":
        """Parse "FILE" or "FILE:SCALE". Raises InvalidRequest for a missing file."""
        path, scale = text, 1.0
        before, colon, after = text.rpartition(":")
        if colon and not typed_path("--lora", text).exists():
            try:
                path, scale = before, float(after)
            except ValueError:
                path = text
        found = typed_path("--lora", path)
        if not found.exists():
            raise InvalidRequest(f"--lora: there is no file at {path!r}{did_you_mean_beside(found)}")
        no_device("--lora:", found)
        return cls(str(found.resolve()), scale)

    def words(self) -> str:
        """Return the LoRA as given on the command line."""
        return self.path if self.scale == 1 else f"{self.path}:{self.scale:g}"

    def digest(self) -> str:
        """Return a SHA-256 (64 hex digits) of the weights and peft's config, if any. Raises InvalidRequest."""
        from stylefast.models.lora_file import files_of

        digest = hashlib.sha256()
        try:
            for file in files_of(self.path):
                no_device("the LoRA", file)
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            reason = getattr(error, "strerror", None) or error
            raise InvalidRequest(f"the LoRA {quoted(self.path)} can't be read ({reason})") from error
        return digest.hexdigest()


@dataclass(frozen=True)
class ModelChoice:
    """What to load and where it runs. None means the engine's default.

    `cached_only`: nothing is downloaded. Raises InvalidRequest for malformed memory limits, for engines that the
    backend does not read, and for LoRAs that it can't take.
    """

    model: str = DEFAULT_MODEL
    lora: tuple[Lora, ...] = ()
    adapter: str | None = None
    image_encoder: str | None = None
    vae: str | None = None
    prediction_type: str | None = None
    dtype: str | None = None
    device: str | None = None
    backend: str | None = None
    engines: str | None = None
    trust: str | None = None
    memory_limit: str | None = None
    bank_memory: str | None = None
    cached_only: bool = False

    def __post_init__(self):
        from stylefast.runtime.memory import parse_bytes

        parse_bytes("--memory-limit", self.memory_limit)
        parse_bytes("--bank-memory", self.bank_memory)
        exported = ", ".join(EXPORTED_BACKENDS)
        if self.engines is not None and self.backend not in EXPORTED_BACKENDS:
            raise InvalidRequest(f"--engines is read by the backends {exported}; give --backend as well")
        if self.backend == "tensorrt" and self.engines is None:
            raise InvalidRequest("--backend tensorrt needs --engines FOLDER, which `stylefast export tensorrt` makes")
        if self.trust is not None and self.engines is None:
            raise InvalidRequest("--trust vouches for the folder of --engines; give that as well")
        if self.trust is not None and not _DIGEST.fullmatch(self.trust):
            raise InvalidRequest(f"--trust is {self.trust!r}; a digest is 64 hex digits (`stylefast export` prints it)")
        if self.lora and self.backend == "onnxruntime" and self.engines is None:
            raise InvalidRequest(
                "the graphs that --backend onnxruntime exports by itself hold the model's weights without a LoRA; take "
                "another backend, or --engines with an export that has it"
            )
        paths = [lora.path for lora in self.lora]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise InvalidRequest(f"--lora names {twice} twice; give it once, with the strength that you mean")

    @classmethod
    def of(cls, arguments: argparse.Namespace, recorded: dict[str, Any] | None = None) -> "ModelChoice":
        """Return the options given, with recorded ones as defaults. Paths become absolute."""
        chosen = {name: value for name, value in (recorded or {}).items() if value is not None}
        for name in (f.name for f in fields(cls)):
            value = getattr(arguments, name, None)
            if name == "lora" and value is not None:
                chosen[name] = tuple(Lora.of(text) for text in value)
            elif value is not None and name in (*PATHS, "engines") and value != DEFAULT_MODEL:
                path = typed_path(f"--{name.replace('_', '-')}", value)
                chosen[name] = str(path.resolve()) if path.exists() else value
            elif value is not None:
                chosen[name] = value
        return cls(**chosen)

    @property
    def folder(self) -> Path:
        """Return the folder in which the model's own references and learned styles are looked for."""
        from stylefast.models.checkpoint import TINY

        return TINY if self.model == DEFAULT_MODEL else Path(self.model)

    def load(self):
        """Load the engine and its LoRAs."""
        from stylefast.engine import Engine

        given = {name: value for name, value in asdict(self).items() if name != "model" and value is not None}
        del given["lora"]
        if given.pop("cached_only"):
            given["local_files_only"] = True
        engine = Engine.from_pretrained(self.model, **given)
        names: list[str] = []
        for lora in self.lora:
            stem = Path(lora.path).stem
            name = stem if stem not in names else f"{stem}-{len(names) + 1}"
            names.append(engine.load_lora(lora.path, lora.scale, name))
        return engine

    def recorded(self) -> dict[str, Any]:
        """Return the part recorded in pictures."""
        given: dict[str, Any] = {name: getattr(self, name) for name in RECORDED}
        if self.lora:
            given["lora"] = [asdict(lora) | {"sha256": lora.digest()} for lora in self.lora]
        return {name: value for name, value in given.items() if value is not None}

    def words(self) -> list[str]:
        """Return the options as given on the command line."""
        words = [word for lora in self.lora for word in ("--lora", lora.words())]
        for f in fields(self):
            if f.name in ("lora", "cached_only") or getattr(self, f.name) == f.default:
                continue
            words += [f"--{f.name.replace('_', '-')}", getattr(self, f.name)]
        return words
