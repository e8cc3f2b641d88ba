"""What the embedded model draws is what was asked for, as its classifier sees it."""

import numpy as np
import pytest

import stylefast as sf
from benchmarks.tiny_model.classifier import classify, load_classifier
from benchmarks.tiny_model.pictures import CONTENTS, STYLES, render

RUN = {"steps": 8, "guidance": 4.0}


@pytest.fixture(scope="module")
def engine():
    return sf.Engine.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


def names(classifier, images) -> list[tuple[str, str]]:
    verdict = classify(classifier, images)
    contents, styles = verdict.content.argmax(1).tolist(), verdict.style.argmax(1).tolist()
    return [(classifier.contents[c], classifier.styles[s]) for c, s in zip(contents, styles, strict=True)]


def test_prompts_give_the_content_and_the_style_they_name(engine, classifier):
    asked = list(zip(CONTENTS, STYLES, strict=True))
    requests = [sf.Request(f"a {content} in {style} style", seed=i, **RUN) for i, (content, style) in enumerate(asked)]
    found = names(classifier, engine.generate(requests).images)
    assert sum(f[0] == a[0] for f, a in zip(found, asked, strict=True)) >= 10
    assert sum(f[1] == a[1] for f, a in zip(found, asked, strict=True)) >= 10


TARGETS = ["a house", "a boat"]


def share(engine, classifier, hidden: bool | None) -> float:
    """The share of targets in the style of a fish that is drawn first, or by `hidden` beside them; None: by nothing."""
    requests, wanted = [], []
    for i, style in enumerate(STYLES):
        name = f"a fish in {style} style"
        aligned = sf.StyleAligned(prompt=name if hidden else None, shift=1.0, share_group_norm=True)
        for j, prompt in enumerate([name, *TARGETS] if hidden is False else TARGETS):
            requests.append(sf.Request(prompt, style=None if hidden is None else aligned, seed=10 * i + j, **RUN))
            wanted.append(style if prompt in TARGETS else None)
    found = names(classifier, engine.generate(requests).images)
    hits = [f[1] == style for f, style in zip(found, wanted, strict=True) if style]
    return sum(hits) / len(hits)


@pytest.fixture(scope="module")
def share_of_chance(engine, classifier):
    return share(engine, classifier, None)


@pytest.mark.parametrize("hidden", [False, True], ids=["the first prompt", "a prompt of its own"])
def test_style_aligned_carries_the_references_style_to_prompts_that_do_not_name_it(
    engine, classifier, share_of_chance, hidden
):
    # two targets of every style; the shares on more pictures stand in docs/quality.md
    assert share(engine, classifier, hidden) >= max(0.5, 2 * share_of_chance + 0.1)


@pytest.mark.parametrize(("blocks", "least"), [("all", 0.7), ("style", 0.55)])
def test_the_picture_gives_its_style_and_the_prompt_the_content(engine, classifier, blocks, least):
    # one drawing of every style; the shares on five times as many pictures stand in docs/quality.md
    asked = [(content, style) for style in STYLES for content in ("house", "cat", "boat")]
    drawings = {style: render(np.random.default_rng(i), "star", style, "cool", 64) for i, style in enumerate(STYLES)}
    requests = [
        sf.Request(f"a {content}", style=sf.InstantStyle(drawings[style], blocks=blocks), seed=i, **RUN)
        for i, (content, style) in enumerate(asked)
    ]
    found = names(classifier, engine.generate(requests).images)
    assert sum(f[1] == a[1] for f, a in zip(found, asked, strict=True)) >= least * len(asked)
    assert sum(f[0] == a[0] for f, a in zip(found, asked, strict=True)) >= 0.9 * len(asked)
