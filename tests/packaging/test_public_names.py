"""`import stylefast` is quick, loads nothing heavy, and offers the names of the contract."""

import re
import subprocess
import sys

import pytest

import stylefast

HEAVY = ["torch", "diffusers", "transformers", "numpy", "PIL"]


def run(code: str, checkout) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True).stdout


def test_importing_stylefast_loads_nothing_heavy(checkout):
    code = f"import stylefast, sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert run(code, checkout) == "[]\n"


def test_importing_stylefast_imports_the_standard_library_and_itself_alone(checkout):
    code = (
        "import sys; before = set(sys.modules); import stylefast; "
        "print({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    assert run(code, checkout) == "{'stylefast'}\n"


def test_every_public_name_is_listed_and_is_what_it_is_called():
    for name in stylefast.__all__:
        assert name in dir(stylefast)
        assert getattr(stylefast, name).__name__.split(".")[-1] == name


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(AttributeError, match="'Enigne'.*Engine, EngineOptions, Request"):
        _ = stylefast.Enigne


def test_every_operation_file_is_offered_by_the_kernels_package(checkout):
    import stylefast.kernels as kernels

    for file in checkout.glob("kernels/*.py"):
        for name in re.findall(r"^def ([a-z]\w+)_ref\(", file.read_text(), flags=re.MULTILINE):
            assert callable(getattr(kernels, name, None)), f"kernels/__init__.py does not offer {name}"
