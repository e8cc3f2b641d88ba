"""The engine in short: requests to rows, rows to the UNet, its outputs to the next latents. Read it from top to bottom.

As plain as possible; every style goes through the same interface (`styles/style.py`) as in the engine. Left out is
what makes serving fast: pages, slots, threads, style banks, buckets, compiled graphs, GPUs. docs/architecture.md says
which part of the engine does the work of which function here, and a test requires the same latents from both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stylefast.errors import InvalidRequest
from stylefast.kernels.guided_step import guided_step
from stylefast.models import vae as vaes
from stylefast.models.lora_units import joined
from stylefast.models.masks import load_mask, mask_vectors
from stylefast.models.repaint import fit_picture
from stylefast.models.row_loras import LoraProducts, StepLoras
from stylefast.models.row_table import COLUMNS, NO_PAGE, ImageKV, RowTable
from stylefast.models.text import Prompt
from stylefast.models.unet import UNet
from stylefast.runtime.plan.request import Request
from stylefast.sampling.few_step import named_schedule
from stylefast.sampling.guidance import BRANCHES, FULL, NULL, GuidanceInterval, guidance_weights
from stylefast.sampling.schedule import Schedule
from stylefast.styles.style import ImageStyle, ReferenceStyle, Rows, Texts, by_kind

if TYPE_CHECKING:
    from stylefast.engine import Engine


@dataclass(eq=False)
class Sample:
    """One picture in progress: a requested one, or a reference that others read."""

    request: Request  # for a reference: a copy of its reader's, with the styles that both have
    prompt: str
    schedule: Schedule
    size: tuple[int, int]  # (width, height) in pixels
    weights: dict[str, float]  # of the branches that make up its prediction
    branches: tuple[str, ...]  # it has a row for each: its own and its readers'
    output: bool = True  # whether it was requested
    reader: ReferenceStyle | None = None  # the style by which it reads its references
    references: list["Sample"] = field(default_factory=list)
    leads: bool = False  # first of those that share a reference in this call
    picture: Any = None  # for a real reference: at each step it is this picture, noised to the step's level
    # made by `prepare`
    texts: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # by branch, per step: hidden, pooled
    segments: dict[str, list["Segment"]] = field(default_factory=dict)  # by branch
    loras: LoraProducts = LoraProducts(())  # LoRAs in the UNet
    of_text: list[tuple] = field(default_factory=list)  # LoRAs in the text encoders: factors, strength
    random: torch.Generator = field(default_factory=torch.Generator)
    noise: Tensor = field(default_factory=Tensor)
    clean: Tensor | None = None  # latents [channels, h, w] of `picture`
    latents: Tensor = field(default_factory=Tensor)
    anchor: Tensor = field(default_factory=Tensor)  # latents that some samplers go back to
    history: Tensor = field(default_factory=Tensor)  # the noise-free estimates of the two steps before


@dataclass
class Segment:
    """One image prompt of a row: its tokens as keys and values, where it acts, and how strongly."""

    layers: tuple  # per layer (k, v) [1, tokens, heads, d], or None where the adapter has none
    mask: tuple[Tensor, ...] | None  # per attention level [tokens]
    strength: Tensor  # [modules]
    style: ImageStyle


@torch.inference_mode()
def generate(engine: "Engine", requests: Sequence[Request]) -> list[Tensor]:
    """Run requests with the models of `engine`, a `stylefast.Engine`, on a CPU; return latents [channels, h, w].

    Raises InvalidRequest for banks, DDIM inversion, image-to-image: these are left out. Nothing else is checked.

    Examples:
        >>> from stylefast import naive
        >>> (latents,) = naive.generate(engine, [sf.Request("a fish", steps=2)])
        >>> latents.shape
        torch.Size([4, 16, 16])
    """
    samples = plan(engine, requests)
    for sample in samples:
        prepare(engine, sample)
    for step in range(max(sample.schedule.steps for sample in samples)):
        running = [sample for sample in samples if step < sample.schedule.steps]
        for size in {sample.size: None for sample in running}:
            advance(engine.unet, [sample for sample in running if sample.size == size], step)
    return [sample.latents for sample in samples if sample.output]


# 1. requests to samples


def plan(engine: "Engine", requests: Sequence[Request]) -> list[Sample]:
    """Return the samples that requests need: the requested ones, in order, then their references."""
    targets = [_target(engine, request) for request in requests]
    hidden: list[Sample] = []
    for target in targets:
        style, wanted = target.reader, target.reader and target.reader.reads
        if wanted and (wanted.bank is not None or wanted.calibrate or (wanted.pictures and wanted.noise == "ddim")):
            raise InvalidRequest("naive.py has no style banks, DDIM inversion or calibration; use Engine.generate")
        if style is None or wanted is None:
            continue
        if wanted.of_call:
            together = [other for other in targets if other.reader is style]
            together[0].leads = True
            seen = together if wanted.mutual else together[:1]
            target.references = [other for other in seen if other is not target]
        else:
            target.references = [_reference(target, style, picture) for picture in wanted.pictures or [None]]
            hidden += target.references
    samples = targets + hidden
    for _ in range(2):  # twice: samples that read one another then have one another's branches too
        for sample in samples:
            for reference in sample.references:
                reference.branches = tuple(b for b in BRANCHES if b in {*reference.branches, *sample.branches})
    return samples


def _target(engine: "Engine", request: Request) -> Sample:
    begun = request.image is not None or request.upscale > 1 or request.variation_strength
    more = begun or request.control or request.window or any(s.varies for s in request.styles_of(ImageStyle))
    if more or engine.unet.config["in_channels"] != 4:
        raise InvalidRequest("naive.py has no pictures to begin with, control, masks, windows or clean styles")
    schedule = named_schedule(request.scheduler, request.steps, engine.scheduler_config, request.spacing)
    guidance = [style.context_guidance for style in request.styles if style.context_guidance is not None]
    weights = guidance_weights(request.guidance, guidance[0] if guidance else None)
    size = request.size or engine.native_size
    return Sample(request, request.prompt, schedule, size, weights, (*weights,), reader=request.reader)


def _reference(target: Sample, style: ReferenceStyle, picture: Any) -> Sample:
    """Return a reference of `target`: a real picture, or one that is generated from the style's own prompt."""
    wanted = style.reads
    negatives, others = target.request.negatives, [other for other in target.request.styles if other is not style]
    others = [other for other in others if wanted.share_styles or other.named_in(negatives)]
    request = replace(target.request, style=others, seed=wanted.seed, prompt_2=None)
    weights = {FULL: 1.0} if picture is not None else target.weights
    given = target.schedule, target.size, weights, (*weights,)
    return Sample(request, wanted.prompt or "", *given, output=False, picture=picture)


