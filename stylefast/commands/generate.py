"""`stylefast generate`: write PNG files from prompts, a request file, or the call recorded in a picture."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stylefast.commands.control_options import add_control_arguments, check_controls, controls_of, parse_interval
from stylefast.commands.explaining import add_explain_arguments, check_explain, check_place, explain
from stylefast.commands.model_options import ControlFile, Lora, ModelChoice, add_model_arguments, found_lora
from stylefast.errors import InvalidRequest
from stylefast.values import did_you_mean, listed, quoted, shown, shown_path

if TYPE_CHECKING:
    from stylefast.commands.files import Destination
    from stylefast.engine import Engine
    from stylefast.runtime.plan.request import LoraStrength, Request, Result

SUMMARY = "Generate pictures from prompts, in a style."
EXAMPLES = """examples:
  stylefast generate "a fish" "a house" --style-image photo.jpg --out pictures
  stylefast generate "a fish" --style-image photo.jpg --method instant --scale 0.8 --content "a dog"
  stylefast generate "a cat" "a boat" --style-prompt "a fox, watercolor" --shift 1 --seed 7
  stylefast generate "a fish" "a house" --style brand.bank
  stylefast generate "a cat" -n 4 --lora watercolor.safetensors:0.8 --model my-sdxl
  stylefast generate "a house in snow" --image photo.jpg --strength 0.5
  stylefast generate "a red door" --image photo.jpg --mask door.png
  stylefast generate "a fish" --style-image photo.jpg --explain 300,512
  stylefast generate --requests calls.json --out pictures
  stylefast generate --from pictures/0001-a-fish.png --out again.png
  stylefast generate --from theirs.png --lora watercolor.safetensors --model my-sdxl
