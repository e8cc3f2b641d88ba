"""`stylefast` in a process of its own that is forked from one which has imported everything.

Most of a command's processor time is Python's imports of torch, diffusers and transformers. Tests of what they print or
change start Python anew; tests of what a command does on top of them fork.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# what the commands load; a module that is not installed is left out
IMPORTED = (
    "stylefast.engine",
    "stylefast.export.pipeline",
    "stylefast.export.onnx_file",
    "stylefast.commands.generate",
    "stylefast.commands.export",
    "stylefast.commands.info",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip.modeling_clip",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "torch.export",
    "torch._inductor.config",
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(IMPORTED))


def process(target: Callable, *arguments) -> multiprocessing.Process:
    """A process, not started yet, that will call a function of a module; it does not outlive the test process."""
    return _context.Process(target=target, args=arguments, daemon=True)


def pipe():
    """Two ends, of which one goes to a `process`."""
    return _context.Pipe()


def stylefast(words: Sequence[str], environment: Mapping[str, str], folder: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of `stylefast` with some words, in an environment and a folder."""
    texts = [folder / f".{os.getpid()}.{name}" for name in ("out", "err")]
    command = process(_command, list(words), dict(environment), folder, texts)
    command.start()
    command.join()
    out, err = (text.read_text() for text in texts)
    for text in texts:
        text.unlink()
    return command.exitcode, out, err


def _command(words: list[str], environment: dict[str, str], folder: Path, texts: list[Path]) -> None:
    for stream, text in enumerate(texts, 1):
        os.dup2(os.open(text, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    from stylefast.cli import main

    sys.exit(main(words))
