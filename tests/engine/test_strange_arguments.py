"""Every argument of the engine's calls is taken or refused by one of our errors, before the UNet runs."""

import inspect
import itertools
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

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
from stylefast.models import checkpoint, load_options
from stylefast.options import NAMES, OF_LOADED
from stylefast.styles.embeddings import StageEmbedding
from tests.support.fp64 import Twins, close
from tests.support.scene import SIZE, learned, sharp_pipeline, small_picture
from tests.support.small_bank import small_bank
from tests.support.small_checkpoints import random_lora, write_peft_lora
from tests.support.strange_values import python_values
from tests.support.watch import WAIT

PICTURE = small_picture(1)
K = {"size": SIZE, "steps": 2}
# of options of loading, as diffusers calls them
ALIASES = ("torch_dtype", "device_map")


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
    taken_or_refused(getattr(idle, call), **CALLS[call] | {name: value})


def taken_or_refused(call, *arguments, **options):
    """The result; None where it was refused by one of our errors, in few words that can be printed."""
    try:
        return call(*arguments, **options)
    except StyleFastError as error:
        assert len(str(error)) < 2000
        str(error).encode()
        return None


STYLED = {
    sf.StyleAligned: {"prompt": "a star"},
    sf.InstantStyle: {"image": PICTURE},
    sf.DreamStyler: {"embedding": learned()},
}


@pytest.mark.parametrize(
    "kind, name",
    [(kind, f.name) for kind in STYLED for f in fields(kind) if f.init],
    ids=lambda one: one if isinstance(one, str) else one.__name__,
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=python_values)
def test_a_style_that_can_be_made_is_planned_or_refused(idle, kind, name, value):
    style = taken_or_refused(kind, **STYLED[kind] | {name: value})
    if style is not None:
        taken_or_refused(idle.submit, sf.Request("a cat", style=style, **K))
        taken_or_refused(idle.bake, style, **K)


LONG = "x" * 250
PLANNED = {
    "an adapter": lambda: sf.InstantStyle(PICTURE, adapter=LONG),
    "half a module": lambda: sf.InstantStyle(PICTURE, ["transformer_blocks.1", LONG * 40]),
    "blocks that match nothing": lambda: sf.InstantStyle(PICTURE, [LONG * 40]),
    "layers that match nothing": lambda: sf.StyleAligned(prompt="a star", layers=[LONG * 40]),
}


@pytest.mark.parametrize("what", PLANNED)
def test_what_does_not_fit_the_model_is_quoted_in_few_words(idle, what):
    with pytest.raises(StyleError) as caught:
        idle.submit(sf.Request("a cat", style=PLANNED[what](), **K))
    assert "xxxx" in str(caught.value) and len(str(caught.value)) < 1000


@pytest.fixture
def nothing_read(monkeypatch):
    """Loading ends where files would be read."""

    def stop(*_, **__):
        raise NotRun

    for name in ("_from_folder", "_from_file", "_find_on_hub"):
        monkeypatch.setattr(checkpoint, name, stop)


@pytest.mark.parametrize(
    "name", [*NAMES, *load_options.PASSED_ON, *load_options._OTHER_NAMES, *load_options._REFUSED, *ALIASES, LONG * 40]
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=python_values)
def test_an_option_of_loading_is_taken_or_refused(nothing_read, pipe, name, value):
    for beside in ({}, {"dtype": "float32", "device": "cpu", "token": True}):
        taken_or_refused(sf.Engine.from_pretrained, "tiny", **beside | {name: value})
    if name not in OF_LOADED:
        taken_or_refused(sf.Engine.from_pipeline, pipe, **{name: value})


@pytest.mark.parametrize("name", OF_LOADED)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=python_values)
def test_an_option_of_an_engine_is_taken_or_refused(pipe, name, value):
    if name == "backend":
        assume(not callable(value))  # a function's own errors are its caller's
    engine = taken_or_refused(sf.Engine.from_pipeline, pipe, **{name: value})
    if engine is not None:
        engine.close()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """An engine whose weights may change, with a LoRA merged into it and one of its requests, and the LoRA's file."""
    pipe = sharp_pipeline()
    file = write_peft_lora(random_lora(pipe, seed=1), tmp_path_factory.mktemp("loras") / "ink.safetensors")
    engine = sf.Engine.from_pipeline(pipe)
    engine.load_lora(file, 0.5)
    engine.loras.add(file)
    return engine, file


METHODS = {
    "load_adapter": (lambda engine, file, adapter: engine.load_adapter, {"file": 2, "image_encoder": 3, "name": "c"}),
    "load_lora": (lambda engine, file, adapter: engine.load_lora, {"source": 1, "scale": 0.1, "name": "ink"}),
    "loras.add": (lambda engine, file, adapter: engine.loras.add, {"source": 1, "name": "ink", "part": None}),
    "loras.remove": (lambda engine, file, adapter: engine.loras.remove, {"name": "none"}),
    "loras[]": (lambda engine, file, adapter: engine.loras.__getitem__, {"name": "none"}),
    "merged_loras.set_scale": (
        lambda engine, file, adapter: engine.merged_loras.set_scale,
        {"name": "ink", "scale": 0.1},
    ),
    "merged_loras.remove": (lambda engine, file, adapter: engine.merged_loras.remove, {"name": "none"}),
}


@pytest.mark.parametrize("method, name", [(method, name) for method in METHODS for name in METHODS[method][1]])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=python_values)
def test_an_argument_of_what_changes_the_engine_is_taken_or_refused(own, adapter_files, method, name, value):
    engine, file = own
    find, usual = METHODS[method]
    places = {1: file, 2: adapter_files[0], 3: None}
    given = {key: places.get(usually, usually) if type(usually) is int else usually for key, usually in usual.items()}
    call = find(engine, file, adapter_files[0])
    if method == "loras[]":
        taken_or_refused(call, value)
    else:
        taken_or_refused(call, **given | {name: value})


@pytest.fixture(scope="module")
def done(engine):
    job = engine.submit(sf.Request("a cat", **K), output="latents")
    job.result(WAIT)
    return job


@settings(max_examples=50)
@given(value=python_values)
def test_a_timeout_is_taken_or_refused(done, value):
    taken_or_refused(done.result, value)


@pytest.mark.parametrize("name", ["path", "overwrite"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=python_values)
def test_a_place_of_a_bank_is_taken_or_refused(tmp_path, monkeypatch, name, value):
    (tmp_path / "a" / "b" / "c").mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / "a" / "b" / "c")
    taken_or_refused(small_bank().save, **{"path": "brand.bank", name: value})


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
    zero = Twins(engine).drawn([sf.Request("a cat", seed=0, size=SIZE, steps=1)])
    assert not torch.equal(last, zero.value[0])
    close([first], zero)


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


@pytest.mark.parametrize("prompts", [itertools.repeat("a cat"), range(10**12), ["a cat"] * 1001])
def test_prompts_without_end_are_refused_before_they_are_a_list(engine, prompts):
    with pytest.raises(InvalidRequest, match="prompts has more than 1000 entries"):
        engine.generate(prompts)
