"""The training pool of the tiny model: pictures on disk, their labels, and their captions.

The pool is grouped by (style, palette), so that wide pictures of two or three panels that share both can be put
together by setting latents side by side.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.tiny_model.pictures import CONTENTS, HELD_OUT, PALETTES, STYLES, UNSEEN_STYLE, render

ALL_STYLES = (*STYLES, UNSEEN_STYLE)
COMBINATIONS = tuple((c, s) for c in range(len(CONTENTS)) for s in range(len(STYLES)))
HELD_OUT_INDICES = frozenset((CONTENTS.index(c), STYLES.index(s)) for c, s in HELD_OUT)


@dataclass(frozen=True)
class Pool:
    """Pictures uint8 `[n, 64, 64, 3]` and labels int64 `[n, 3]` (content, style of `ALL_STYLES`, palette)."""

    pictures: np.ndarray
    labels: np.ndarray


def _draw(rng: np.random.Generator, labels: np.ndarray, title: str) -> Pool:
    pictures = np.empty((len(labels), 64, 64, 3), np.uint8)
    for i, (content, style, palette) in enumerate(tqdm(labels, desc=title, mininterval=5)):
        pictures[i] = render(rng, CONTENTS[content], ALL_STYLES[style], PALETTES[palette])
    return Pool(pictures, labels)


def _labels(rng: np.random.Generator, combinations: list[tuple[int, int]], count: int) -> np.ndarray:
    chosen = np.array(combinations)[rng.permutation(count) % len(combinations)]
    return np.concatenate([chosen, rng.integers(0, len(PALETTES), (count, 1))], 1).astype(np.int64)


def make_pools(work: Path, seed: int, train: int, validation: int) -> None:
    """Write `train.npz` (no held-out combination), `validation.npz` (all of them) and `unseen.npz` (the 13th style)."""
    work.mkdir(parents=True, exist_ok=True)
    rng, other_rng = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    seen = [pair for pair in COMBINATIONS if pair not in HELD_OUT_INDICES]
    unseen = [(content, len(STYLES)) for content in range(len(CONTENTS))]
    kinds = (
        ("train", seen, train, rng),
        ("validation", list(COMBINATIONS), validation, rng),
        # a sequence of its own, so that a change of the 13th style leaves the other pictures as they are
        ("unseen", unseen, validation, other_rng),
    )
    for name, combinations, count, source in kinds:
        pool = _draw(source, _labels(source, combinations, count), name)
        np.savez(work / f"{name}.npz", pictures=pool.pictures, labels=pool.labels)


def load_pool(work: Path, name: str) -> Pool:
    with np.load(work / f"{name}.npz") as data:
        return Pool(data["pictures"], data["labels"])
