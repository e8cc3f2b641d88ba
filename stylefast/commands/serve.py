"""`stylefast serve`: the HTTP service."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from stylefast.commands.control_options import add_control_net
from stylefast.commands.model_options import ModelChoice, add_model_arguments
from stylefast.errors import MissingDependency

if TYPE_CHECKING:
    from stylefast.engine import Engine
    from stylefast.serving.settings import ServeSettings

SUMMARY = "Serve pictures over HTTP: OpenAI's image API, health checks and metrics."
EXAMPLES = """\
example: stylefast serve --model tiny
         curl localhost:8000/v1/images/generations -H 'content-type: application/json' -d '{"prompt": "a fish"}'

Settings come from options, from the environment (STYLEFAST_SERVE_PORT=9000) and from --config FILE.toml, in this order.
Keys come from the last two alone: STYLEFAST_SERVE_API_KEYS=alice:KEY,bob:KEY. docs/serving-http.md has all of it."""
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    from stylefast.serving.settings import ServeSettings

    group = parser.add_argument_group("service").add_argument
    group("--config", metavar="FILE", help="TOML file with settings")
    for name, setting in ServeSettings.flags().items():
        flag, default = setting["flag"] or f"--{name.replace('_', '-')}", setting["default"]
        if setting["kind"] == "flag":
            group(flag, dest=name, action="store_true", default=None, help=setting["text"])
            continue
        shown = "" if default is None else f" (default: {default})"
        kind = {"whole": int, "seconds": float}.get(setting["kind"], str)
        group(flag, dest=name, metavar=setting["shown"], type=kind, help=setting["text"] + shown)
    add_control_net(group)
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"{', '.join(missing)} missing; pip install 'stylefast[serve]' brings what serving needs"
        )
    settings, load = chosen(arguments)
    from stylefast.serving.server import serve

    serve(settings, load)
    return 0


def chosen(arguments: argparse.Namespace) -> "tuple[ServeSettings, LoadChoice]":
    """Return the settings of the service and the model, from options, the environment and a file."""
    from stylefast.serving.settings import PREFIX, ServeSettings

    flags = {name: getattr(arguments, name) for name in ServeSettings.flags()}
    file = arguments.config or os.environ.get(f"{PREFIX}CONFIG")
    return ServeSettings.of(flags, file=file), LoadChoice(ModelChoice.of(arguments))


@dataclass(frozen=True)
class LoadChoice:
    """Loader of the model that the command line names; pickled into the engine's process."""

    choice: ModelChoice

    def __call__(self) -> "tuple[Engine, Mapping[str, Any]]":
        """Return the engine with what comes with the model, LoRAs and control networks, and what pictures record."""
        recorded, engine = self.choice.recorded(), self.choice.load()
        for name, file in engine.lora_files().items():
            if name not in engine.loras:
                engine.loras.add(file, name)
        for name, folder in engine.control_files().items():
            if name not in engine.controls:
                engine.controls.add(folder, name)
        return engine, recorded
