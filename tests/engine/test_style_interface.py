"""The interface of styles: registration, and what a style that says nothing does."""

from dataclasses import dataclass

import pytest
import torch

from stylefast.errors import StyleError
from stylefast.styles import style
from stylefast.styles.style import Style, find_kind, kinds, style_of_option
from tests.engine.scene import SIZE


def test_a_second_style_of_the_name_is_refused():
    with pytest.raises(StyleError, match="define a style StyleAligned; rename one"):
        type("StyleAligned", (Style,), {})
    assert kinds()["StyleAligned"].__module__ == "stylefast.styles.style_aligned"


def test_the_packages_own_styles_come_first_and_have_short_names():
    assert list(kinds())[:3] == ["StyleAligned", "InstantStyle", "DreamStyler"]
    assert [style_of_option(name).__name__ for name in ("aligned", "instant", "learned")] == list(kinds())[:3]


def test_installed_packages_name_modules_with_styles(monkeypatch):
    loaded = []

    class EntryPoint:
        def load(self):
            loaded.append(type("InstalledStyle", (Style,), {}))

    found = {"stylefast.styles": [EntryPoint()]}
    monkeypatch.setattr(style.importlib.metadata, "entry_points", lambda group: found[group])
    monkeypatch.setattr(style, "_kinds", dict(style._kinds))
    monkeypatch.setattr(style, "_load_installed", style._load_installed.__wrapped__)
    assert find_kind("installed_style") is loaded[0]
    with pytest.raises(StyleError, match="'Cubism' is unknown; there are StyleAligned.*InstalledStyle"):
        find_kind("Cubism")


def test_a_style_that_says_nothing_changes_nothing(engine):
    @dataclass(frozen=True, eq=False)
    class Nothing(Style):
        pass

    options = {"steps": 2, "size": SIZE, "output": "latents"}
    plain = engine.generate("a cat", **options).latents[0]
    assert torch.equal(engine.generate("a cat", Nothing(), **options).latents[0], plain)
