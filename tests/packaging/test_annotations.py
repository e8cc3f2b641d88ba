"""Every parameter of a public function has a type."""

import ast
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("stylefast", "kernels", "export", "integrations")
KERNELS = Path("kernels/gpu")  # Triton gives their arguments types of its own


def public(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the public functions of a module or class, and the public methods and constructors of its classes."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.ClassDef):
            if not inner.name.startswith("_"):
                yield from public(inner)
        elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            if not inner.name.startswith("_") or inner.name == "__init__":
                yield inner
        elif isinstance(inner, ast.If | ast.Try):
            yield from public(inner)


def without_type(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    all_of_them = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [one.arg for one in all_of_them if one and one.annotation is None and one.arg not in ("self", "cls")]


def test_every_parameter_of_a_public_function_has_a_type(checkout):
    found = []
    for path in (path for folder in FOLDERS for path in sorted((checkout / folder).rglob("*.py"))):
        where = path.relative_to(checkout)
        if not where.is_relative_to(KERNELS):
            for function in public(ast.parse(path.read_text(encoding="utf-8"))):
                found += [f"{where}:{function.lineno} {function.name}({name})" for name in without_type(function)]
    assert found == []


def test_a_parameter_without_a_type_is_found():
    module = ast.parse("class A:\n    def f(self, x: int, *rest, y=1): ...\n\ndef _g(z): ...")
    assert [without_type(function) for function in public(module)] == [["y", "rest"]]
