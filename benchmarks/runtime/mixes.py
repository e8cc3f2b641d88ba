"""Batches of eight requests, with one style for all or eight styles."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

import stylefast as sf
from benchmarks.runtime.scene import PROMPTS, REFERENCE, REFERENCE_SEED, SEED, Scene

BATCH = 8
BAKED = (
    REFERENCE,
    "a fish in watercolor style",
    "a fish in woodcut style",
    "a fish in glass style",
    "a house in neon style",
    "a house in watercolor style",
    "a cat in woodcut style",
    "a cat in glass style",
)


def one_live_style(scene: Scene) -> list[sf.Request]:
    """Return eight pictures that share one live reference: 18 rows."""
    style = sf.StyleAligned(prompt=REFERENCE, seed=REFERENCE_SEED)
    return [_request(scene, i, style) for i in range(BATCH)]


def mixed_styles(scene: Scene) -> list[sf.Request]:
    """Return eight pictures of eight styles, one of which has a live reference: also 18 rows.

    No style; two banks, the second with a shift and a weaker AdaIN; a live reference; two pictures' styles at two
    strengths; a learned style; a bank and a picture at once. Guidance differs wherever no bank fixes it.
    """
    engine = scene.model.engine
    pictures, learned = engine.references(), engine.styles()
    first, second = (scene.bank(prompt) for prompt in BAKED[:2])
    return [
        _request(scene, 0, None, guidance=7.5),
        _request(scene, 1, sf.StyleAligned(first, scale=0.9)),
        _request(scene, 2, sf.StyleAligned(second, shift=math.log(2), adain={"q": 1.0, "k": 0.5})),
        _request(scene, 3, sf.StyleAligned(prompt=REFERENCE, seed=REFERENCE_SEED), guidance=6.0),
        _request(scene, 4, sf.InstantStyle(pictures["neon"], scale=0.8), guidance=4.0),
        _request(scene, 5, sf.InstantStyle(pictures["woodcut"], scale=0.5)),
        _request(scene, 6, sf.DreamStyler(learned["chalk"]), guidance=3.0),
        _request(scene, 7, [sf.StyleAligned(first), sf.InstantStyle(pictures["watercolor"], scale=0.6)]),
    ]


def one_bank(scene: Scene) -> list[sf.Request]:
    """Return eight pictures of one baked style: 16 rows."""
    style = sf.StyleAligned(scene.bank(BAKED[0]))
    return [_request(scene, i, style) for i in range(BATCH)]


def eight_banks(scene: Scene) -> list[sf.Request]:
    """Return eight pictures of eight baked styles with different strengths: 16 rows."""
    styles = [sf.StyleAligned(scene.bank(prompt), scale=1.0 - 0.02 * i) for i, prompt in enumerate(BAKED)]
    return [_request(scene, i, style) for i, style in enumerate(styles)]


def plain(scene: Scene) -> list[sf.Request]:
    """Return eight pictures without a style."""
    return [_request(scene, i, None) for i in range(BATCH)]


def by_threads(scene: Scene, requests: Sequence[sf.Request]) -> list[torch.Tensor]:
    """Make each request by a call of `generate` in a thread of its own, all at once; return the latents."""
    engine = scene.model.engine
    with ThreadPoolExecutor(len(requests)) as pool:
        results = list(pool.map(lambda request: engine.generate(request, output="latents"), requests))
    return [result.latents[0] for result in results]


def by_submit(scene: Scene, requests: Sequence[sf.Request]) -> list[torch.Tensor]:
    """Submit all requests, each as a job of its own; return the latents."""
    jobs = [scene.model.engine.submit(request, output="latents") for request in requests]
    return [job.result().latents[0] for job in jobs]


def _request(scene: Scene, i: int, style, **options) -> sf.Request:
    settings = {"steps": scene.steps, "guidance": scene.guidance, "size": scene.model.size, "seed": SEED + i}
    return sf.Request(PROMPTS[i], style=style, **settings | options)
