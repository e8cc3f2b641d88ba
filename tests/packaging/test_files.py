"""What may and may not stand in the project's files."""

import re

import pytest

# written apart, so that this file does not find itself
FOLDERS = "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me", "Us" + "ers"])
LOCAL_PATH = re.compile(rf"(?<![\w.:/~-])/(?:{FOLDERS})\b")
TEXT = {"", ".py", ".md", ".toml", ".txt", ".cpp", ".h", ".cu", ".json", ".yml", ".yaml", ".in", ".html", ".sh"}
TINY_LIMIT = 28 * 10**6  # bytes


@pytest.mark.parametrize("folder", ["wo" + "rk/main", "ro" + "ot", "ho" + "me/someone/x.png"])
def test_the_search_recognises_a_local_path(folder):
    assert LOCAL_PATH.search(f'path = "/{folder}"')
    assert not LOCAL_PATH.search(f"https://example.org/{folder} and ~/{folder} and a/{folder}")


def test_no_file_names_a_path_of_somebodys_machine(project_files, checkout):
    found = [
        f"{path.relative_to(checkout)}: {match.group()}"
        for path in project_files
        if path.suffix in TEXT and path.stat().st_size < 2**20
        for match in LOCAL_PATH.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []


def test_the_embedded_model_stays_below_28_megabytes(checkout):
    folder = checkout / "stylefast" / "models" / "tiny"
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert 0 < sum(sizes.values()) <= TINY_LIMIT, sizes


def test_the_licence_is_apache_2(checkout):
    text = (checkout / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
