"""Files that the documentation and the code's own comments name exist."""

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.svg")])
SOURCES = sorted(p for folder in ("stylefast", "kernels", "export", "csrc") for p in (ROOT / folder).rglob("*.[pch]*"))
# (a folder of the repository or the package)/(path).(py, cpp, h)
FOLDERS = "stylefast|kernels|export|csrc|benchmarks|tests|runtime|models|styles|sampling"
PATH = re.compile(rf"(?<![\w/])((?:{FOLDERS})/[\w/]+\.(?:py|cpp|h))\b")


def missing(text: str) -> list[str]:
    """Return the paths in a text that are no file, from the root, the package or tests."""
    return [
        path
        for path in PATH.findall(text)
        if not any((ROOT / top / path).is_file() for top in ("", "stylefast", "tests"))
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_the_files_that_a_page_names_exist(page):
    assert missing(page.read_text()) == []


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_the_names_that_a_page_gives_with_their_module_exist(page):
    for name in set(re.findall(r"`(stylefast(?:\.(?!json\b)\w+)+)`", page.read_text())):
        module, _, last = name.rpartition(".")
        try:
            assert hasattr(import_module(module), last) or import_module(name), f"{page.name} names {name}"
        except ModuleNotFoundError as error:
            pytest.fail(f"{page.name} names {name}: {error}")


def test_the_files_that_the_code_names_exist():
    sources = [path for path in SOURCES if path.suffix in (".py", ".cpp", ".h")]
    assert len(sources) > 100
    assert {path.name: missing(path.read_text()) for path in sources if missing(path.read_text())} == {}
