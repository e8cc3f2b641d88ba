"""Scores of the embedded model: content and style found by the classifier in pictures of stock diffusers.

Three measurements: prompts that name content and style, for all 144 combinations; prompts that name the content only
with a picture as the style (InstantStyle: IP-Adapter in the style block); and the learned multi-stage style.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.tiny_model.classifier import PictureClassifier, classify
from stylefast.models.text import Prompt, TextEncoder
from stylefast.styles.embeddings import StageEmbedding

STYLE_BLOCK_SCALE = {"up": {"block_0": [0.0, 1.0, 0.0]}}


@dataclass(frozen=True)
class Score:
    """Shares of pictures in which the classifier finds what was asked for; `pictures` is how many were judged."""

    content: float
    style: float
    both: float
    pictures: int

    def as_dict(self) -> dict[str, float]:
        shares = {name: round(getattr(self, name), 4) for name in ("content", "style", "both")}
        return shares | {"pictures": self.pictures}


def score(classifier: PictureClassifier, images: np.ndarray, contents: Sequence[str], styles: Sequence[str]) -> Score:
    """Judge floats in 0..1 `[n, height, width, 3]` against the names that were asked for."""
    verdict = classify(classifier, images)
    content = torch.tensor([classifier.contents.index(name) for name in contents]) == verdict.content.argmax(1)
    style = torch.tensor([classifier.styles.index(name) for name in styles]) == verdict.style.argmax(1)
    shares = ((hits.float().mean().item()) for hits in (content, style, content & style))
    return Score(*shares, len(images))


def load_pipeline(folder: str | Path):
    """Load the model folder in stock diffusers, fp32, without progress bars."""
    from diffusers import StableDiffusionXLPipeline

    given = dict(torch_dtype=torch.float32, add_watermarker=False)
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(folder), **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline, prompts: Sequence[str], seed: int, steps: int, guidance: float, batch: int = 36, **given
) -> np.ndarray:
    """Pictures of prompts as floats in 0..1 `[n, 64, 64, 3]`; picture i starts from the noise of seed + i."""
    parts = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        pictures = pipeline(
            part, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np", **given
        )
        parts.append(pictures.images)
    return np.concatenate(parts)


def prompt_scores(
    pipeline,
    classifier: PictureClassifier,
    held_out: frozenset[tuple[str, str]],
    seed: int = 0,
    steps: int = 25,
    guidance: float = 4.0,
) -> tuple[dict[str, dict], np.ndarray]:
    """Scores of "a <content> in <style> style" for every pair of the first 12 styles, and the 144 pictures.

    `held_out` names the (content, style) pairs that training never saw; they are counted apart as well.
    """
    styles = classifier.styles[:12]
    pairs = [(content, style) for style in styles for content in classifier.contents]
    images = draw(pipeline, [f"a {content} in {style} style" for content, style in pairs], seed, steps, guidance)
    contents, wanted = zip(*pairs, strict=True)
    result = {"all": score(classifier, images, contents, wanted).as_dict()}
    kept = [i for i, pair in enumerate(pairs) if pair in held_out]
    rows = [pairs[i] for i in kept]
    result["held_out"] = score(classifier, images[kept], [c for c, _ in rows], [s for _, s in rows]).as_dict()
    for style in styles:
        rows = [i for i, pair in enumerate(pairs) if pair[1] == style]
        result[style] = score(classifier, images[rows], classifier.contents, [style] * len(rows)).as_dict()
    return result, images


def picture_scores(
    pipeline,
    folder: str | Path,
    classifier: PictureClassifier,
    references: Sequence[tuple[Image.Image, str]],
    targets: Sequence[Sequence[str]],
    scale: float | dict = 1.0,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 4.0,
) -> tuple[dict, np.ndarray]:
    """Scores of "a <content>" with a picture of a known style, `references` (picture, style), as IP-Adapter prompt.

    `targets` lists each reference's contents; `scale` is what diffusers' `set_ip_adapter_scale` takes.
    """
    pipeline.load_ip_adapter(str(folder), subfolder="ip_adapter", weight_name="ip-adapter_tiny.safetensors")
    pipeline.set_ip_adapter_scale(scale)
    images, contents, styles = [], [], []
    for index, ((picture, style), names) in enumerate(zip(references, targets, strict=True)):
        prompts = [f"a {name}" for name in names]
        embeds = pipeline.prepare_ip_adapter_image_embeds([picture], None, "cpu", len(prompts), guidance > 1)
        given = dict(batch=len(prompts), ip_adapter_image_embeds=embeds)
        drawn = draw(pipeline, prompts, seed + 1000 * index, steps, guidance, **given)
        images.append(drawn)
        contents += names
        styles += [style] * len(names)
    # unloading drops the image encoder as well, which the next call needs
    kept = {part: getattr(pipeline, part) for part in ("image_encoder", "feature_extractor")}
    pipeline.unload_ip_adapter()
    pipeline.register_modules(**kept)
    images = np.concatenate(images)
    return score(classifier, images, contents, styles).as_dict(), images


@torch.no_grad()
def learned_style_scores(
    pipeline,
    classifier: PictureClassifier,
    style: StageEmbedding,
    contents: Sequence[str],
    template: str = "a painting of a {content} in the style of <{name}>",
    seed: int = 0,
    steps: int = 25,
    guidance: float = 4.0,
) -> tuple[dict, np.ndarray]:
    """Scores of a learned multi-stage style, its vectors swapped at each timestep's stage, by a DDIM loop."""
    from diffusers import DDIMScheduler

    encoder = TextEncoder(
        (pipeline.tokenizer, pipeline.tokenizer_2), (pipeline.text_encoder, pipeline.text_encoder_2), force_zeros=True
    )
    texts = [template.format(content=content, name=style.name) for content in contents]
    stages = []
    for stage in range(style.stages):
        states = encoder.encode([Prompt(text, {style.name: style.stage(stage)}) for text in texts])
        states = encoder.encode([Prompt(None)] * len(texts)) + states
        stages.append((torch.stack([s.hidden for s in states]), torch.stack([s.pooled for s in states])))
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(steps)
    train_steps = scheduler.config.num_train_timesteps
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
    latents = torch.cat([torch.randn(1, 4, 16, 16, generator=generator) for generator in generators])
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2 * len(texts), -1)
    for timestep in scheduler.timesteps:
        hidden, pooled = stages[int(timestep) * style.stages // train_steps]
        added = dict(text_embeds=pooled, time_ids=sizes)
        noise = pipeline.unet(torch.cat([latents] * 2), timestep, hidden, added_cond_kwargs=added).sample
        empty, full = noise.chunk(2)
        latents = scheduler.step(empty + guidance * (full - empty), timestep, latents).prev_sample
    images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    images = ((images.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    return score(classifier, images, contents, [style.name] * len(images)).as_dict(), images


def sheet(images: np.ndarray, columns: int) -> Image.Image:
    """Pictures side by side, row by row; floats in 0..1 `[n, height, width, 3]`."""
    pixels = (np.clip(images, 0, 1) * 255 + 0.5).astype(np.uint8)
    rows = [np.concatenate(list(pixels[i : i + columns]), 1) for i in range(0, len(pixels), columns)]
    return Image.fromarray(np.concatenate(rows, 0))
