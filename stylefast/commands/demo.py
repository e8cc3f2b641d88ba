"""`stylefast demo`: the styles side by side on the embedded model, with the command that makes each row."""

import argparse
import json
import os
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stylefast.commands import generate
from stylefast.commands.model_options import ModelChoice, add_model_arguments
from stylefast.errors import InvalidRequest, StyleError
from stylefast.values import typed_path

SUMMARY = "Generate pictures in every style of the embedded model, and a page that compares them."
EXAMPLES = """examples:
  stylefast demo --out build/demo
  then open build/demo/index.html
"""
PAGE, SHEET = "index.html", "sheet.png"
# marker file: this command wrote the folder and may replace it
MARK = ".stylefast-demo"
SHOWN_WIDTH = 192  # 3 screen pixels per pixel of the embedded model

STYLES = ("neon", "woodcut", "watercolor", "mosaic")
CONTENTS = ("house", "cat", "boat", "mushroom")
ALIGNED = ("--shift", "1", "--share-group-norm")
STRENGTHS = ("0.25", "0.5", "0.75", "1")
MIXED = 0.6  # strength of each of two LoRAs on one picture
# of a call's words: stands for the demo's folder, which has another name while it is written
HERE = "{demo}/"
MASK = "mask.png"
LINES = "lines.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options."""
    parser.add_argument("--out", metavar="DIR", default="stylefast-demo", help="folder to write (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that contains other files")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_model_arguments(parser)


@dataclass(frozen=True)
class Call:
    """One `stylefast generate`: its folder in the demo, a title, the prompts and options, and its reference picture.

    With `loras` (for each picture, name of a LoRA that comes with the model -> strength) the call has one prompt and a
    file of requests.
    """

    name: str
    title: str
    words: tuple[str, ...]
    reference: str | None = None  # name of a picture that comes with the model
    loras: tuple[Mapping[str, float], ...] = ()
    drawing: str | None = None  # file of the demo that its pictures follow


@dataclass(frozen=True)
class Chapter:
    """Calls to compare."""

    title: str
    text: str
    calls: tuple[Call, ...]


def run(arguments: argparse.Namespace) -> int:
    """Make all pictures in a temporary folder, then rename it to --out; an older demo there is replaced."""
    from stylefast.commands.folder_lock import beside, only_writer

    out = typed_path("--out", arguments.out).absolute()
    _check_folder(out, arguments.overwrite)
    choice = ModelChoice.of(arguments)
    if choice.row_lora:
        raise InvalidRequest("the demo's requests use no LoRA; merge one into the model: --merge-lora")
    chapters = plan(choice.folder, arguments.steps)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with only_writer(out, beside(out), patience=0, required=True):
            _remove_parts(out)
            part = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
            try:
                part.mkdir()
                (part / MARK).touch()
                engine = generate.load(choice, arguments.quiet)
                _make_all(chapters, engine, choice, arguments, part)
                _replace(out, part)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise InvalidRequest(f"can't write {out} ({error.strerror or error}); choose another --out") from error
    if not arguments.quiet:
        print(f"open {(out / PAGE).as_uri()}", file=sys.stderr)
    print(Path(arguments.out) / PAGE)
    return 0


def _replace(out: Path, part: Path) -> None:
    """Rename a finished demo to `out`; the old one stays whole until then."""
    old = out.with_name(f"{part.name}-old")
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(part, out)
    except OSError:
        if old.exists():
            os.rename(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_parts(out: Path) -> None:
    """Remove leftovers of killed demos; restore the old demo if one was killed between the two renames."""
    parts = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}(-old)?")
    for path in sorted(out.parent.iterdir()):
        match = parts.fullmatch(path.name)
        if match and match[1] and not out.exists():
            os.rename(path, out)
        elif match and (path / MARK).is_file() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def plan(model_folder: Path, steps: int) -> tuple[Chapter, ...]:
    """Return the demo's chapters, using the pictures and learned styles that come with the model. Raises StyleError."""
    from stylefast.record_values import shipped

    references, learned = list(shipped(model_folder, "references")), list(shipped(model_folder, "styles"))
    if not references or not learned:
        raise StyleError(
            f"the demo needs a reference picture and a learned style that come with the model; {model_folder} has "
            f"{len(references)} and {len(learned)}; leave --model out to use the embedded one"
        )
    return (
        _aligned_chapter(),
        _picture_chapter(references),
        _instant_chapter(references[0]),
        _learned_chapter(learned[0]),
        _composed_chapter(references[-1], learned[0]),
        _begun_chapter(references[0], references[-1], steps),
        *_control_chapters(list(shipped(model_folder, "control")), references),
        _wide_chapter(references[0], _native_side(model_folder)),
        _inside_chapter(references, _native_side(model_folder)),
        _clean_chapter(references),
        *_lora_chapters(list(shipped(model_folder, "loras"))),
    )


