"""Style kept and content leaked: how often the classifier finds the reference's style and its object in pictures.

    python -m benchmarks leak [--sets 24] [--steps 20] [--sheets build/leak]

Every set has a reference, an object in a style that InstantStyle takes in all blocks at strength 2, and prompts that
name other objects and no style. "style" is the share of pictures with the reference's style, "content" that of pictures
with the object of their prompt, and "leak" that of pictures with the reference's object. Writes
benchmarks/results/leak-cpu.json.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

import stylefast as sf
from benchmarks.environment import environment
from benchmarks.tiny_model.pictures import CONTENTS, PALETTES, STYLES, render
from benchmarks.tiny_quality import TARGETS, Bench

RESULTS = Path(__file__).parent / "results" / "leak-cpu.json"
PAPERS = "clean 0.01, negative 0.2 (the paper's)"
STRENGTHS = (0.01, 0.05, 0.2, 1.0)


def measured(bench: Bench, name: str, make_style) -> dict:
    """Return the shares of style, content and leak in the pictures of all sets."""
    found, shown = [], []
    for k, (style, _, contents, drawing) in enumerate(bench.drawings()):
        prompts = [f"a {content}" for content in contents[1:]]
        images = bench.engine.generate(prompts, make_style(drawing), seed=100 * k, **bench.settings).images
        shown += [drawing, *images]
        seen = zip(*bench.verdicts(images), contents[1:], strict=True)
        found += [(s == style, c == content, c == contents[0]) for c, s, content in seen]
    bench.sheet(name, shown, TARGETS + 1)
    shares = np.array(found, dtype=float).mean(0)
    return {"pictures": len(found), **dict(zip(("style", "content", "leak"), shares.round(3).tolist(), strict=True))}


def plans() -> dict:
    """Return the styles to measure, by name: functions of the reference's drawing.

    At strength 1 the embedded model's adapter does not leak; at 2, in all blocks, it does.
    """

    def instant(strength=None, negative=0.0):
        clean = None if strength is None else sf.CleanStyle(strength=strength, negative=negative)
        return lambda drawing: sf.InstantStyle(drawing, blocks="all", scale=2.0, clean=clean)

    return {
        "no style": lambda drawing: None,
        "as it is": instant(),
        PAPERS: instant(0.01, 0.2),
        **{f"clean {strength:g}": instant(strength) for strength in STRENGTHS},
        "clean 0.2, negative 0.2": instant(0.2, 0.2),
    }


def cost(bench: Bench, rounds: int = 15) -> dict:
    """Return how long a step of cleaned pictures takes, as a multiple of others', in turns, once both are encoded."""
    drawing = Image.fromarray(render(np.random.default_rng(1), CONTENTS[0], STYLES[0], PALETTES[0], 64))
    styles = [sf.InstantStyle(drawing, blocks="all", clean=clean) for clean in (None, sf.CleanStyle())]
    prompts, ratios = [f"a {content}" for content in CONTENTS[1:5]], []
    for turn in range(rounds + 1):
        seconds = []
        for style in styles if turn % 2 else styles[::-1]:
            start = time.perf_counter()
            bench.engine.generate(prompts, style, seed=turn, output="latents", **bench.settings)
            seconds.append(time.perf_counter() - start)
        plain, clean = seconds if turn % 2 else seconds[::-1]
        if turn:  # the first encodes
            ratios.append(clean / plain)
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).round(4).tolist()
    return {"rounds": rounds, "clean / plain": middle, "quartiles": [low, high]}


def markdown(found: dict) -> str:
    """Return the table of docs/styles.md."""
    lines = [
        "| pictures of a strong image prompt (all blocks, strength 2) | reference's style | prompt's object | "
        "reference's object |",
        "|---|---|---|---|",
    ]
    for name in ("as it is", PAPERS, *(f"clean {strength:g}" for strength in STRENGTHS[1:])):
        shares = found["results"][name]
        lines.append(f"| {name} | {shares['style']:.1%} | {shares['content']:.1%} | {shares['leak']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=24, help=f"sets of {TARGETS} pictures per measurement")
    parser.add_argument("--only", default="leak,cost", help="leak, cost (on an idle machine), or both")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    bench = Bench(arguments.steps, arguments.guidance, arguments.sets, arguments.sheets)
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if "leak" in arguments.only:
        results = {}
        for name, make_style in plans().items():
            start = time.perf_counter()
            results[name] = measured(bench, name, make_style)
            print(f"{name:40} {results[name]}  {time.perf_counter() - start:.0f} s", flush=True)
        found |= {"settings": {**bench.settings, "sets": arguments.sets}, "results": results}
        found["environment"] = environment("cpu")
    if "cost" in arguments.only:
        found["cost"] = cost(bench) | {"environment": environment("cpu")}
        print("clean / plain:", found["cost"]["clean / plain"], found["cost"]["quartiles"])
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
