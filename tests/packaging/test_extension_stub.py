"""`_C.pyi` says of the C++ extension what the extension says of itself."""

import ast
import re
from pathlib import Path

import pytest

from stylefast._extension import extension


@pytest.fixture(scope="module")
def module():
    found = extension()
    if found is None:
        pytest.skip("the C++ extension is not built")
    return found


@pytest.fixture(scope="module")
def stub(checkout: Path) -> list[ast.stmt]:
    return ast.parse((checkout / "stylefast" / "_C.pyi").read_text()).body


def arguments(function: ast.FunctionDef) -> list[tuple[str, bool]]:
    """Return (name, whether None is taken) of every argument but `self`."""
    found = [(one.arg, "None" in ast.unparse(one.annotation or ast.Constant(""))) for one in function.args.args]
    return [one for one in found if one[0] != "self"]


def described(docstring: str) -> list[tuple[str, bool]]:
    """Return the same from the signature that pybind11 writes into a docstring."""
    signature = docstring.splitlines()[0]
    inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
    # an argument's annotation goes up to the next name with a colon
    pieces = re.split(r", (?=\w+: )", inside) if inside else []
    found = [(piece.split(":")[0], piece.endswith("None")) for piece in pieces]
    return [one for one in found if one[0] != "self"]


def test_it_names_what_there_is(module, stub):
    named = {
        node.target.id if isinstance(node, ast.AnnAssign) else node.name
        for node in stub
        if isinstance(node, (ast.AnnAssign, ast.FunctionDef, ast.ClassDef))
    }
    assert named == {name for name in dir(module) if not name.startswith("__")}


def test_functions_take_the_arguments_that_it_says(module, stub):
    functions = [node for node in stub if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 10
    for function in functions:
        assert arguments(function) == described(getattr(module, function.name).__doc__), function.name


def test_methods_take_the_arguments_that_it_says(module, stub):
    for kind in (node for node in stub if isinstance(node, ast.ClassDef)):
        own = getattr(module, kind.name)
        methods = {node.name: node for node in kind.body if isinstance(node, ast.FunctionDef)}
        assert {name for name in vars(own) if not name.startswith("_")} == methods.keys() - {"__init__"}
        for name, method in methods.items():
            if not method.decorator_list:  # properties
                assert arguments(method) == described(getattr(own, name).__doc__), f"{kind.name}.{name}"