def _aligned_chapter() -> Chapter:
    calls = []
    for i, style in enumerate(STYLES):
        prompts = (f"a fish in {style} style", *(f"a {content}" for content in CONTENTS))
        seed = ("--seed", str(10 * i))
        calls.append(
            Call(
                f"aligned-{style}",
                f"{style}, aligned: the first picture is the reference",
                (*prompts, *seed, "--method", "aligned", *ALIGNED),
            )
        )
        calls.append(Call(f"plain-{style}", f"{style}, the same prompts and seeds without it", (*prompts, *seed)))
    text = (
        "Only the first prompt names a style. Aligned pictures share self-attention with the first and take its style; "
        "otherwise each has a style of its own."
    )
    return Chapter("Aligned: one style for a set of prompts", text, tuple(calls))


def _picture_chapter(references: Sequence[str]) -> Chapter:
    prompts = (*(f"a {content}" for content in CONTENTS), "--seed", "50")
    calls = [
        Call(
            f"aligned-picture-{name}",
            f"in the style of the picture {name}",
            (*prompts, "--style-image", name, *ALIGNED),
            name,
        )
        for name in references[:2]
    ]
    text = (
        "The reference is a picture from a file: at every step it is brought to that step's noise level and "
        "attended to."
    )
    plain = Call("plain-picture", "the same prompts and seeds without it", prompts)
    return Chapter("Aligned: the style of a real picture", text, (*calls, plain))


def _instant_chapter(reference: str) -> Chapter:
    prompts = ("a house", "a flower", "a rocket", "--seed", "70", "--style-image", reference, "--method", "instant")
    calls = [
        Call(
            f"instant-{strength}", f"the style blocks, strength {strength}", (*prompts, "--scale", strength), reference
        )
        for strength in STRENGTHS
    ]
    everywhere = (*prompts, "--scale", "1", "--blocks", "all")
    calls.append(Call("instant-all", "all blocks, strength 1", everywhere, reference))
    text = (
        "The picture acts through an IP-Adapter in the attention modules that carry style: in SDXL that is one of "
        "eleven, in this small model the three of up_blocks.1. Prompts and seeds are the same in every row."
    )
    return Chapter("Picture prompts: strength, and where they act", text, tuple(calls))


def _learned_chapter(learned: str) -> Chapter:
    prompts = (*(f"a {content}" for content in CONTENTS), "--seed", "90")
    calls = (
        Call("learned", f"the learned style {learned}", (*prompts, "--learned", learned)),
        Call("plain-learned", "the same prompts and seeds without it", prompts),
    )
    text = (
        "A style that the model was never trained on, learned as one token with vectors of its own for each stage "
        "of the noise."
    )
    return Chapter("A learned style", text, calls)


def _composed_chapter(reference: str, learned: str) -> Chapter:
    prompts = (*(f"a {content}" for content in CONTENTS), "--seed", "110", "--style-image", reference)
    both = ("--method", "both", "--scale", "0.6")
    calls = (
        Call(
            "composed",
            f"aligned to {reference}, with it as a picture prompt, and with the learned style {learned}",
            (*prompts, *both, "--learned", learned),
            reference,
        ),
        Call("composed-two", "without the learned style", (*prompts, *both), reference),
    )
    text = (
        "The three methods work on different columns of one table, so they compose: shared self-attention, image "
        "tokens, text."
    )
    return Chapter("All three at once", text, calls)


