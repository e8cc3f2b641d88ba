"""One small model for all tests of the engine: diffusers' pipeline and the engine on the same weights."""

from functools import cache, partial

import pytest
import torch

import stylefast as sf
from stylefast.kernels import registry
from tests.support.fp64 import SEEDS_OF_ROUNDINGS, Measured, engine_of, loras_of, nudged, registered, wide
from tests.support.oracle.instant_style import random_adapter
from tests.support.scene import EMBED_DIM, RUN, SIZE, sharp_pipeline


@pytest.fixture(scope="package")
def pipe():
    return sharp_pipeline()


@pytest.fixture(scope="package", autouse=True)
def plain_weights():
    """Engines compute with PyTorch's own products, as diffusers does, which the oracles are held to at 1e-5."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stylefast.engine.pack", lambda unet, room: False)
        yield


@pytest.fixture(scope="package")
def adapters(pipe):
    """Two random adapters in the published layout."""
    return [random_adapter(pipe.unet, EMBED_DIM, seed) for seed in (5, 6)]


@pytest.fixture(scope="package")
def adapter_files(adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name, adapter in zip("ab", adapters):
        torch.save(adapter, folder / f"{name}.bin")
    return [folder / "a.bin", folder / "b.bin"]


@pytest.fixture(scope="package")
def bare_engine(pipe):
    """An engine without adapters."""
    return sf.Engine.from_pipeline(pipe)


@pytest.fixture(scope="package")
def engine(pipe, adapter_files):
    """An engine with the first adapter."""
    engine = sf.Engine.from_pipeline(pipe)
    engine.load_adapter(adapter_files[0])
    return engine


@pytest.fixture(scope="package")
def two_adapter_engine(pipe, adapter_files):
    engine = sf.Engine.from_pipeline(pipe)
    for file in adapter_files:
        engine.load_adapter(file)
    return engine


@pytest.fixture(scope="package")
def draw(engine):
    """Latents of a call of the engine, at the small size and few steps unless told otherwise."""

    def draw(prompts, style=None, *, using=engine, **options):
        options = {"size": SIZE, "steps": RUN["steps"], "output": "latents"} | options
        return using.generate(prompts, style, **options).latents

    return draw


@pytest.fixture(scope="package")
def drawn(pipe, adapter_files, engine, draw):
    """`draw` for comparisons of one call with another: a `Measured`, by an engine whose models are in fp64."""

    @cache
    def other(change, *further, adapters):
        using = engine_of(change(pipe, *further))
        for file in adapter_files[:adapters]:
            using.load_adapter(file)
        return using

    def drawn(prompts, style=None, *, using=engine, in_fp64=None, **options):
        loras = loras_of(using, prompts) if isinstance(prompts, list) else {}

        def run(*change):
            twin = other(*change, adapters=len(using.adapters))
            with registered(twin, loras):
                return draw(in_fp64 or prompts, style, using=twin, **options)

        def exact():
            with registry.using("torch"):  # the one form that takes fp64
                return run(wide)

        roundings = [partial(run, nudged, seed) for seed in SEEDS_OF_ROUNDINGS]
        return Measured(draw(prompts, style, using=using, **options), exact, roundings)

    return drawn
