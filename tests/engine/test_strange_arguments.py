"""Every argument of the engine's calls is taken or refused by one of our errors, before the UNet runs."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import stylefast as sf
from stylefast.errors import (
    AdapterError,
    ImageError,
    InvalidRequest,
    OutOfMemory,
    PromptError,
    StyleError,
    StyleFastError,
)
from stylefast.styles.embeddings import StageEmbedding
from tests.support.scene import SIZE, learned, small_picture
from tests.support.strange_values import python_values

PICTURE = small_picture(1)
K = {"size": SIZE, "steps": 2}


class NotRun(StyleFastError):
    """Stands in place of the work."""


@pytest.fixture
def idle(engine, monkeypatch):
    """The engine, whose calls end where the work would begin."""

    def stop(*_, **__):
        raise NotRun

    monkeypatch.setattr(engine.scheduler, "run", stop)
    monkeypatch.setattr(engine.scheduler, "submit", lambda job: None)
    return engine


CALLS = {
    "generate": {"prompts": "a cat"} | K,
    "submit": {"request": sf.Request("a cat", **K)},
    "bake": {"style": sf.StyleAligned(prompt="a cat")} | K,
}
ARGUMENTS = [
    (call, name)
    for call in CALLS
    for name in inspect.signature(getattr(sf.Engine, call)).parameters
    if name not in ("self", "path")
]


@pytest.mark.parametrize("call, name", ARGUMENTS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=python_values)
def test_an_argument_is_taken_or_refused(idle, call, name, value):
    try:
        getattr(idle, call)(**CALLS[call] | {name: value})
    except StyleFastError as error:
        assert len(str(error)) < 2000


@pytest.mark.parametrize("path", ["\ud83d.bank", "a\0.bank", 5, [], "nowhere/at/all.bank", b"a.bank"])
def test_a_banks_place_is_checked_before_it_is_baked(idle, path):
    with pytest.raises(StyleFastError) as caught:
        idle.bake(sf.StyleAligned(prompt="a cat"), **K, path=path)
    assert not isinstance(caught.value, NotRun)


# what used to fail the job is refused by `submit`


REFUSED = {
    "a text of too many chunks": (PromptError, {"prompt": "a cat " * 1000, "style": sf.DreamStyler(learned())}),
    "two styles of one name": (StyleError, {"style": [sf.DreamStyler(learned()), sf.DreamStyler(learned())]}),
    "vectors of another model": (
        StyleError,
        {"style": sf.DreamStyler(StageEmbedding("sks", torch.ones(1, 1, 8), torch.ones(1, 1, 9)))},
    ),
    "a context without a place": (PromptError, {"prompt": "a <sks>", "style": sf.DreamStyler(learned(), context="x")}),
    "an adapter that is missing": (StyleError, {"style": sf.InstantStyle(PICTURE, adapter="c")}),
    "a preset without guidance": (StyleError, {"style": sf.InstantStyle(PICTURE, "precise"), "guidance": 1.0}),
    "a block that the model lacks": (StyleError, {"style": sf.InstantStyle(PICTURE, ["head"])}),
    "a mask of another size": (ImageError, {"style": sf.InstantStyle(PICTURE, mask=torch.ones(8, 8))}),
    "a mask beyond one": (ImageError, {"style": sf.InstantStyle(PICTURE, mask=torch.full((32, 48), 2.0))}),
    "a mask of zeros and ones in bytes": (
        ImageError,
        {"style": sf.InstantStyle(PICTURE, mask=np.eye(32, dtype=np.uint8))},
    ),
    "content of another width": (AdapterError, {"style": sf.InstantStyle(PICTURE, content=torch.ones(16))}),
    "a picture that is none": (ImageError, {"style": sf.StyleAligned(reference=b"no picture")}),
    "a size beyond all memory": (OutOfMemory, {"size": (8192, 8192)}),
    "a scheduler in disguise": (InvalidRequest, {"scheduler": "eulr"}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_submit_refuses_what_can_not_work(engine, kind, monkeypatch):
    error, options = REFUSED[kind]
    if error is OutOfMemory:
        monkeypatch.setattr("stylefast.runtime.memory.total_memory", lambda device: 2**20)
    with pytest.raises(error):
        engine.submit(sf.Request(**{"prompt": "a cat"} | K | options))
    assert engine.scheduler.pending == engine.scheduler.running == 0


def test_seeds_are_drawn_or_given_one_by_one_and_recorded(engine):
    many = engine.generate(["a cat"] * 3, seed=[5, None, np.int64(7)], output="latents", size=SIZE, steps=1)
    seeds = [entry["seed"] for entry in many.metadata]
    assert seeds[0] == 5 and seeds[2] == 7 and 0 <= seeds[1] < 2**32
    drawn = engine.generate("a cat", seed=-1, output="latents", size=SIZE, steps=1)
    again = engine.generate("a cat", seed=drawn.metadata[0]["seed"], output="latents", size=SIZE, steps=1)
    assert torch.equal(drawn.latents[0], again.latents[0])


def test_the_largest_seed_of_64_bits_makes_a_picture_and_counts_on_from_zero(engine):
    last, first = engine.generate(["a cat"] * 2, seed=2**64 - 1, output="latents", size=SIZE, steps=1).latents
    zero = engine.generate("a cat", seed=0, output="latents", size=SIZE, steps=1).latents[0]
    assert not torch.equal(last, zero) and torch.allclose(first, zero, atol=1e-4)


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.load_adapter([]),
        lambda e: e.load_adapter("a.bin", name=5),
        lambda e: e.load_lora([]),
        lambda e: sf.Engine(e._components, sf.EngineOptions(preview=5)),
        lambda e: sf.Engine.from_pretrained("tiny", vae=5),
        lambda e: sf.Engine.from_pretrained("tiny", adapter=[5]),
        lambda e: sf.Engine.from_pretrained([]),
    ],
    ids=range(7),
)
def test_what_is_no_path_is_refused_wherever_something_is_loaded(engine, call):
    with pytest.raises(InvalidRequest):
        call(engine)
