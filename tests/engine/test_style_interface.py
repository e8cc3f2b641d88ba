"""The interface of styles: registration, and what a style that says nothing does."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import stylefast as sf
from stylefast.errors import StyleError
from stylefast.models.row_table import COLUMNS
from stylefast.record import from_record, to_record
from stylefast.styles import style as style_module
from stylefast.styles.style import References, Rows, Style, find_kind, kinds, style_of_option
from tests.support.scene import SIZE
from tests.support.watch import WAIT


def test_a_second_style_of_the_name_is_refused():
    with pytest.raises(StyleError, match="define a style StyleAligned; rename one"):
        type("StyleAligned", (Style,), {})
    assert kinds()["StyleAligned"].__module__ == "stylefast.styles.style_aligned"


def test_the_packages_own_styles_come_first_and_have_short_names():
    assert list(kinds())[:3] == ["StyleAligned", "InstantStyle", "DreamStyler"]
    assert [style_of_option(name).__name__ for name in ("aligned", "instant", "learned")] == list(kinds())[:3]
    assert [find_kind(name).__name__ for name in ("aligned", "instant", "learned")] == list(kinds())[:3]


def test_installed_packages_name_modules_with_styles(monkeypatch):
    loaded = []

    class EntryPoint:
        def load(self):
            loaded.append(type("InstalledStyle", (Style,), {}))

    found = {"stylefast.styles": [EntryPoint()]}
    monkeypatch.setattr(style_module.importlib.metadata, "entry_points", lambda group: found[group])
    monkeypatch.setattr(style_module, "_kinds", dict(style_module._kinds))
    monkeypatch.setattr(style_module, "_load_installed", style_module._load_installed.__wrapped__)
    assert find_kind("installed_style") is loaded[0]
    with pytest.raises(StyleError, match="'Cubism' is unknown; choose one of StyleAligned.*InstalledStyle"):
        find_kind("Cubism")


def test_a_style_that_says_nothing_changes_nothing(engine):
    @dataclass(frozen=True, eq=False)
    class Nothing(Style):
        pass

    options = {"steps": 2, "size": SIZE, "output": "latents"}
    plain = engine.generate("a cat", **options).latents[0]
    assert torch.equal(engine.generate("a cat", Nothing(), **options).latents[0], plain)


# what is wrong with a style is said by its name, and ends its own job


def test_a_class_that_can_not_be_a_style_is_refused(engine):
    class Bare(Style):
        pass

    @dataclass(frozen=True)
    class Compared(Style):
        words: tuple = ()

    @dataclass(frozen=True, eq=False)
    class Kinded(Style):
        kind: str = "b"

    wrong = {Bare: "Bare must be a @dataclass", Compared: "Compared must be", Kinded: "Kinded has a field 'kind'"}
    for kind, message in wrong.items():
        with pytest.raises(StyleError, match=message):
            sf.Request("a cat", style=kind())


def boom(*_):
    raise KeyError("boom")


WRONG = {
    "raises in write_rows": {"write_rows": boom},
    "raises in check": {"check": boom},
    "raises in write_prompts": {"write_prompts": classmethod(boom)},
    "too few prompts": {"write_prompts": classmethod(lambda cls, styles, texts: texts.per_step["full"].pop())},
    "texts in place of prompts": {
        "write_prompts": classmethod(
            lambda cls, styles, texts: texts.per_step.update(full=["x"] * len(texts.timesteps))
        )
    },
    "a branch too many": {"write_prompts": classmethod(lambda cls, styles, texts: texts.per_step.update(fulll=[]))},
    "a mode that is none": {"write_rows": lambda self, rows, row, layout, leads: rows.self_mode.fill(9)},
}


@pytest.mark.parametrize("methods", WRONG.values(), ids=WRONG)
def test_a_style_that_fails_ends_its_own_job(engine, methods):
    kind = dataclass(frozen=True, eq=False)(type("Broken", (Style,), {"__module__": __name__} | methods))
    with engine.scheduler.paused():
        good, bad = engine.submit(sf.Request("a dog", steps=2, size=SIZE), output="latents"), None
        try:
            bad = engine.submit(sf.Request("a cat", style=kind(), steps=2, size=SIZE), output="latents")
        except StyleError as error:
            found = error
    if bad is not None:
        with pytest.raises(StyleError) as caught:
            bad.result(WAIT)
        found = caught.value
    assert "Broken" in str(found) or "a style wrote the mode 9" in str(found)
    assert good.result(WAIT).latents


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pictures": "photo.png"}, "must be a list of pictures"),
        ({"pictures": [None]}, "must be a list of pictures"),
        ({"bank": "neon.bank"}, "must be a StyleBank"),
        ({"noise": "DDIM"}, "noise is 'DDIM'"),
        ({"seed": None}, "seed is None"),
    ],
)
def test_references_are_checked(given, message):
    with pytest.raises(StyleError, match=message):
        References(**given)


def test_what_a_record_holds_comes_back(tmp_path):
    @dataclass(frozen=True, eq=False)
    class Held_Values(Style):
        limit: float
        vector: torch.Tensor
        words: str | None = "neon"

    style = Held_Values(float("inf"), torch.arange(3.0), None)
    (found,) = from_record(json.loads(json.dumps(to_record([sf.Request("a cat", style=style)]))))[0].style
    assert found.limit == float("inf") and torch.equal(found.vector, style.vector) and found.words is None
    assert type(find_kind("HeldValues")) is type


def test_a_package_that_can_not_be_loaded_stops_no_other_style(monkeypatch, caplog):
    class EntryPoint:
        name = "broken"

        def load(self):
            raise ImportError("no module named gone")

    monkeypatch.setattr(style_module.importlib.metadata, "entry_points", lambda group: [EntryPoint()])
    monkeypatch.setattr(style_module, "_load_installed", style_module._load_installed.__wrapped__)
    with pytest.raises(StyleError, match="'Cubism' is unknown"):
        find_kind("Cubism")
    assert "broken" in caplog.text and find_kind("StyleAligned") and style_of_option("aligned")


def test_styles_write_the_styled_columns_which_begin_idle():
    rows = Rows.idle(2, 5)
    styled = {name: column for name, column in COLUMNS.items() if column.styled}
    assert [*rows.arrays] == [name if column.styled is True else column.styled for name, column in styled.items()]
    for name, column in styled.items():
        if column.styled is True:
            assert (rows.arrays[name] == column.idle).all() and len(rows.arrays[name]) == 2
            assert torch.from_numpy(rows.arrays[name]).dtype == column.dtype
    assert rows.self_layers.shape == (2, 5) and not rows.takes_adain.any()
    with pytest.raises(AttributeError, match="self_shift, .*there is no 'self_shfit'"):
        rows.self_shfit[0] = 1


def test_rows_go_into_the_table_with_idle_values_where_nothing_is_read():
    rows = Rows.idle(3, 1)
    rows.self_scale[:], rows.takes_adain[:] = 0.5, [True, True, False]
    sizes = {"rows": 4, "references": 2, "segments": 0, "loras": 0, "layers": 1, "modules": 1, "norm_rows": 0}
    table = {name: column.filled(column.shape(sizes)).numpy() for name, column in COLUMNS.items()}
    rows.write(table, np.array([2, 1, 0]))
    rows.write_pages(table, np.array([7, -1, 8]))
    assert table["self_scale"].tolist() == [[0.5, 0.5], [0.5, 1], [1, 1], [1, 1]]
    assert table["adain_page"].tolist() == [7, -1, -1, -1]