# 2. the inputs of a sample: its texts, its image prompts, its first latents


def prepare(engine: "Engine", sample: Sample) -> None:
    """Encode a sample's prompts and pictures, and draw its noise."""
    trained = engine.scheduler_config.get("num_train_timesteps", 1000)
    timesteps = sample.schedule.timesteps.clamp(0, trained)
    texts = Texts.of(sample.request, sample.prompt, timesteps, trained, sample.branches)
    for kind, styles in by_kind(sample.request.styles).items():
        kind.write_prompts(styles, texts)
    used = [(engine.loras.factors(use.lora), use) for use in engine.loras.uses(sample.request.lora_scales)]
    sample.loras = LoraProducts(tuple((factors, use.unet) for factors, use in used))
    sample.of_text = [(factors.text, use.text) for factors, use in used]
    for branch in sample.branches:
        skip = 0 if branch == NULL else sample.request.clip_skip or 0
        states = engine.text_encoder.encode(texts.per_step[branch], texts.pooling[branch], skip, loras=sample.of_text)
        sample.texts[branch] = [(state.hidden, state.pooled) for state in states]
    width, height = sample.size
    latent_size = (height // engine.downscale, width // engine.downscale)
    sample.segments = {branch: [] for branch in sample.branches}
    for style in sample.request.styles_of(ImageStyle):
        _image_prompt(engine, sample, style, engine.unet.attention_sizes(*latent_size))
    shape = (engine.unet.config["in_channels"], *latent_size)
    sample.random.manual_seed(sample.request.seed or 0)
    sample.noise = torch.randn(shape, generator=sample.random)
    if sample.picture is not None:
        pixels = fit_picture(sample.picture, sample.size)[None].float() / 127.5 - 1
        sample.clean = vaes.encode(engine.vae, pixels)[0].float()
    sample.latents = sample.noise * sample.schedule.init_noise_scale
    sample.anchor, sample.history = torch.zeros(shape), torch.zeros(2, *shape)


def _image_prompt(engine: "Engine", sample: Sample, style: ImageStyle, levels: Sequence[tuple[int, int]]) -> None:
    """Add the segments of a style to the rows of a sample: pictures in conditional rows, "no picture" in the others."""
    adapter, encoder = engine.adapters[style.adapter or next(iter(engine.adapters))]
    words = [Prompt(text, syntax=sample.request.prompt_syntax) for text in [style.content_text] if text is not None]
    content = engine.text_encoder.encode(words, loras=sample.of_text)[0].pooled if words else None
    tokens = style.tokens(adapter, encoder, content)
    negative = adapter.key_values(tokens.negative[None])
    for number, (segment, image) in enumerate(zip(style.segments, tokens.image, strict=True)):
        plain = style.vary(adapter.key_values(image[None]), number, [None], adapter.token_count)
        layers, mask = tuple(plain[0]), None
        if segment.mask is not None:
            mask = mask_vectors(load_mask(segment.mask, (sample.size[1], sample.size[0])), levels)
        strengths = style.strengths(engine.unet.layout, NULL in sample.branches, number)
        for branch, found in sample.segments.items():
            if branch in ("full", "style"):
                entries = [(layers, strengths.conditional)]
            else:
                entries = [(layers, strengths.unconditional_image), (negative, strengths.unconditional_negative)]
            found += [Segment(kv, mask, strength, style) for kv, strength in entries if strength.any()]


# 3. samples to rows, and a step


def advance(unet: UNet, samples: Sequence[Sample], step: int) -> None:
    """Make one step of samples of one size, in one UNet call: a row for each branch of each."""
    for sample in samples:
        if sample.clean is not None:  # a real reference is where its picture would be at this step
            signal, noise = sample.schedule.forward[step].tolist()
            sample.latents = signal * sample.clean + noise * sample.noise
    rows = [(sample, branch) for sample in samples for branch in sample.branches]
    of_row = [samples.index(sample) for sample, _ in rows]
    names = ("timesteps", "input_scale", "denoised", "update")
    timesteps, scale, denoised, update = (torch.stack([getattr(s.schedule, n)[step] for s in samples]) for n in names)
    hidden, pooled = zip(*(s.texts[branch][step] for s, branch in rows), strict=True)
    lengths = torch.tensor([len(states) for states in hidden])
    # each row adds its LoRAs to the projections of its text
    kv = [unet.project_text(x[None].to(unet.dtype), sample.loras) for x, (sample, _) in zip(hidden, rows, strict=True)]
    text_kv = [tuple(pad_sequence([x[i][0] for x in layer], batch_first=True) for i in range(2)) for layer in zip(*kv)]
    image_kv, masks, table, loras = row_table(unet, rows, step)
    width, height = samples[0].size
    time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(rows), dtype=torch.float32)
    latents = torch.stack([sample.latents for sample in samples])
    seen = (latents * scale[:, None, None, None])[of_row].to(unet.dtype)
    embedding = unet.embed(timesteps[of_row], torch.stack(pooled), time_ids, loras)
    output = unet(seen, embedding, text_kv, image_kv, table, masks=masks, loras=loras, text_lengths=lengths)
    branch_rows = torch.full((len(samples), len(BRANCHES)), -1)
    branch_weights, rescale = torch.zeros(len(samples), len(BRANCHES)), torch.zeros(len(samples))
    for row, (sample, branch) in enumerate(rows):
        place = of_row[row], BRANCHES.index(branch)
        interval = GuidanceInterval(*sample.request.guidance_interval)
        weights = sample.weights if interval.covers(step, sample.schedule.steps) else {FULL: 1.0}
        branch_rows[place], branch_weights[place] = row, weights.get(branch, 0.0)
        if len(weights) > 1:  # a single branch has no deviation to rescale to
            rescale[of_row[row]] = sample.request.guidance_rescale
    # samplers without fresh noise multiply this by 0
    fresh = [torch.randn(s.latents.shape, generator=s.random) if s.schedule.uses_noise else s.noise for s in samples]
    anchor, history = torch.stack([s.anchor for s in samples]), torch.stack([s.history for s in samples])
    rules = branch_rows, branch_weights, rescale, denoised, update
    found = guided_step(latents, anchor, history, output, *rules, torch.stack(fresh))
    for sample, *state in zip(samples, *found, strict=True):
        sample.latents, sample.anchor, sample.history = state


