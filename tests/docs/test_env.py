"""docs/env.md lists the environment variables that the code reads, all of them and no others."""

import re
from pathlib import Path

import pytest

NAME = re.compile(r"\bSTYLEFAST_(?!SERVE_)[A-Z]+(?:_[A-Z]+)*\b")  # test_serving.py compares the service's settings
MACROS = {"STYLEFAST_BY_TYPE", "STYLEFAST_INLINE", "STYLEFAST_BY"}  # of the C++ code
FOREIGN = (
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "TRITON_INTERPRET",
    "MAX_JOBS",
    "CXX",
)


@pytest.fixture(scope="module")
def code(checkout: Path) -> str:
    folders = ("stylefast", "kernels", "export", "csrc")
    files = [path for folder in folders for path in (checkout / folder).rglob("*") if path.suffix in (".py", ".cpp")]
    return "\n".join(path.read_text() for path in [*files, checkout / "setup.py"])


@pytest.fixture(scope="module")
def page(checkout: Path) -> str:
    return (checkout / "docs" / "env.md").read_text()


def test_every_variable_of_the_code_has_its_row_and_no_other_has(code, page):
    rows = re.findall(r"^\| `(STYLEFAST_[A-Z_]+)`", page, re.MULTILINE)
    assert len(rows) == len(set(rows)) and set(rows) == set(NAME.findall(code)) - MACROS


@pytest.mark.parametrize("name", FOREIGN)
def test_variables_of_others_that_it_names_are_looked_at(code, page, name):
    assert f"`{name}`" in page and f'"{name}"' in code
