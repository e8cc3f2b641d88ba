"""`stylefast train-lora`: train a LoRA on a folder of captioned pictures."""

import argparse
import sys
from dataclasses import replace

from stylefast.commands.generate import load
from stylefast.commands.model_options import ModelChoice, add_model_arguments
from stylefast.errors import InvalidRequest
from stylefast.values import typed_path

SUMMARY = "Train a LoRA on a folder of pictures with captions."
EXAMPLES = """examples:
  stylefast train-lora pictures --out pixel.safetensors --rank 8 --steps 1500 --model my-sdxl
  stylefast train-lora pictures --caption "a drawing" --out ink.safetensors --blocks up_blocks.0.attentions.1
the caption of fish.png is the text in fish.txt beside it, or that of --caption
"""
# written out, because the table with the names imports torch
LAYERS = ("attention", "attention+ff", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options; None means that the option was not given."""
    add = parser.add_argument
    add("pictures", metavar="FOLDER", help="pictures, each with its caption in a .txt file of the same name")
    add("--out", metavar="FILE.safetensors", required=True, help="file to write, in kohya's layout")
    add("--overwrite", action="store_true", help="replace an existing file")
    add("--quiet", action="store_true", help="no progress, only the file on stdout")
    add("--caption", metavar="TEXT", help="caption of the pictures without a .txt file")

    group = parser.add_argument_group("LoRA").add_argument
    group("--rank", type=int, metavar="N", help="rank of every change (default: 16)")
    group("--alpha", type=float, help="changes are scaled by alpha / rank (default: the rank)")
    group(
        "--layers",
        choices=LAYERS,
        help="attention (default), attention+ff: all of the transformers, all: resnets and resamplers as well",
    )
    group("--blocks", metavar="NAMES", help="only layers with one of these in their names: up_blocks,mid_block")
    group("--text-encoders", action="store_true", default=None, help="train both text encoders as well")

    group = parser.add_argument_group("training").add_argument
    group("--steps", type=int, help="optimiser steps (default: 1000)")
    group("--lr", type=float, metavar="RATE", help="largest learning rate (default: 1e-4)")
    group("--batch", type=int, metavar="N", help="pictures in a step (default: 1)")
    group("--resolution", type=int, metavar="SIDE", help="pictures are cropped to such squares (default: the model's)")
    group("--min-snr", type=float, metavar="GAMMA", help="min-SNR weights of the loss; 5 is usual (default: off)")
    group("--caption-dropout", type=float, metavar="SHARE", help="of pictures seen without caption (default: 0.1)")
    group("--seed", type=int, help="of everything that is drawn (default: 0)")
    group(
        "--gradient-checkpointing",
        action="store_true",
        default=None,
        help="compute the UNet's blocks again for their gradients: the same LoRA in less memory, but more slowly",
    )
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train, write the file and print its path; after Ctrl-C, write what was learned so far."""
    from tqdm import tqdm

    from stylefast.training.lora import check_out, train_lora
    from stylefast.training.pictures import read_folder

    choice, settings = _choice(arguments), _settings(arguments)
    out = check_out(typed_path("--out", arguments.out))
    if out.exists() and not arguments.overwrite:
        raise InvalidRequest(f"{out} exists; choose another --out, or pass --overwrite to replace it")
    pictures = read_folder(typed_path("the folder of pictures", arguments.pictures), arguments.caption)
    engine = load(choice, arguments.quiet)
    done, mean = 0, 0.0
    with tqdm(total=settings.steps, unit="step", disable=arguments.quiet, file=sys.stderr) as bar:

        def report(step: int, steps: int, loss: float) -> None:
            nonlocal done, mean
            # an average over about fifty steps, since single ones differ by their timesteps
            done, mean = step, loss if step == 1 else mean + (loss - mean) / min(step, 50)
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            bar.update()

        try:
            train_lora(engine, pictures, out, settings, report)
        except KeyboardInterrupt:
            bar.close()
            kept = f"{out} holds what {done} steps have learned" if done else "nothing was learned yet"
            print(kept, file=sys.stderr)
            raise
    print(out)
    return 0


def _choice(arguments: argparse.Namespace) -> ModelChoice:
    """Return what to load: on a GPU in bfloat16, unless a type is given. Raises InvalidRequest."""
    from stylefast.models.checkpoint import resolve_device

    if arguments.row_lora:
        raise InvalidRequest("--lora is for pictures; to train on top of a LoRA, give it as --merge-lora")
    choice = ModelChoice.of(arguments)
    if (backend := choice.options.get("backend", "torch")) != "torch":
        raise InvalidRequest(f"--backend {backend} runs compiled or exported graphs, which can't be trained; drop it")
    if resolve_device(choice.options.get("device", "auto")).type == "cuda":
        choice = replace(choice, options={"dtype": "bfloat16", **choice.options})
    return choice


def _settings(arguments: argparse.Namespace):
    from stylefast.commands.style_options import parse_names
    from stylefast.training.lora import LoraSettings

    same = ("rank", "alpha", "layers", "text_encoders", "steps", "batch", "resolution", "min_snr", "caption_dropout")
    given = {name: getattr(arguments, name) for name in (*same, "seed", "gradient_checkpointing")}
    given["learning_rate"] = arguments.lr
    given["blocks"] = None if arguments.blocks is None else parse_names(arguments.blocks)
    return LoraSettings(**{name: value for name, value in given.items() if value is not None})
