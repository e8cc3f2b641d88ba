"""`stylefast bake`: run a style's reference once and keep the result in a file for `generate --style`."""

import argparse
import shlex
import sys
import time
from pathlib import Path

from stylefast.commands.bank_report import CONTENTS, shown_bytes
from stylefast.commands.generate import (
    SCHEDULERS_HELP,
    add_text_arguments,
    check_schedules,
    load,
    sampling_settings,
    with_preset_guidance,
)
from stylefast.commands.model_options import DEFAULT_MODEL, ModelChoice, add_model_arguments
from stylefast.commands.style_options import find_pictures, one_or_all, parse_names
from stylefast.errors import InvalidRequest
from stylefast.values import typed_path

SUMMARY = "Run a style's reference once and store it in a file for later pictures."
EXAMPLES = """examples:
  stylefast bake --style-image photo.jpg --out brand.bank --steps 20
  stylefast bake --style-prompt "a fox, watercolor" --store hidden --store-dtype fp16
  stylefast generate "a fish" "a house" --style brand.bank
"""
SUFFIX = ".bank"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options; None means that the option was not given."""
    add = parser.add_argument
    add("--out", metavar="FILE.bank", help="file to write (default: named after the picture or prompt)")
    add("--overwrite", action="store_true", help="replace an existing file")
    add("--quiet", action="store_true", help="no progress, only the file on stdout")

    group = parser.add_argument_group("reference").add_argument
    group(
        "--style-image",
        action="append",
        metavar="PICTURE",
        help="a file, or the name of a picture that comes with the model (see `stylefast info`); may be repeated",
    )
    group(
        "--style-prompt",
        metavar="TEXT",
        help="what the reference shows; without --style-image, the reference is generated from it",
    )
    group("--seed", type=int, help="seed of the reference's noise (default: 0)")
    group(
        "--noise",
        choices=("forward", "ddim"),
        help=(
            "how a picture is noised to a step's level; ddim inverts it under --style-prompt and needs --scheduler "
            "ddim (default: forward)"
        ),
    )

    group = parser.add_argument_group("sampling; pictures must use the same values to use the bank").add_argument
    group("--steps", type=int, help="denoising steps (default: 30)")
    group("--scheduler", metavar="NAME", help=f"{SCHEDULERS_HELP} (default: euler)")
    group(
        "--spacing",
        choices=("leading", "linspace", "trailing"),
        help="spacing of the timesteps (default: the model's own)",
    )
    group("--size", metavar="WxH", help="size in pixels, divisible by 8 (default: the model's own)")
    group(
        "--guidance",
        type=float,
        help=(
            "guidance of a reference generated from a prompt; 1 or less bakes a bank for pictures without "
            "guidance, of half the size (default: 1 for lcm, tcd and the few-step presets, else 5)"
        ),
    )
    group("--guidance-rescale", type=float, help="guidance rescale of a reference generated from a prompt (default: 0)")
    group("--negative", metavar="TEXT", help="what to steer the reference away from")
    add_text_arguments(group)

    group = parser.add_argument_group("storage").add_argument
    group(
        "--store",
        choices=tuple(CONTENTS),
        help="kv: keys and values, largest and fastest; hidden: the states they "
        "are projected from, half as large; latents: kilobytes, the reference runs again (default: kv)",
    )
    group(
        "--store-dtype",
        choices=("auto", "fp32", "fp16", "bf16", "fp8"),
        help="type of the stored values (default: auto, the model's)",
    )
    group("--layers", metavar="NAMES", help="all (default), or parts of layer names: up_blocks,mid_block")
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Bake the style and print the file's path."""
    from stylefast.commands.folder_lock import beside, only_writer
    from stylefast.runtime.banks.baking import bake_request

    choice = ModelChoice.of(arguments)
    style = _style(arguments, choice.folder)
    settings = with_preset_guidance(sampling_settings(arguments))
    settings["loras"] = {lora.name: lora.strengths for lora in choice.row_lora}
    request = bake_request(style, settings)
    check_schedules([request])
    out = _target(arguments, style)
    # a second process baking the same file would waste its work, so it fails at once
    with only_writer(out, beside(out), patience=0, required=True):
        engine = load(choice, arguments.quiet)
        store = arguments.store or "kv"
        if not arguments.quiet:
            print(_plan(engine, request, store, arguments.store_dtype or "auto", out), file=sys.stderr)
        start = time.perf_counter()
        _bake(engine, style, settings, store, out, arguments)
    if not arguments.quiet:
        size, seconds = shown_bytes(out.stat().st_size), time.perf_counter() - start
        print(f"{out}: {size} in {seconds:.1f} s; use it with\n  {_use(arguments, choice, out)}", file=sys.stderr)
    print(out)
    return 0