"""
DEFAULT_OUT = "pictures"
# options that --from and --requests replace; of another program's picture, they replace what it says
_CALL_OPTIONS = (
    "prompts",
    "count",
    "prompt_2",
    "negative",
    "negative_prompt_2",
    "prompt_syntax",
    "steps",
    "guidance",
    "guidance_rescale",
    "guidance_interval",
    "spacing",
    "seed",
    "clip_skip",
    "size",
    "scheduler",
    "style",
    "style_image",
    "method",
    "style_prompt",
    "adain",
    "shift",
    "layers",
    "share_group_norm",
    "mode",
    "calibrate",
    "weights",
    "blocks",
    "scale",
    "content",
    "content_scale",
    "clean",
    "clean_negative",
    "learned",
    "towards",
    "share",
    "context",
    "image",
    "strength",
    "mask",
    "upscale",
    "upscale_strength",
    "upscale_mode",
    "variation_seed",
    "variation_strength",
    "control",
    "control_window",
    "guess_mode",
    "control_reference",
    "window",
    "window_stride",
    "wrap",
)
# written out, because the tables with the names import torch
SCHEDULERS_HELP = """\
ddim, euler, euler_karras, euler_exponential, euler_ancestral, dpmpp_2m, dpmpp_2m_karras, dpmpp_2m_exponential,
dpmpp_2m_sde, dpmpp_2m_sde_karras, dpmpp_2m_sde_exponential, dpmpp_3m, dpmpp_3m_karras, dpmpp_3m_exponential,
dpmpp_3m_sde, dpmpp_3m_sde_karras, dpmpp_3m_sde_exponential, dpmpp_sde, dpmpp_sde_karras, dpmpp_sde_exponential,
unipc, unipc_karras, unipc_exponential, lcm, tcd, or for few-step models: sdxl_turbo, sdxl_lightning,
sdxl_lightning_1step, hyper_sd, hyper_sd_unified, hyper_sd_1step_unet, dmd2, dmd2_1step"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options; None means that the option was not given."""
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what each picture shows")
    add(
        "--out",
        metavar="DIR|FILE.png|FILE.jpg",
        default=DEFAULT_OUT,
        help="folder or file to write to (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace existing files; otherwise numbering continues after them")
    add(
        "--grid",
        action=argparse.BooleanOptionalAction,
        help="also write all pictures as one grid (default: if there are several)",
    )
    add("--quiet", action="store_true", help="no progress, only the files on stdout")
    add("--requests", metavar="FILE.json", help="run the requests in this file instead of prompts")
    add(
        "--from",
        dest="source",
        metavar="PICTURE",
        help=(
            "reproduce this picture, pixel by pixel; or make one like it from the settings that A1111 and others wrote "
            "into a PNG, JPEG or WebP, where prompts and options given beside it come first; pictures that its record "
            "names but does not hold are given as --style-image, --image or --mask"
        ),
    )
    add(
        "--metadata",
        choices=("a1111", "stylefast"),
        default="a1111",
        help=(
            "a1111: also write the settings as the parameters text that A1111 and others read; stylefast: only the "
            "record (default: %(default)s)"
        ),
    )
    add("--force", action="store_true", help="with --from: continue even if the model or a LoRA has different weights")
    add(
        "--load-recorded",
        action="store_true",
        help=(
            "with --from: load the models, LoRAs and style files that the picture names; without it, only files "
            "that come with stylefast, are in the hub's cache, or are given as options"
        ),
    )
    add_provenance_arguments(add)
    add(
        "-n", "--count", type=int, metavar="N", help="number of pictures per prompt, with increasing seeds (default: 1)"
    )

    group = parser.add_argument_group("sampling").add_argument
    group("--negative", metavar="TEXT", help="what to steer away from")
    group("--prompt-2", metavar="TEXT", help="the prompt for text encoder 2 (default: the same)")
    add_text_arguments(group)
    group("--steps", type=int, help="denoising steps (default: 30, or those of --style)")
    group(
        "--guidance",
        type=float,
        help="classifier-free guidance; 1 or less turns it off (default: that of --style, "
        "1 for lcm, tcd and the few-step presets, else 5)",
    )
    group("--guidance-rescale", type=float, help="0 to 1; reduces the contrast of strong guidance (default: 0)")
    group(
        "--seed",
        type=int,
        help="seed of the first picture, increased by 1 for each further one; -1: random (default: 0)",
    )
    group("--size", metavar="WxH", help="size in pixels, divisible by 8 (default: the model's own)")
    group("--scheduler", metavar="NAME", help=f"{SCHEDULERS_HELP} (default: euler, or that of --style)")
    group(
        "--spacing",
        choices=("leading", "linspace", "trailing"),
        help="spacing of the timesteps (default: the model's own)",
    )
    group(
        "--guidance-interval",
        metavar="A-B",
        help="fractions of the steps in which guidance acts, e.g. 0-0.8 (default: 0-1)",
    )

    group = parser.add_argument_group("from a picture").add_argument
    group("--image", metavar="PICTURE", help="picture to begin with instead of noise; without --size, of its size")
    group("--strength", type=float, help="share of the steps that change it, above 0 to 1 (default: 0.6)")
    group("--mask", metavar="PICTURE", help="what of it to repaint: white is repainted, black kept")
    group("--upscale", type=float, metavar="FACTOR", help="enlarge by this factor, 1 to 4, and draw a second pass")
    group("--upscale-strength", type=float, help="share of the steps of that pass, above 0 to 1 (default: 0.4)")
    group("--upscale-mode", choices=("picture", "latents"), help="what is enlarged (default: picture)")
    group("--window", metavar="WxH", help="draw a larger picture in overlapping windows of this many pixels")
    group(
        "--window-stride", type=int, metavar="N", help="pixels between windows (default: a quarter of the smaller side)"
    )
    group("--wrap", action="store_true", default=None, help="let the left and right edge fit together; with --window")
    group("--variation-seed", type=int, metavar="N", help="seed of a noise that pictures are varied towards")
    group("--variation-strength", type=float, help="how far, 0 to 1 (default: 0, or 0.1 with --variation-seed)")

    add_control_arguments(parser.add_argument_group("control pictures").add_argument)

    group = parser.add_argument_group("style").add_argument
    group(
        "--style",
        action="append",
        metavar="FILE.bank",
        help=(
            "a style baked by `stylefast bake`, instead of aligned's reference; sets its own steps, scheduler and "
            "size; can be combined with --method instant and a --style-image"
        ),
    )
    group(
        "--style-image",
        action="append",
        metavar="PICTURE",
        help="reference picture: a file, or the name of one "
        "that comes with the model (see `stylefast info`); may be repeated",
    )
    group(
        "--method",
        choices=("aligned", "instant", "both"),
        help="aligned: self-attention is shared with the reference; instant: the picture acts through the "
        "IP-Adapter; both (default: aligned, if a reference is given). `--method "
        "aligned` without a reference aligns all pictures to the first",
    )
    group(
        "--style-prompt",
        metavar="TEXT",
        help="aligned: what the reference shows; without --style-image, the reference is generated from it",
    )
    group("--adain", metavar="PARTS", help="aligned: q,k (default), or with strengths: q=1,k=0.5, or none")
    group("--shift", type=float, help="aligned: added to the logits of the reference; 1 to 2 gives a stronger style")
    group("--layers", metavar="NAMES", help="aligned: all (default), or parts of layer names: up_blocks,mid_block")
    group("--share-group-norm", action="store_true", default=None, help="aligned: share group norm statistics as well")
    group("--mode", choices=("concat", "swap"), help="aligned: swap reads the reference's tokens instead of its own")
    group(
        "--calibrate", type=float, metavar="SHARE", help="aligned: take the reference's colours in late steps, 0 to 1"
    )
    group("--weights", metavar="N,N", help="relative weights of several --style-image, in their order: 3,1")
    group(
        "--blocks",
        metavar="PRESET",
        help="instant: style (default), layout, style+layout, all, ..., or a JSON "
        "object, or parts of layer names: up_blocks.0.attentions.1",
    )
    group(
        "--scale",
        type=float,
        help="instant, both: strength of the adapter; aligned: factor on the logits of the reference (default: 1)",
    )
    group("--content", metavar="TEXT", help="instant: what the picture shows, to be subtracted from its embedding")
    group("--content-scale", type=float, help="instant: how much of --content is subtracted (default: 0.5)")
    group(
        "--clean",
        type=float,
        metavar="STRENGTH",
        help="instant: damp what of the picture's tokens is content (CleanStyle; the paper has 0.01)",
    )
    group("--clean-negative", type=float, metavar="STRENGTH", help="with --clean: of the unconditional branch (0.2)")
    group(
        "--learned",
        action="append",
        metavar="NAME|FILE",
        help="a learned style: a file, or the name of one that comes with the model; may be repeated",
    )
    group("--towards", metavar="NAME|FILE", help="another learned style, towards which the one of --learned is turned")
    group("--share", type=float, help="with --towards: how far, 0 to 1 (default: 0.5)")
    group("--context", metavar="TEXT", help="words about the content, placed before the learned style's clause")
    add_explain_arguments(parser.add_argument_group("a look inside").add_argument)
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make the pictures and write them."""
    _check_combination(arguments)
    if arguments.source is not None:
        from stylefast.commands.again import run_again
        from stylefast.commands.files import foreign_parameters
        from stylefast.commands.foreign import run_foreign

        text = foreign_parameters(arguments.source)
        if text is not None:
            return run_foreign(arguments, text)
        _check_call("--from", arguments, but=("style_image", "image", "mask", "control"))
        return run_again(arguments)
    choice = ModelChoice.of(arguments)
    if arguments.requests is not None:
        requests, loras, nets = read_requests(Path(arguments.requests), choice.folder)
        named = {net.name for net in choice.control_net}
        choice = replace(choice, control_net=(*choice.control_net, *(net for net in nets if net.name not in named)))
        scaled = next((lora for lora in choice.row_lora if not lora.plain), None)
        if scaled is not None:
            raise InvalidRequest(
                f"--lora {scaled.words()} has a strength, but the requests of {arguments.requests} say their own; drop "
                "it here"
            )
        given = {lora.name for lora in choice.row_lora}
        choice = replace(choice, row_lora=(*choice.row_lora, *(lora for lora in loras if lora.name not in given)))
    else:
        requests = requests_of(arguments, choice.folder, {lora.name: lora.strengths for lora in choice.row_lora})
    check_loras(requests, [lora.name for lora in choice.row_lora])
    check_controls(requests, [net.name for net in choice.control_net])
    check_schedules(requests)
    check_explain(arguments, requests)
    prompts = [request.prompt for request in requests]
    destination = destination_of(arguments, prompts)
    loaded = choice.recorded()  # early: a file deleted or changed meanwhile must not cost finished pictures
    engine = load(choice, arguments.quiet)
    check_place(engine, requests[0], arguments)
    result = make(engine, requests, arguments.quiet)
    paths = save(destination, result, loaded, arguments.grid)
    explain(engine, requests[0], arguments, paths[0])
    return 0


def add_provenance_arguments(group: Callable[..., Any]) -> None:
    """Add the options for marks of generated pictures, with `group`, an `add_argument`."""
    group(
        "--no-provenance",
        action="store_true",
        help="leave out IPTC's mark for generated pictures (trainedAlgorithmicMedia), which all pictures have in XMP",
    )
    group("--c2pa-certificate", metavar="FILE", help="PEM file with the certificates that sign pictures, for C2PA")
    group("--c2pa-key", metavar="FILE", help="PEM file with the private key of --c2pa-certificate")
    group("--require-provenance", action="store_true", help="refuse to make pictures that would not be signed")


def destination_of(arguments: argparse.Namespace, prompts: Sequence[str]) -> "Destination":
    """Return where the pictures of these prompts go, and how they are marked. Raises what `Destination` raises."""
    from stylefast.commands.files import Destination
    from stylefast.provenance import Provenance

    provenance = Provenance.of(
        not arguments.no_provenance, arguments.c2pa_certificate, arguments.c2pa_key, arguments.require_provenance
    )
    return Destination(arguments.out, prompts, arguments.overwrite, arguments.metadata == "a1111", provenance)


def add_text_arguments(group: Callable[..., Any]) -> None:
    """Add the options for negative prompts, syntaxes and clip skip, with `group`, an `add_argument`."""
    group("--negative-prompt-2", metavar="TEXT", help="the negative prompt for text encoder 2 (default: the same)")
    group(
        "--prompt-syntax",
        choices=("plain", "a1111", "compel"),
        help="how prompts write weights: a1111 as (fish:1.3), compel as fish++ (default: plain, without any)",
    )
    group(
        "--clip-skip",
        type=int,
        metavar="N",
        help="use the text encoders' states N layers earlier, as diffusers counts them (default: 0)",
    )


def _check_call(option: str, arguments: argparse.Namespace, but: Sequence[str] = ()) -> None:
    """Raise InvalidRequest for settings beside an option that sets all of them, `but` some."""
    given = [name for name in _CALL_OPTIONS if name not in but and getattr(arguments, name) not in (None, [])]
    if given:
        shown = "prompts" if given[0] == "prompts" else f"--{given[0].replace('_', '-')}"
        raise InvalidRequest(f"{option} sets all settings of the call; drop {shown}")


def _check_combination(arguments: argparse.Namespace) -> None:
    if arguments.requests is not None:
        _check_call("--requests", arguments)
    if arguments.source is not None and arguments.requests is not None:
        raise InvalidRequest("--from and --requests can't be combined; give one")
    for option in ("force", "load_recorded"):
        if getattr(arguments, option) and arguments.source is None:
            raise InvalidRequest(f"--{option.replace('_', '-')} needs --from")
    if not arguments.prompts and arguments.source is None and arguments.requests is None:
        raise InvalidRequest('no prompt was given; say what the picture shows, e.g. stylefast generate "a fish"')


def check_loras(requests: Sequence, names: Sequence[str]) -> None:
    """Raise InvalidRequest for requests whose LoRA's file was not given, and for files that no request uses."""
    for request in requests:
        for name in request.lora_scales:
            if name not in names:
                raise InvalidRequest(
                    f"a request uses the LoRA {quoted(name)}; give its file: --lora FOLDER/{name[:100]}.safetensors "
                    f"(given: {listed(names)}{did_you_mean(name, names)})"
                )
    unused = [name for name in names if not any(name in request.lora_scales for request in requests)]
    if unused:
        raise InvalidRequest(f"no request uses the LoRA {quoted(unused[0])}; drop its --lora, or name it in a request")


