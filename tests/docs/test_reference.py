"""docs/reference.md is what `make reference` writes, its docstrings read as one expects, and their examples run."""

import doctest
import runpy
from pathlib import Path

import pytest

import stylefast as sf

REFERENCE = runpy.run_path(str(Path(__file__).resolve().parents[2] / "docs" / "make_reference.py"))
PUBLIC = {name: value for *_, objects in REFERENCE["sections"]() for name, value in objects.items()}
MEMBERS = {name: value for kind in PUBLIC.values() for name, value in REFERENCE["members"](kind).items()}
DESCRIBED = {name: value for name, value in {**PUBLIC, **MEMBERS}.items() if name not in REFERENCE["CONSTANTS"]}
FIRST_WORDS = {name: (value.__doc__ or "").partition(" ")[0].rstrip(",;.") for name, value in DESCRIBED.items()}
WITH_EXAMPLES = sorted(name for name, value in DESCRIBED.items() if ">>>" in (value.__doc__ or ""))
MUST_HAVE_EXAMPLES = {
    *("Engine", "Engine.from_pretrained", "Engine.generate", "Engine.submit", "Engine.bake", "EngineOptions", "Job"),
    *("Request", "StyleAligned", "InstantStyle", "DreamStyler", "StyleBank", "StyleContextGuidance"),
}


def test_the_page_is_what_the_code_says_now():
    assert REFERENCE["PAGE"].read_text(encoding="utf-8") == REFERENCE["markdown"](), "run `make reference`"


def test_it_has_every_public_name_and_every_operation():
    from stylefast import kernels, sampling

    offered = {*sf.__all__, *sampling.__all__, *kernels.__all__} - {"errors"}
    assert offered <= {*PUBLIC} and {"Job", "Backend", "Style", "generate", "QueueFull"} <= {*PUBLIC}
    lines = REFERENCE["PAGE"].read_text(encoding="utf-8").splitlines()
    for name in {*PUBLIC, *MEMBERS} - {"generate"}:
        assert f"### {name}" in lines or f"#### {name}" in lines


def test_functions_begin_with_a_verb_and_classes_do_not():
    kinds = {name for name, value in DESCRIBED.items() if isinstance(value, type)}
    verbs = {word for name, word in FIRST_WORDS.items() if name not in kinds}
    # ruff's D401 holds the imperative
    assert "" not in FIRST_WORDS.values() and all(word.isalpha() and word.istitle() for word in verbs)
    assert verbs.isdisjoint({"The", "A", "An", "What", "Whether", "Which", "How"})
    assert verbs.isdisjoint(FIRST_WORDS[name] for name in kinds)


@pytest.fixture(scope="module")
def engine():
    return sf.Engine.from_pretrained("tiny", device="cpu")


def test_what_a_user_meets_first_has_examples():
    assert {*WITH_EXAMPLES} >= MUST_HAVE_EXAMPLES


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_docstring_run(engine, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(DESCRIBED[name].__doc__, {"sf": sf, "engine": engine}, name, None, 0)
    said = []
    failed, tried = doctest.DocTestRunner().run(example, out=said.append)
    assert tried and not failed, "".join(said)