def row_table(unet: UNet, rows: list[tuple], step: int) -> tuple[ImageKV | None, tuple, RowTable, StepLoras | None]:
    """Return the table of a step's rows, and what it refers to by number: image keys, values and masks, and LoRAs."""
    layout, place = unet.layout, {row: i for i, row in enumerate(rows)}
    written, pages, segments = Rows.idle(len(rows), len(layout.layers)), [], []
    for i, (sample, branch) in enumerate(rows):
        steps = sample.schedule.steps
        reading = sample.reader is not None and sample.reader.active(step, steps)
        # a row reads its reference's row of the same branch
        pages.append([place[reference, branch] for reference in sample.references] if reading else [])
        segments.append([segment for segment in sample.segments[branch] if segment.style.active(step, steps)])
        for style in sample.request.styles:
            if style.active(step, steps) and (pages[i] or not isinstance(style, ReferenceStyle)):
                style.write_rows(written, i, layout, sample.leads)
    sizes = {"rows": len(rows), "layers": len(layout.layers), "modules": len(layout.modules)}
    sizes |= {"references": max(map(len, pages)), "segments": max(map(len, segments))}
    used = list(dict.fromkeys(factors for sample, _ in rows for factors, _ in sample.loras.used))
    sizes["loras"] = max(len(sample.loras.used) for sample, _ in rows)
    sizes["norm_rows"] = len(rows) if written.takes_norms.any() else 0
    table = RowTable(*(column.filled(column.shape(sizes)) for column in COLUMNS.values()))
    table.text_page[:] = torch.arange(len(rows))
    arrays = {name: column.numpy() for name, column in table._asdict().items()}
    written.write(arrays, np.array([len(read) for read in pages]))
    # whose statistics AdaIN and norms take; AdaIN itself is `adain` in models/unet.py
    written.write_pages(arrays, np.array([read[0] if read else NO_PAGE for read in pages]))
    images: list[Segment] = []
    for i, (read, seen) in enumerate(zip(pages, segments, strict=True)):
        table.self_page[i, : len(read)] = torch.tensor(read)
        for j, (factors, strength) in enumerate(rows[i][0].loras.used):
            table.lora[i, j], table.lora_scale[i, j] = used.index(factors), strength
        for j, segment in enumerate(seen):
            table.image_page[i, j] = len(images)
            table.image_mask[i, j] = len(images) if segment.mask is not None else -1
            table.image_strength[i, j] = segment.strength
            images.append(segment)
    loras = joined(unet.loras, used).of_rows(table.lora, table.lora_scale) if used else None
    return (_image_kv(unet, images) if images else None), _masks(images), table, loras


def _image_kv(unet: UNet, images: Sequence[Segment]) -> ImageKV:
    """Return the keys and values of image prompts, padded to one number of tokens; layers without any are zero."""
    tokens = [next(pair for pair in segment.layers if pair is not None)[0].shape[1] for segment in images]
    layers = []
    for i, layer in enumerate(unet.layout.layers):
        pair = torch.zeros(2, len(images), max(tokens), layer.heads, layer.channels // layer.heads, dtype=unet.dtype)
        for page, segment in enumerate(images):
            for kind, stored in enumerate(segment.layers[i] or ()):
                pair[kind, page, : tokens[page]] = stored[0]
        layers.append((pair[0], pair[1]))
    return ImageKV(tuple(layers), torch.tensor(tokens))


def _masks(images: Sequence[Segment]) -> tuple[Tensor, ...]:
    """Return the masks per attention level [segments, tokens]; () if no segment has one."""
    sizes = next((tuple(len(level) for level in s.mask) for s in images if s.mask is not None), ())
    none = tuple(torch.ones(size) for size in sizes)
    return tuple(torch.stack(level) for level in zip(*(s.mask or none for s in images), strict=True))
