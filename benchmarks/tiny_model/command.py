"""Train the embedded model again: `python -m benchmarks tiny_model --out DIR`.

Stages run in order: data, vae, classifier, unet, clip, adapter, style, loras, control, eval. Each leaves its parts in
the model folder and its record in the work folder; a stage whose record is there is skipped until `--fresh`. Budgets
are minutes of wall time; their defaults made the shipped model on two cores.
"""

import argparse
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "stylefast" / "models" / "tiny" / "README.md"
STAGES = ("data", "vae", "classifier", "unet", "clip", "adapter", "style", "loras", "control", "eval")
_MINUTES = {"vae": 7.0, "classifier": 4.0, "unet": 84.0, "clip": 3.5, "adapter": 6.5, "control": 10.0}
REFERENCES = (
    ("neon", "cup", "candy"),
    ("glass", "fish", "warm"),
    ("watercolor", "boat", "cool"),
    ("woodcut", "cat", "warm"),
)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tiny_model",
        description="Train the embedded model on procedural pictures.",
        epilog="example: python -m benchmarks tiny_model --out build/tiny-model --unet-minutes 30",
    )
    parser.add_argument("--out", type=Path, default=Path("build/tiny/model"), help="the model folder to write")
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="pictures, latents and records")
    parser.add_argument("--stage", choices=("all", *STAGES), action="append", help="one stage, repeatable (all)")
    parser.add_argument("--fresh", action="store_true", help="run stages again that have a record in the work folder")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (2)")
    parser.add_argument("--pictures", type=int, default=36_000, help="size of the training pool (36000)")
    for stage, minutes in _MINUTES.items():
        parser.add_argument(f"--{stage}-minutes", type=float, default=minutes, help=f"budget ({minutes:g})")
    parser.add_argument("--style-steps", type=int, default=80, help="optimiser steps of the learned style (80)")
    parser.add_argument("--lora-steps", type=int, default=700, help="optimiser steps of each LoRA (700)")
    return parser.parse_args(argv)


def _data(args) -> dict:
    from benchmarks.tiny_model.data import make_pools

    start = time.time()
    make_pools(args.work, seed=11, train=args.pictures, validation=1440)
    return dict(minutes=round((time.time() - start) / 60, 2), pictures=args.pictures)


def _vae(args) -> dict:
    from benchmarks.tiny_model.vae import train_vae

    return train_vae(args.work, args.out, args.vae_minutes)


def _classifier(args) -> dict:
    from benchmarks.tiny_model.classifier import train_classifier

    return train_classifier(args.work, args.classifier_minutes)


def _unet(args) -> dict:
    from benchmarks.tiny_model.unet import train_unet

    return train_unet(args.work, args.out, args.unet_minutes)


def _clip(args) -> dict:
    from benchmarks.tiny_model.clip import train_clip

    record = train_clip(args.work, args.out, args.clip_minutes)
    assemble(args.out)
    return record


def _adapter(args) -> dict:
    from benchmarks.tiny_model.adapter import train_adapter

    return train_adapter(args.work, args.out, args.adapter_minutes)


def _style(args) -> dict:
    from benchmarks.tiny_model.style import train_style
    from stylefast.styles.textual_inversion import InversionSettings

    # near words and small steps: a network of this size has little to offer outside of what it has seen
    near = dict(vectors=2, initializer="neon mono", learning_rate=0.06, shared=0.0)
    return train_style(args.work, args.out, InversionSettings(steps=args.style_steps, **near))


def _loras(args) -> dict:
    from benchmarks.tiny_model.loras import train_loras

    return train_loras(args.work, args.out, args.lora_steps)


def _control(args) -> dict:
    from benchmarks.tiny_model.control import train_control

    return train_control(args.out, args.control_minutes)


def _eval(args) -> dict:
    from benchmarks.tiny_model import scores
    from benchmarks.tiny_model.classifier import load_classifier
    from benchmarks.tiny_model.pictures import CONTENTS, HELD_OUT
    from stylefast.styles.embeddings import load_embedding

    write_references(args.out)
    start = time.time()
    pipeline = scores.load_pipeline(args.out)
    classifier = load_classifier(args.work / "classifier.safetensors")
    prompts, images = scores.prompt_scores(pipeline, classifier, HELD_OUT)
    scores.sheet(images, 12).save(args.work / "prompts.png")
    style = load_embedding(args.out / "styles" / "chalk.safetensors", widths=None)
    learned, images = scores.learned_style_scores(pipeline, classifier, style, CONTENTS)
    scores.sheet(images, 12).save(args.work / "learned.png")
    references, targets = reference_set()
    result = dict(prompts=prompts, learned_style=learned)
    for name, scale in (("style_block", scores.STYLE_BLOCK_SCALE), ("all_blocks", 1.0), ("no_picture", 0.0)):
        found, images = scores.picture_scores(pipeline, args.out, classifier, references, targets, scale)
        scores.sheet(images, len(targets[0])).save(args.work / f"picture_{name}.png")
        result[f"picture_{name}"] = found
    return dict(minutes=round((time.time() - start) / 60, 2), scores=result)