def requests_of(
    arguments: argparse.Namespace,
    model_folder: Path,
    loras: "Mapping[str, LoraStrength] | None" = None,
    usual: Mapping | None = None,
) -> list:
    """Return --count Requests per prompt, with increasing seeds; `usual`: settings where no option says otherwise.

    Raises InvalidRequest or a subclass.
    """
    from stylefast.commands.style_options import bank_settings, styles_of
    from stylefast.runtime.plan.request import Request
    from stylefast.values import seeds

    styles, given = styles_of(arguments, model_folder), sampling_settings(arguments)
    if arguments.prompt_2 is not None:
        given["prompt_2"] = arguments.prompt_2
    if arguments.guidance_interval is not None:
        given["guidance_interval"] = parse_interval(arguments.guidance_interval)
    given |= _picture_settings(arguments, model_folder)
    control = controls_of(arguments, model_folder)
    if control:
        given["control"] = control
    settings = with_preset_guidance({**(usual or {}), **bank_settings(styles, given), **given})
    prompts = [prompt for prompt in arguments.prompts for _ in range(_count(arguments))]
    numbered = zip(prompts, seeds("--seed", arguments.seed or 0, len(prompts)), strict=True)
    return [Request(prompt, seed=seed, style=styles, loras=loras, **settings) for prompt, seed in numbered]


