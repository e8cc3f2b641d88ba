"""Multi-stage textual inversion: one style as T sets of word vectors, one for each stage of the noise schedule.

After DreamStyler (Ahn et al., 2023), eq. 2: minimise E |eps - eps_theta(z_t, t, prompt with S_k)|^2 over the vectors
S_0 .. S_{T-1} alone, with k = floor(t T / 1000). Stage 0 is the low-noise end. Each step draws the same number of
timesteps in every stage, so that no stage idles.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stylefast import values
from stylefast.errors import InvalidRequest, StyleError
from stylefast.models.text import Prompt, TextEncoder, token_table
from stylefast.styles.embeddings import StageEmbedding

# (noisy latents [rows, c, h, w], timesteps [rows], hidden [rows, tokens, width], pooled [rows, width]) -> noise
NoisePredictor = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class InversionSettings:
    """Settings for learning a style.

    `stages` T; `vectors` n, words per stage; `steps` optimiser steps, of which the first `shared` part moves all stages
    together; `per_stage` timesteps drawn in each stage and step; `learning_rate` in units of the mean length of the
    vocabulary's vectors; `initializer` one or several words, each one token of both tokenizers, at which the vectors
    start in turn.
    """

    stages: int = 6
    vectors: int = 1
    steps: int = 500
    shared: float = 0.2
    per_stage: int = 4
    learning_rate: float = 0.05
    initializer: str = "painting"
    seed: int = 0

    def __post_init__(self):
        checked: dict[str, Any] = {
            name: values.whole_number(name, getattr(self, name), 1)
            for name in ("stages", "vectors", "steps", "per_stage")
        }
        checked["shared"] = values.real_number("shared, a share of the steps,", self.shared, 0, 1)
        checked["learning_rate"] = values.real_number("learning_rate", self.learning_rate, above=0)
        checked["initializer"] = values.prompt("initializer", self.initializer, error=InvalidRequest)
        checked["seed"] = values.whole_number("seed", self.seed, 0, values.MAX_SEED)
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def initial_vectors(encoder: TextEncoder, words: str) -> tuple[Tensor, Tensor]:
    """Return the vectors of the words for both encoders, `[words, width 1]` and `[words, width 2]`.

    Raises `StyleError` for a word that is not one token.
    """

    def of(tokenizer, model) -> Tensor:
        ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words.split()]
        if not ids or any(len(tokens) != 1 for tokens in ids):
            found = ", ".join(str(len(tokens)) for tokens in ids)
            raise StyleError(
                f"the initializer {values.quoted(words)} is {found or 0} tokens; choose a word that is a single token"
            )
        return token_table(model)[[tokens[0] for tokens in ids]].detach().float().clone()

    first, second = (of(*pair) for pair in zip(encoder.tokenizers, encoder.encoders, strict=True))
    return first, second


def stage_timesteps(stages: int, per_stage: int, train_steps: int, generator: torch.Generator) -> Tensor:
    """Draw uniformly inside each stage, `[stages * per_stage]`, stage by stage; t belongs to (t * T) // train_steps."""
    edges = [-(-train_steps * k // stages) for k in range(stages + 1)]
    drawn = [torch.randint(a, b, (per_stage,), generator=generator) for a, b in zip(edges, edges[1:], strict=False)]
    return torch.cat(drawn)


def invert_style(
    predict_noise: NoisePredictor,
    encoder: TextEncoder,
    latents: Tensor,
    captions: Sequence[str],
    alphas: Tensor,
    name: str,
    settings: InversionSettings | None = None,
    loss_weights: Tensor | None = None,
) -> tuple[StageEmbedding, list[float]]:
    """Learn the style that pictures share.

    `latents` `[pictures, c, h, w]`, scaled as the UNet takes them; `captions` one a picture, each with the placeholder
    `<name>` and all that is not style spelled out; `alphas` the cumulative signal power of each training timestep;
    `loss_weights` a factor for each of them, 1 by default as in the paper.
    The networks stay as they are. Returns the vectors and the plain error of every step. Raises `StyleError`
    for captions that do not fit.
    """
    settings = settings or InversionSettings()
    if len(captions) != len(latents):
        raise StyleError(f"{len(captions)} captions for {len(latents)} pictures; give one caption per picture")
    for caption in captions:
        if f"<{name}>" not in caption:
            raise StyleError(f"the caption {values.quoted(caption)} does not hold the placeholder <{name}>; add it")
    generator = torch.Generator().manual_seed(settings.seed)
    rows, optimizer = _starting_rows(encoder, settings, generator)
    train_steps, losses = len(alphas), []
    loss_weights = torch.ones(train_steps) if loss_weights is None else loss_weights
    for step in tqdm(range(settings.steps), desc=f"learning <{name}>", mininterval=5):
        decay = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * decay * min(1, (step + 1) / 20)
        noisy, timesteps, noise, prompts = _draw(latents, captions, alphas, name, settings, rows, generator)
        states = encoder.encode(prompts)
        hidden = torch.stack([state.hidden for state in states])  # [rows, tokens, width]
        pooled = torch.stack([state.pooled for state in states])  # [rows, width]
        errors = (predict_noise(noisy, timesteps, hidden, pooled).float() - noise).square().mean((1, 2, 3))
        gradients = torch.autograd.grad((loss_weights[timesteps] * errors).mean(), rows)
        together = step < settings.shared * settings.steps
        for row, gradient in zip(rows, gradients, strict=True):
            gradient = gradient * settings.stages
            row.grad = gradient.mean(0, keepdim=True).expand_as(row) if together else gradient
        optimizer.step()
        losses.append(errors.detach().mean().item())
    clip_l, clip_g = (row.detach() for row in rows)
    metadata = {
        "initializer": settings.initializer,
        "steps": str(settings.steps),
        "lr": str(settings.learning_rate),
        "norm_policy": "free",
        "num_train_timesteps": str(train_steps),
        "train_prompts": " | ".join(captions),
    }
    return StageEmbedding(name, clip_l, clip_g, "eos", metadata), losses


def _starting_rows(
    encoder: TextEncoder, settings: InversionSettings, generator: torch.Generator
) -> tuple[list[Tensor], torch.optim.Adam]:
    """Return the vectors to learn, `[stages, vectors, width]` for each encoder, and their optimiser."""
    rows, rates = [], []
    for words, model in zip(initial_vectors(encoder, settings.initializer), encoder.encoders, strict=True):
        length, width = token_table(model).detach().float().norm(dim=1).mean().item(), words.shape[1]
        start = words[torch.arange(settings.vectors) % len(words)].expand(settings.stages, -1, -1).clone()
        # equal vectors get equal gradients, so several of a stage start a little apart
        if settings.vectors > len(words):
            start = start + 0.1 * length * torch.randn(settings.vectors, width, generator=generator) / width**0.5
        rows.append(start.requires_grad_())
        rates.append(dict(params=[rows[-1]], base=settings.learning_rate * length / width**0.5))
    return rows, torch.optim.Adam(rates, lr=0.0, betas=(0.9, 0.99))


def _draw(latents, captions, alphas, name, settings, rows, generator) -> tuple[Tensor, Tensor, Tensor, list[Prompt]]:
    """Return noisy latents, timesteps, noise and prompts of one step, stage by stage."""
    count = settings.stages * settings.per_stage
    timesteps = stage_timesteps(settings.stages, settings.per_stage, len(alphas), generator)
    chosen = torch.randint(0, len(latents), (count,), generator=generator)
    stage_rows = [tuple(row[k] for row in rows) for k in range(settings.stages)]
    prompts = [
        Prompt(captions[index], {name: stage_rows[place // settings.per_stage]})
        for place, index in enumerate(chosen.tolist())
    ]
    noise = torch.randn(count, *latents.shape[1:], generator=generator)
    signal = alphas[timesteps][:, None, None, None]
    return signal.sqrt() * latents[chosen] + (1 - signal).sqrt() * noise, timesteps, noise, prompts