def _begun_chapter(picture: str, style: str, steps: int) -> Chapter:
    def share(strength: float) -> str:
        return f"{max(strength, 1 / max(steps, 1)):g}"  # at least a step runs

    prompts = (*(f"a {content}" for content in CONTENTS[:3]), "--seed", "130")
    start = (*prompts, "--image", picture)
    large = ("--upscale", "1.5", "--upscale-strength", share(0.2))
    calls = [
        Call(
            f"begun-{strength}",
            f"begun with {picture}, strength {strength}",
            (*start, "--strength", share(strength)),
            picture,
        )
        for strength in (0.5, 0.7, 0.9)
    ]
    calls += [
        Call(
            "begun-styled",
            f"begun with {picture}, strength 0.8, aligned to {style}",
            (*start, "--strength", share(0.8), "--style-image", style, *ALIGNED),
            style,
        ),
        Call(
            "repainted",
            f"{picture} repainted within a circle",
            (*start, "--mask", f"{HERE}{MASK}", "--strength", share(0.9)),
            picture,
        ),
        Call(
            "enlarged",
            "one and a half times as large, by a second pass from each picture",
            # in a style, since the embedded model's plain pictures have little to hold on to at a size it does not know
            (*(f"{prompt} in {STYLES[0]} style" for prompt in prompts[:3]), *prompts[3:], *large),
        ),
    ]
    text = (
        "A picture takes the place of the noise: its shapes and colours stay the more, the lower the strength. Outside "
        "the mask its pixels stay as they are."
    )
    return Chapter("From a picture: image to image, repainting, a second pass", text, tuple(calls))