def _picture_settings(arguments: argparse.Namespace, model_folder: Path) -> dict:
    """Return the Request fields for what pictures begin with. Raises InvalidRequest and ImageError."""
    from stylefast.record import parse_size
    from stylefast.record_values import find_picture

    names = ("image", "strength", "mask", "upscale", "upscale_strength", "upscale_mode")
    names += ("variation_seed", "variation_strength", "window", "window_stride", "wrap")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    for name in ("strength", "mask"):
        if name in given and "image" not in given and arguments.source is None:
            raise InvalidRequest(f"--{name} says what becomes of a picture; give it as --image")
    for name in ("image", "mask"):
        if name in given:
            given[name] = find_picture(given[name], model_folder)
    if "window" in given:
        given["window"] = parse_size(given["window"], "--window")
    if "variation_seed" in given:
        given.setdefault("variation_strength", 0.1)
    return given


def _count(arguments: argparse.Namespace) -> int:
    from stylefast.record import MAX_REQUESTS

    count = 1 if arguments.count is None else arguments.count
    if not 1 <= count * len(arguments.prompts) <= MAX_REQUESTS:
        raise InvalidRequest(
            f"--count is {quoted(count)} for {len(arguments.prompts)} prompts; it must be at least 1, and a call "
            f"generates at most {MAX_REQUESTS} pictures"
        )
    return count


