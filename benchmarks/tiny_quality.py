"""Quality of the embedded model and the three styles on it, judged by the classifier of `benchmarks.tiny_model`.

    python -m benchmarks.tiny_quality [--sets 12] [--steps 20] [--sheets build/quality]

Writes benchmarks/results/tiny-quality.json: shares of pictures in which the classifier finds the requested content and
style. In styled sets the prompt names the content, and only the reference gives the style.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import stylefast as sf
from benchmarks.tiny_model.classifier import classify, load_classifier
from benchmarks.tiny_model.pictures import CONTENTS, HELD_OUT, PALETTES, STYLES, render

RESULTS = Path(__file__).parent / "results" / "tiny-quality.json"
TARGETS = 5


class Bench:
    """One engine, one classifier, and the same settings for every measurement."""

    def __init__(self, steps: int, guidance: float, sets: int, sheets: Path | None):
        self.engine = sf.Engine.from_pretrained("tiny", device="cpu")
        self.classifier = load_classifier()
        self.settings = {"steps": steps, "guidance": guidance, "scheduler": "euler"}
        self.sets, self.sheets = sets, sheets

    def verdicts(self, images) -> tuple[list[str], list[str]]:
        verdict, names = classify(self.classifier, images), self.classifier
        contents, styles = verdict.content.argmax(1), verdict.style.argmax(1)
        return [names.contents[i] for i in contents], [names.styles[i] for i in styles]

    def sheet(self, name: str, images: list, columns: int) -> None:
        if self.sheets is None:
            return
        self.sheets.mkdir(parents=True, exist_ok=True)
        width, height = images[0].size
        sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
        for i, image in enumerate(images):
            sheet.paste(image, (i % columns * width, i // columns * height))
        sheet.save(self.sheets / f"{name}.png")

    def prompts(self) -> dict:
        """Measure all combinations of content and style, named in the prompt."""
        pairs = [(content, style) for style in STYLES for content in CONTENTS]
        requests = [
            sf.Request(f"a {content} in {style} style, {PALETTES[i % len(PALETTES)]} palette", seed=i, **self.settings)
            for i, (content, style) in enumerate(pairs)
        ]
        images = []
        for start in range(0, len(requests), 36):
            images += self.engine.generate(requests[start : start + 36]).images
        self.sheet("prompts", images, len(CONTENTS))
        contents, styles = self.verdicts(images)
        right = [(c == pair[0], s == pair[1]) for c, s, pair in zip(contents, styles, pairs, strict=True)]
        unseen = [r for r, pair in zip(right, pairs, strict=True) if pair in HELD_OUT]
        return {**_shares(right), "held_out": _shares(unseen)}

    def drawings(self, count: int = TARGETS) -> Iterator[tuple[str, str, list[str], Image.Image]]:
        """Yield each set's style and palette, its contents, the reference's first, and the reference's drawing."""
        rng = np.random.default_rng(7)
        for k in range(self.sets):
            style, palette = STYLES[k % len(STYLES)], PALETTES[int(rng.integers(len(PALETTES)))]
            contents = [CONTENTS[i] for i in rng.permutation(len(CONTENTS))[: count + 1]]
            drawing = render(np.random.default_rng(1000 + k), contents[0], style, palette, 64)
            yield style, palette, contents, Image.fromarray(drawing)

    def styled(self, name: str, make_style, *, picture: bool, count: int = TARGETS) -> dict:
        """Measure sets of prompts that name only the content, with a reference in some style."""
        right, shown = [], []
        for k, (style, palette, contents, drawing) in enumerate(self.drawings(count)):
            prompts = [f"a {content}" for content in contents[1:]]
            reference = f"a {contents[0]} in {style} style, {palette} palette"
            shared = {"seed": 100 * k, **self.settings}
            if picture:
                images = self.engine.generate(prompts, make_style(drawing, reference), **shared).images
                shown += [drawing, *images]
            else:
                every = self.engine.generate([reference, *prompts], make_style(None, None), **shared)
                images, shown = every.images[1:], shown + every.images
            found, styles = self.verdicts(images)
            right += [(f == c, s == style) for f, s, c in zip(found, styles, contents[1:], strict=True)]
        self.sheet(name, shown, count + 1)
        return _shares(right)


def _shares(right: list[tuple[bool, bool]]) -> dict:
    content, style = (sum(pair[i] for pair in right) / len(right) for i in range(2))
    both = sum(all(pair) for pair in right) / len(right)
    return {"pictures": len(right), "content": round(content, 3), "style": round(style, 3), "both": round(both, 3)}


def measure(bench: Bench) -> dict:
    """Return every measurement by name."""

    def aligned(**changes):
        return lambda drawing, prompt: sf.StyleAligned(drawing, prompt=prompt, **changes)

    def instant(**arguments):
        return lambda drawing, prompt: sf.InstantStyle(drawing, **arguments)

    plans = {
        "plain": (lambda drawing, prompt: None, False),
        "aligned_paper": (aligned(), False),
        "aligned_group_norm": (aligned(share_group_norm=True), False),
        "aligned_shift_1_group_norm": (aligned(shift=1.0, share_group_norm=True), False),
        "aligned_shift_1_group_norm_adain_v": (aligned(shift=1.0, share_group_norm=True, adain=("q", "k", "v")), False),
        "aligned_picture_shift_1_group_norm": (aligned(shift=1.0, share_group_norm=True), True),
        "instant_style": (instant(blocks="style"), True),
        "instant_sdxl_style_block": (instant(blocks=["up_blocks.0.attentions.1"]), True),
        "instant_all": (instant(blocks="all"), True),
    }
    results = {}
    for name, (make_style, picture) in plans.items():
        start = time.perf_counter()
        results[name] = bench.styled(name, make_style, picture=picture)
        print(f"{name:36} {results[name]}  {time.perf_counter() - start:.0f} s", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=12, help=f"sets of {TARGETS} targets per measurement")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    bench = Bench(arguments.steps, arguments.guidance, arguments.sets, arguments.sheets)
    start = time.perf_counter()
    prompts = bench.prompts()
    print(f"{'prompts':36} {prompts}", flush=True)
    result = {
        "model": {"name": bench.engine.name, "fingerprint": bench.engine.fingerprint},
        "settings": {**bench.settings, "sets": arguments.sets, "targets_per_set": TARGETS},
        "environment": {
            "cpu_count": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "stylefast": sf.__version__,
        },
        "prompts": prompts,
        **measure(bench),
    }
    result["seconds"] = round(time.perf_counter() - start, 1)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