def _native_side(model_folder: Path) -> int:
    """Return the side in pixels of the pictures that a model was trained on."""
    unet, vae = (json.loads((model_folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def _wide_chapter(style: str, side: int) -> Chapter:
    wide = ("--size", f"{3 * side}x{side}", "--window", f"{side}x{side}", "--seed", "60", "--count", "2")
    calls = (
        Call("wide", "three times as wide, in windows", ("a house in watercolor style", *wide)),
        Call("wide-around", "the right edge continues at the left", ("a house in watercolor style", *wide, "--wrap")),
        Call("wide-styled", f"aligned to {style}", ("a house", *wide, "--style-image", style, *ALIGNED), style),
    )
    text = (
        "Windows of the model's own size overlap and agree in every step; all of them read the same reference. This "
        "model has seen single things alone, so it repeats them."
    )
    return Chapter("Panoramas", text, calls)


def _inside_chapter(references: Sequence[str], side: int) -> Chapter:
    words = ("--seed", "154", *ALIGNED, "--method", "both", "--explain", f"{side // 4},{side // 2}")
    calls = tuple(
        Call(f"inside-{name}", f"a fish in the style of {name}", ("a fish", *words, "--style-image", name), name)
        for name in references[:2]
    )
    text = (
        "Which part of its own picture and of the reference does the marked point read, and where does the picture "
        "prompt act? Bright is much. Each command writes a page with every step and block beside its picture."
    )
    return Chapter("A look inside", text, calls)


def _clean_chapter(references: Sequence[str]) -> Chapter:
    prompts = ("a house", "a flower", "a rocket", "--seed", "70")
    strong = ("--method", "instant", "--blocks", "all", "--scale", "2")
    calls = []
    for name in references[:2]:
        start = (*prompts, "--style-image", name)
        calls += [
            Call(f"leaking-{name}", f"{name} as a strong picture prompt in all blocks", (*start, *strong), name),
            Call(
                f"clean-{name}",
                "the same, cleaned of content",
                (*start, *strong, "--clean", "0.2", "--clean-negative", "0"),
                name,
            ),
        ]
    swap = (*prompts, "--style-image", references[0], "--mode", "swap", "--layers", "up_blocks")
    calls += [
        Call("swap", f"aligned to {references[0]}, reading its tokens instead of their own", swap, references[0]),
        Call("calibrated", "the same with its colours", (*swap, "--calibrate", "1"), references[0]),
    ]
    text = (
        "A strong picture prompt brings the reference's object along. CleanStyle damps what of the picture's tokens is "
        "content. Swap mode keeps the prompt's shapes; calibration brings the reference's colours back."
    )
    return Chapter("Style apart from content", text, tuple(calls))


def _control_chapters(networks: Sequence[str], references: Sequence[str]) -> tuple[Chapter, ...]:
    """Return the chapter of lines that pictures follow; none for a model without a network for edges."""
    if "edges" not in networks:
        return ()
    prompts = [f"a fish in {style} style" for style in STYLES]
    lines = ("--control-net", "edges", "--control", f"{HERE}{LINES}:1.5")
    seed = ("--seed", "154")
    calls = [
        Call("lines", "the lines of a fish, in four styles", (*prompts, *seed, *lines), drawing=LINES),
        Call("lines-off", "the same prompts and seeds without the lines", (*prompts, *seed)),
    ]
    calls += [
        Call(
            f"lines-{name}",
            f"content by the lines, style by the picture {name}",
            ("a fish", *seed, "--count", "4", *lines, "--style-image", name, *ALIGNED),
            name,
            drawing=LINES,
        )
        for name in references[:2]
    ]
    text = (
        "A T2I-Adapter that comes with the model follows the lines of a drawing; the style comes from words, or from a "
        "reference that the lines leave alone."
    )
    return (Chapter("Content by lines, style by reference", text, tuple(calls)),)


def _lines(side: int = 64):
    """Return the demo's control picture: the outline of a fish that swims to the right, white on black."""
    from PIL import Image, ImageChops, ImageDraw, ImageFilter

    body, eye = Image.new("L", (64, 64)), Image.new("L", (64, 64))
    draw = ImageDraw.Draw(body)
    draw.ellipse((17, 18, 58, 45), fill=255)
    draw.polygon(((22, 31), (6, 18), (9, 32), (5, 46)), fill=255)
    draw.polygon(((30, 19), (34, 11), (46, 21)), fill=255)
    ImageDraw.Draw(eye).ellipse((46, 25, 51, 30), fill=255)
    outlines = [ImageChops.difference(shape, shape.filter(ImageFilter.MinFilter(3))) for shape in (body, eye)]
    return ImageChops.lighter(*outlines).resize((side, side), Image.Resampling.NEAREST).convert("RGB")


def _circle(side: int = 64):
    """Return the demo's mask: a white circle on black."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).ellipse((side // 4, side // 4, side - side // 4, side - side // 4), fill=255)
    return mask


def _words(call: Call, folder: Path) -> list[str]:
    """Return a call's words for a demo in a folder."""
    return [str(folder / word.removeprefix(HERE)) if word.startswith(HERE) else word for word in call.words]


def _lora_chapters(names: Sequence[str]) -> tuple[Chapter, ...]:
    """Return the chapter of the LoRAs that come with the model; none for a model without."""
    if not names:
        return ()
    settings: list[Mapping[str, float]] = [{name: 1.0} for name in names[:3]]
    if len(names) > 1:
        settings.append(dict.fromkeys(names[:2], MIXED))
    words = ("a boat", "--seed", "5")
    calls = (
        Call("loras", "one prompt and one seed under LoRAs, all in one batch", words, loras=tuple(settings)),
        Call("plain-loras", "the same prompt and seed without them", words),
    )
    text = (
        "Each picture of the row has LoRAs of its own, at its own strengths; they are added per row of the batch, and "
        "the model's weights stay as they are."
    )
    return (Chapter("LoRAs: one prompt, a LoRA for each picture", text, calls),)


def command_of(call: Call, choice: ModelChoice, steps: int, folder: str) -> list[str]:
    """Return the command line, as words, that makes a call's pictures."""
    if call.loras:
        words = ["--requests", f"{folder}.json"]
    else:
        words = [*_words(call, Path(folder).parent), "--steps", str(steps)]
    return ["stylefast", "generate", *words, "--no-grid", *choice.words(), "--out", folder]


def _requests_of(call: Call, parsed: argparse.Namespace, folder: Path, choice: ModelChoice) -> list:
    """Return a call's requests; for those with LoRAs of their own, write the file that `command_of` names."""
    from dataclasses import replace

    from stylefast.record import to_record

    requests = generate.requests_of(parsed, choice.folder)
    if call.loras:
        requests = [replace(request, loras=loras) for request in requests for loras in call.loras]
        used = dict.fromkeys(name for setting in call.loras for name in setting)
        call_and_files = to_record(requests, choice.folder) | {"loras": {name: name for name in used}}
        record = json.dumps(call_and_files, indent=1)
        (folder / f"{call.name}.json").write_text(record + "\n", encoding="utf-8")
    return requests


def _caption(request) -> str:
    """Return the prompt, or what LoRAs the picture has: "pixel", or "gold 0.6 + pixel 0.6"."""
    used = request.lora_scales
    parts = [name if scale.unet == 1 else f"{name} {scale.unet:g}" for name, scale in used.items()]
    return " + ".join(parts) or request.prompt


def _make_all(chapters: Sequence[Chapter], engine, choice, arguments: argparse.Namespace, folder: Path) -> None:
    from PIL import Image
    from tqdm import tqdm

    from stylefast import presentation
    from stylefast.commands.files import Destination
    from stylefast.provenance import MARKED
    from stylefast.record_values import find_picture, shipped

    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    sections, sheet, loaded = [], [], choice.recorded()
    _circle().save(folder / MASK)
    _lines().save(folder / LINES)
    for name, network in shipped(choice.folder, "control").items():
        if name not in engine.controls:
            engine.controls.add(network, name)
    calls = sum(len(chapter.calls) for chapter in chapters)
    names = {name for chapter in chapters for call in chapter.calls for loras in call.loras for name in loras}
    for name, file in shipped(choice.folder, "loras").items():
        if name in names and name not in engine.loras:
            engine.loras.add(file, name)
    with tqdm(total=calls, unit="row", disable=arguments.quiet, file=sys.stderr) as bar:
        for chapter in chapters:
            rows = []
            for call in chapter.calls:
                bar.set_description(call.name)
                command = command_of(call, choice, arguments.steps, str(Path(arguments.out) / call.name))
                parsed = parser.parse_args([*_words(call, folder), "--steps", str(arguments.steps)])
                requests = _requests_of(call, parsed, folder, choice)
                destination = Destination(folder / call.name, [request.prompt for request in requests])
                result = generate.make(engine, requests, quiet=True)
                paths = generate.save(destination, result, loaded, grid=False, show=False)
                figures = [
                    presentation.Figure(f"{call.name}/{path.name}", _caption(request))
                    for path, request in zip(paths, requests, strict=True)
                ]
                if parsed.explain is not None:
                    figures = _explained(engine, requests[0], parsed, paths[0], call.name)
                if call.reference is not None:
                    copy = _copy_reference(Path(find_picture(call.reference, choice.folder)), folder)
                    figures.insert(0, presentation.Figure(copy, f"reference: {call.reference}", is_reference=True))
                if call.drawing is not None:
                    figures.insert(0, presentation.Figure(call.drawing, "lines", is_reference=True))
                rows.append(presentation.Row(call.title, tuple(figures), shlex.join(command)))
                pictures = [Image.open(folder / figure.source).convert("RGB") for figure in figures]
                size = result.images[0].size
                named = f": {', '.join(map(_caption, requests))}" if call.loras else ""
                sheet.append((call.title + named, [presentation.fitted(picture, size) for picture in pictures]))
                bar.update()
            sections.append(presentation.Section(chapter.title, chapter.text, tuple(rows)))
    text = (
        "Content comes from the prompt, style from a reference. Below each row stands the command that makes it again."
    )
    page = presentation.html_page("stylefast: the demo", text, sections, SHOWN_WIDTH)
    (folder / PAGE).write_text(page, encoding="utf-8")
    whole = presentation.labelled_sheet(sheet, scale=2 if size[0] <= 256 else 1)
    (folder / SHEET).write_bytes(MARKED.encode(whole, "png"))


def _explained(engine, request, parsed: argparse.Namespace, picture: Path, name: str) -> list:
    """Write the page that explains a picture; return the figures that the demo shows of it."""
    from stylefast.commands.explaining import write_page
    from stylefast.presentation import Figure

    page, found = write_page(engine, request, parsed, picture)
    folder = f"{name}/{page.parent.name}"
    read = f"{found.reference_map().sum():.0%} of what the point reads"
    own = f"{found.own_map().sum():.0%} of what the point reads"
    return [
        Figure(f"{folder}/picture.png", f"{request.prompt}, and the point"),
        Figure(f"{folder}/own.png", f"its own picture: {own}"),
        Figure(f"{folder}/reference-1.png", f"the reference: {read}"),
        Figure(f"{folder}/image-prompt.png", "where the picture prompt acts"),
    ]


def _copy_reference(picture: Path, folder: Path) -> str:
    target = folder / "references" / picture.name
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(picture, target)
    return f"references/{picture.name}"


def _check_folder(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InvalidRequest(f"{out} is a file; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).exists() and not overwrite:
        raise InvalidRequest(f"{out} contains other files; choose another --out, or pass --overwrite to replace them")