_RUN: dict[str, Callable] = dict(
    data=_data,
    vae=_vae,
    classifier=_classifier,
    unet=_unet,
    clip=_clip,
    adapter=_adapter,
    style=_style,
    loras=_loras,
    control=_control,
    eval=_eval,
)


def reference_set(seed: int = 77, targets: int = 6) -> tuple[list, list]:
    """One fresh picture per style as (PIL image, style), and for each `targets` contents other than its own."""
    import numpy as np
    from PIL import Image

    from benchmarks.tiny_model.pictures import CONTENTS, PALETTES, STYLES, render

    rng = np.random.default_rng(seed)
    references, contents = [], []
    for style in STYLES:
        order = rng.permutation(len(CONTENTS))
        palette = PALETTES[rng.integers(len(PALETTES))]
        references.append((Image.fromarray(render(rng, CONTENTS[order[0]], style, palette)), style))
        contents.append([CONTENTS[index] for index in order[1 : targets + 1]])
    return references, contents


def write_references(out: Path, seed: int = 21) -> None:
    """Render the pictures that ship with the model, one per style and named after it; two combinations are held out."""
    import numpy as np
    from PIL import Image

    from benchmarks.tiny_model.pictures import render

    folder = out / "references"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for style, content, palette in REFERENCES:
        Image.fromarray(render(rng, content, style, palette)).save(folder / f"{style}.png", optimize=True)


def assemble(out: Path) -> None:
    """Write scheduler and `model_index.json`, so that the folder opens as a StableDiffusionXLPipeline."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPImageProcessor

    from benchmarks.tiny_model.clip import load_image_encoder
    from benchmarks.tiny_model.text import build_tokenizer, load_text_tower
    from benchmarks.tiny_model.unet import SCHEDULER_CONFIG

    tower = load_text_tower(out)
    has_encoder = (out / "image_encoder").is_dir()
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(out / "vae"),
        text_encoder=tower.first,
        text_encoder_2=tower.second,
        tokenizer=build_tokenizer(),
        tokenizer_2=build_tokenizer(),
        unet=UNet2DConditionModel.from_pretrained(out / "unet"),
        scheduler=EulerDiscreteScheduler(**SCHEDULER_CONFIG),
        image_encoder=load_image_encoder(out) if has_encoder else None,
        feature_extractor=CLIPImageProcessor.from_pretrained(out / "feature_extractor") if has_encoder else None,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.scheduler.save_pretrained(out / "scheduler")
    pipeline.save_config(out)
    for path in (out / "model_index.json", *out.glob("*/*config.json")):
        _clean_config(path)


def _clean_config(path: Path) -> None:
    """Drop the folder that a part was loaded from, and name the image processor as every version knows it."""
    text = path.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor")
    content = json.loads(text)
    content.pop("_name_or_path", None)
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_record(work: Path, out: Path) -> None:
    """Gather the stages' records in `out/training.json`, with versions and cores."""
    import diffusers
    import torch
    import transformers

    paths = {stage: work / f"{stage}.json" for stage in STAGES}
    records = {stage: json.loads(path.read_text()) for stage, path in paths.items() if path.exists()}
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    versions |= dict(diffusers=diffusers.__version__, transformers=transformers.__version__)
    machine = dict(cores=os.cpu_count(), processor=platform.machine())
    content = dict(stages=records, versions=versions, machine=machine)
    (out / "training.json").write_text(json.dumps(content, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    import torch

    args = _arguments(argv)
    wanted = STAGES if not args.stage or "all" in args.stage else [stage for stage in STAGES if stage in args.stage]
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for stage in wanted:
        path = args.work / f"{stage}.json"
        if path.exists() and not args.fresh:
            print(f"{stage}: done before ({path}); --fresh runs it again")
            continue
        record = _RUN[stage](args)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{stage}: {json.dumps(record)[:600]}", flush=True)
        write_record(args.work, args.out)
    if not (args.out / "README.md").exists():
        shutil.copyfile(README, args.out / "README.md")


if __name__ == "__main__":
    main()
