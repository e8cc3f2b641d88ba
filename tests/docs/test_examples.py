"""Every Python block of the documentation runs, in the order in which it stands.

Those of docs/reference.md are signatures, and the examples in it are run by test_reference.py.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [page for page in PAGES if page.name != "reference.md"]

# of a picture and of the reference whose bank it reads alike
MOST_STEPS = 2


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_there_are_examples():
    assert sum(len(blocks(page)) for page in RUN) >= 5


@pytest.mark.parametrize("page", [page for page in RUN if blocks(page)], ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    """As they stand, but for the number of steps, which changes nothing but the picture."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, source in enumerate(blocks(page), 1):
        source = re.sub(r"\bsteps=(\d+)", lambda found: f"steps={min(int(found[1]), MOST_STEPS)}", source)
        exec(compile(source, f"{page.name}, example {number}", "exec"), names)


def anchors(page: Path) -> set[str]:
    """Return what links to the page's headings end with."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8"))
    for target, anchor in links:
        place = page.parent / target if target else page
        assert place.exists() and (not anchor or anchor in anchors(place)), f"{target}#{anchor}"