def sampling_settings(arguments: argparse.Namespace) -> dict:
    """Return the Request fields given by sampling options. Raises InvalidRequest."""
    from stylefast.record import parse_size

    given = {
        "negative_prompt": arguments.negative,
        "negative_prompt_2": arguments.negative_prompt_2,
        "prompt_syntax": arguments.prompt_syntax,
        "clip_skip": arguments.clip_skip,
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "guidance_rescale": arguments.guidance_rescale,
        "size": None if arguments.size is None else parse_size(arguments.size),
        "scheduler": arguments.scheduler,
        "spacing": arguments.spacing,
    }
    return {name: value for name, value in given.items() if value is not None}


def with_preset_guidance(settings: dict) -> dict:
    """Return `settings` with the guidance that the few-step preset was made for, unless guidance is given."""
    from stylefast.sampling.few_step import FEW_STEP_PRESETS

    preset = FEW_STEP_PRESETS.get(settings.get("scheduler", ""))
    return settings if preset is None else {"guidance": preset.guidance} | settings


def read_requests(file: Path, model_folder: Path) -> tuple[list, tuple[Lora, ...], tuple[ControlFile, ...]]:
    """Return the requests of a JSON file, and its LoRAs and control networks; relative paths start at its folder.

    Beside "requests" and "styles" it may have "loras" and "controls": {name: file, or name of one that comes with the
    model}. Raises InvalidRequest or a subclass.
    """
    from stylefast.record import from_record
    from stylefast.record_values import shipped
    from stylefast.values import path, read_json

    call, folder = read_json(file, f"the request file {shown_path(file)}"), file.expanduser().resolve().parent

    def files(key: str, kind: str) -> dict[str, str]:
        found, own = call.pop(key, {}) if isinstance(call, dict) else {}, shipped(model_folder, kind)
        if not isinstance(found, dict):
            raise InvalidRequest(
                f'"{key}" of {shown_path(file)} is {quoted(found)}; it must be names with files: '
                '{"ink": "ink.safetensors"}'
            )
        paths = {}
        for name, given in found.items():
            place = path(f"{quoted(name)} of {key}", given)
            beside = str(own[given] if given in own and not (folder / place).exists() else folder / place)
            paths[name] = found_lora(key, beside)
        return paths

    loras = tuple(Lora(found, own_name=name) for name, found in files("loras", "loras").items())
    nets = tuple(ControlFile(found, name) for name, found in files("controls", "control").items())
    return from_record(call, folder, model_folder), loras, nets


