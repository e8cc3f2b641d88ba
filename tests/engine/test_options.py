"""Options of an engine: one list, by object or by name, and public functions that say what they take."""

import inspect
from dataclasses import FrozenInstanceError

import pytest

import stylefast as sf
from stylefast.errors import InvalidRequest
from tests.support.scene import sharp_pipeline


@pytest.fixture(scope="module")
def pipe():
    return sharp_pipeline()


def test_an_option_by_name_counts_before_the_same_in_the_object(pipe):
    options = sf.EngineOptions(max_pending=3, batch_buckets=[2, 4], memory_limit="1GB")
    with sf.Engine.from_pipeline(pipe, options, max_pending=5) as engine:
        assert engine.runner.buckets == (2, 4) and engine.budget.limit == 10**9
        assert engine.scheduler.max_pending == 5


def test_options_are_checked_when_they_are_made_and_stay_as_they_are():
    sizes = ({"memory_limit": "much"}, {"max_pending": 0}, {"batch_buckets": (4, 2)})
    for wrong in (*sizes, {"prediction_type": "x"}, {"pack_weights": "no"}):
        with pytest.raises(InvalidRequest, match=next(iter(wrong))):
            sf.EngineOptions(**wrong)
    with pytest.raises(FrozenInstanceError):
        sf.EngineOptions().device = "cuda"


def test_what_is_no_options_is_refused_by_name(pipe):
    with pytest.raises(InvalidRequest, match="options is {'device': 'cpu'}; give EngineOptions"):
        sf.Engine.from_pipeline(pipe, {"device": "cpu"})


@pytest.mark.parametrize("given", [{"device": "cpu"}, {"dtype": "float32"}, {"adapter": None}, {"vae": "folder"}])
def test_what_says_what_to_load_is_refused_for_a_pipeline_that_is_loaded(pipe, given):
    for options in ((sf.EngineOptions(**given), {}), (None, given)):
        with pytest.raises(InvalidRequest, match=f"{next(iter(given))}= has no effect on a loaded pipeline"):
            sf.Engine.from_pipeline(pipe, options[0], **options[1])


@pytest.mark.parametrize("name", sorted(set(sf.__all__) - {"errors"}))
def test_every_parameter_of_a_public_name_has_a_type(name):
    public = getattr(sf, name)
    functions = {name: public} | {
        f"{name}.{member}": getattr(public, member)
        for member, kind in vars(public).items()
        if not member.startswith("_") and (inspect.isfunction(kind) or isinstance(kind, classmethod | staticmethod))
    }
    for shown, function in functions.items():
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
        for parameter in parameters:
            assert parameter.annotation is not parameter.empty, f"{shown}: {parameter.name} has no type"
            assert parameter.annotation not in (list, tuple, dict), f"{shown}: {parameter.name} does not say of what"