def _style(arguments: argparse.Namespace, model_folder: Path):
    from stylefast.styles.style import style_of_option

    pictures = find_pictures(arguments.style_image, model_folder)
    if not pictures and arguments.style_prompt is None:
        raise InvalidRequest("nothing to bake; give --style-image photo.jpg or --style-prompt TEXT")
    if not pictures and arguments.noise is not None:
        raise InvalidRequest("--noise applies to a reference picture; give --style-image as well, or drop it")
    if arguments.store == "latents" and arguments.store_dtype not in (None, "auto", "fp32"):
        raise InvalidRequest(f"--store latents always stores fp32; drop --store-dtype {arguments.store_dtype}")
    if arguments.store == "latents" and arguments.layers not in (None, "all"):
        raise InvalidRequest(
            "--store latents stores no layers and works with all of them; give --layers to `generate` instead"
        )
    given = {
        "reference": one_or_all(pictures),
        "prompt": arguments.style_prompt,
        "seed": arguments.seed,
        "noise": arguments.noise,
        "layers": parse_names(arguments.layers),
    }
    return style_of_option("aligned")(**{name: value for name, value in given.items() if value is not None})


def _target(arguments: argparse.Namespace, style) -> Path:
    """Return the file to write. Raises InvalidRequest if it can't be written."""
    from stylefast.commands.files import slug

    if arguments.out is not None:
        out = typed_path("--out", arguments.out)
    else:
        out = Path((Path(style.reads.pictures[0]).stem if style.reads.pictures else slug(style.reads.prompt)) + SUFFIX)
    if out.is_dir():
        raise InvalidRequest(f"{out} is a folder; give --out a file in it: {out / 'brand'}{SUFFIX}")
    if out.suffix != SUFFIX:
        raise InvalidRequest(
            f"--out is {out}; style banks are recognised by their suffix, so name it {out.stem}{SUFFIX}"
        )
    if not out.parent.is_dir():
        raise InvalidRequest(f"the folder {out.parent} does not exist; create it, or choose another --out")
    if out.exists() and not arguments.overwrite:
        raise InvalidRequest(f"{out} exists; pass --overwrite to replace it, or choose another --out")
    return out


def _plan(engine, request, store: str, dtype: str, out: Path) -> str:
    """Describe the bank to be baked and its expected size."""
    from stylefast.runtime.banks.baking import DTYPES
    from stylefast.sampling.guidance import guidance_weights
    from stylefast.styles.bank_size import bank_bytes

    style, (width, height) = request.reader, request.size or engine.native_size
    kind = str(engine.unet.dtype).removeprefix("torch.") if dtype == "auto" else DTYPES[dtype]
    layers = style.layer_mask(engine.unet.layout).nonzero().flatten().tolist()
    expected = bank_bytes(
        engine.unet.config,
        (width, height),
        request.steps,
        len(guidance_weights(request.guidance)),
        len(style.reads.pictures) or 1,
        store,
        kind,
        layers,
        engine.downscale,
    )
    content = CONTENTS[store] if store == "latents" else f"{CONTENTS[store]} in {kind}"
    return (
        f"baking {out}: {request.steps} steps of {request.scheduler} at {width}x{height}, {content}, "
        f"about {shown_bytes(expected)}"
    )


def _bake(engine, style, settings: dict, store: str, out: Path, arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    with tqdm(unit="step", disable=arguments.quiet) as bar:

        def advance(step: int, steps: int) -> None:
            bar.total, bar.n = steps, step
            bar.refresh()

        engine.bake(
            style,
            **settings,
            store=store,
            dtype=arguments.store_dtype or "auto",
            path=out,
            overwrite=arguments.overwrite,
            callback=advance,
        )


def _use(arguments: argparse.Namespace, choice: ModelChoice, out: Path) -> str:
    """Return the command that uses the bank, with the options that `generate` can't read from it."""
    words = ["stylefast", "generate", "a fish", "--style", str(out)]
    for name in ("spacing", "layers"):
        if getattr(arguments, name) is not None:
            words += [f"--{name}", getattr(arguments, name)]
    words += ["--model", choice.model] if choice.model != DEFAULT_MODEL else []
    words += [word for lora in choice.lora for word in ("--merge-lora", lora.words())]
    words += [word for lora in choice.row_lora for word in ("--lora", lora.words())]
    kind = choice.options.get("prediction_type")
    words += ["--prediction-type", kind] if kind is not None else []
    return shlex.join(words)
