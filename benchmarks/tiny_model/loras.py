"""Stage 8: three small LoRAs, each from pictures of a style that the tiny model has never seen or read of.

The captions name the content only, so a LoRA brings its style to every prompt. They are trained by
`stylefast.training.lora` from a folder of pictures, as anybody's would be.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.tiny_model.pictures import CONTENTS, LORA_STYLES, PALETTES, render
from stylefast.engine import Engine
from stylefast.training.lora import LoraSettings, train_lora
from stylefast.training.pictures import read_folder

PICTURES = 144  # of each style
# the blocks that paint what the others have laid out; their convolutions learn textures that attention alone does not
SETTINGS = LoraSettings(
    rank=4,
    steps=700,
    learning_rate=4e-3,
    batch=8,
    layers="all",
    blocks=("up_blocks", "mid_block"),
    min_snr=5.0,
    seed=8,
)
_NAMED_PALETTES = 0.3  # share of the captions that name the palette


def write_pictures(folder: Path, style: str, seed: int) -> None:
    """Draw the training pictures of a style into a folder, each with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(PICTURES):
        content, palette = CONTENTS[i % len(CONTENTS)], PALETTES[i // len(CONTENTS) % len(PALETTES)]
        Image.fromarray(render(rng, content, style, palette)).save(folder / f"{i:03}.png")
        ending = f", {palette} palette" if rng.random() < _NAMED_PALETTES else ""
        (folder / f"{i:03}.txt").write_text(f"a {content}{ending}\n")


def train_loras(work: Path, out: Path, steps: int, styles: Sequence[str] = LORA_STYLES) -> dict:
    """Train `out/loras/<style>.safetensors` for every style; returns the record."""
    engine, record = Engine.from_pretrained(out, device="cpu", dtype="float32", adapter=None), {}
    (out / "loras").mkdir(exist_ok=True)
    for style in styles:
        folder, losses = work / "loras" / style, []
        write_pictures(folder, style, seed=31 + LORA_STYLES.index(style))

        def report(step: int, steps: int, loss: float, style: str = style, losses: list[float] = losses) -> None:
            losses.append(loss)
            if step % 100 == 0:
                print(f"lora {style} step {step} loss {sum(losses[-100:]) / 100:.4f}", flush=True)

        start = time.time()
        settings = replace(SETTINGS, steps=steps)
        file = train_lora(engine, read_folder(folder), out / "loras" / f"{style}.safetensors", settings, report)
        first, last = (round(sum(part) / len(part), 4) for part in (losses[:100], losses[-100:]))
        minutes = round((time.time() - start) / 60, 2)
        record[style] = dict(minutes=minutes, loss_first=first, loss_last=last, bytes=file.stat().st_size)
    return dict(steps=steps, pictures=PICTURES, rank=SETTINGS.rank, styles=record)
