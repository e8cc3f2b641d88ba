"""One style, some prompts, and one model that draws them cached, uncached, plain, or as published."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

import stylefast as sf
from benchmarks.runtime.cases import Run
from benchmarks.runtime.models import Model

REFERENCE, REFERENCE_SEED = "a fish in neon style", 3
PROMPTS = ("a cat", "a house", "a boat", "a mushroom", "a tree", "a bird", "a car", "a flower")
SEED = 11


@dataclass(eq=False)
class Scene:
    """Settings of all runs on one model; the model is made and the style baked on first use."""

    make: Callable[[], Model]
    steps: int = 20
    guidance: float = 5.0
    pictures: bool = False  # True: decode to pictures; False: compare latents
    side: int | None = None  # of square pictures in pixels; None: the model's own size
    banks: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def model(self) -> Model:
        model = self.make()
        return model if self.side is None else replace(model, size=(self.side, self.side))

    def bank(self, prompt: str = REFERENCE, seed: int = REFERENCE_SEED, **options):
        """Return the bank of a style named by a prompt; baked once."""
        key = f"{prompt} {seed} {sorted(options.items())}"
        if key not in self.banks:
            style = sf.StyleAligned(prompt=prompt, seed=seed)
            # pass all options to `bake`, so that a bank fits only the runs below
            self.banks[key] = self.model.engine.bake(
                style, **{"steps": self.steps, "guidance": self.guidance, "size": self.model.size} | options
            )
        return self.banks[key]

    def drawn(self, prompts, style=None, **options) -> list:
        """Return the engine's results for prompts or requests: latents, or arrays of pictures."""
        settings = {"steps": self.steps, "guidance": self.guidance, "size": self.model.size, "seed": SEED}
        result = self.model.engine.generate(
            list(prompts), style, output="np" if self.pictures else "latents", **settings | options
        )
        return result.images if self.pictures else result.latents

    def cached(self, n: int, **options) -> Run:
        """Return a run of `n` pictures that read a bank; options of `bank`."""
        style = sf.StyleAligned(self.bank(**options))
        return lambda: self.drawn(PROMPTS[:n], style)

    def uncached(self, n: int) -> Run:
        """Return a run of `n` pictures with a live reference, which is not returned."""
        return lambda: self.drawn(PROMPTS[:n], sf.StyleAligned(prompt=REFERENCE, seed=REFERENCE_SEED))

    def uncached_set(self, n: int) -> Run:
        """Return a run of the published set: the reference is the first picture and is decoded like the `n` others."""
        settings = {"steps": self.steps, "guidance": self.guidance, "size": self.model.size}

        def run():
            style = sf.StyleAligned()
            seeds = (REFERENCE_SEED, *range(SEED, SEED + n))
            texts = (REFERENCE, *PROMPTS[:n])
            return self.drawn([sf.Request(t, style=style, seed=s, **settings) for t, s in zip(texts, seeds)])

        return run

    def plain(self, n: int) -> Run:
        """Return a run of `n` pictures without a style."""
        return lambda: self.drawn(PROMPTS[:n])

    def published(self, n: int, form=None) -> Run:
        """Return a run of the reference and `n` pictures as published; `form` replaces the model's `Published`."""
        return lambda: self._by(
            form or self.model.published, (REFERENCE, *PROMPTS[:n]), (REFERENCE_SEED, *range(SEED, SEED + n))
        )

    def plainly_published(self, n: int, form) -> Run:
        """Return a run of `n` pictures by diffusers' UNet without a style."""
        return lambda: self._by(form, PROMPTS[:n], range(SEED, SEED + n))

    def _by(self, form, prompts, seeds) -> list[torch.Tensor]:
        draw = form.images if self.pictures else form.latents
        return list(draw(prompts, list(seeds), steps=self.steps, guidance=self.guidance, size=self.model.size))