def check_schedules(requests: Sequence) -> None:
    """Raise InvalidRequest for unknown schedulers or settings they don't accept, before a model is loaded."""
    from stylefast.runtime.plan.pinning import scheduler_config
    from stylefast.sampling.few_step import named_schedule
    from stylefast.sampling.guidance import GuidanceInterval, branch_weights_per_step
    from stylefast.sampling.noise_levels import SDXL_SCHEDULER

    for request in requests:
        named_schedule(request.scheduler, request.steps, scheduler_config(request, SDXL_SCHEDULER), request.spacing)
        branch_weights_per_step({}, request.steps, GuidanceInterval(*request.guidance_interval))


def load(choice: ModelChoice, quiet: bool):
    """Load the engine, with a message on stderr."""
    if quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # of downloads
    else:
        print(f"loading {shown(choice.model)} ...", file=sys.stderr)
    return choice.load()


def make(engine: "Engine", requests: Sequence["Request"], quiet: bool) -> "Result":
    """Return the Result of `requests`, with a progress bar over the steps."""
    from tqdm import tqdm

    with tqdm(total=max(request.steps for request in requests), unit="step", disable=quiet) as bar:

        def advance(step: int, steps: int, latents) -> None:
            # sizes take turns, each with its own number of steps
            bar.total = steps
            bar.n = step
            bar.refresh()

        return engine.generate(list(requests), callback=advance)


def save(
    destination: "Destination", result: "Result", loaded: Mapping, grid: bool | None, show: bool = True
) -> list[Path]:
    """Write pictures with their records inside, and the grid; return all paths, and print them unless `show` is False.

    loaded: what the model was loaded from, `ModelChoice.recorded`.

    Raises InvalidRequest and StyleFastError for pictures that could not be written, once the others are shown.
    """
    metadata = [
        {**one, "size": list(image.size), "load": dict(loaded)}
        for one, image in zip(result.metadata, result.images, strict=True)
    ]
    sheet = None
    if grid or (grid is None and len(result.images) > 1):
        from stylefast.presentation import picture_grid

        sheet = picture_grid(result.images)
    paths, problem = destination.write(result.images, metadata, sheet)
    if show:
        for path in paths:
            print(path)
    if problem is not None:
        raise problem
    return paths
