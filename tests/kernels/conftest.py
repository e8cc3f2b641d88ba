"""What the tests of the operations share: the form that a test runs, and a quicker interpreter of Triton."""

import inspect
import os
from types import SimpleNamespace

import pytest


@pytest.fixture
def form(request, monkeypatch):
    """Return the form that a test is parametrised with (`conformance.each`)."""
    request.param.prepare(monkeypatch)
    return request.param


@pytest.fixture(scope="session", autouse=True)
def names_found_once():
    """Have the interpreter look through Triton's modules once for what it replaces, not at every call in a kernel."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    found: dict[object, list[str]] = {}

    def members(package):
        if package not in found:
            every = inspect.getmembers(package)
            found[package] = [name for name, value in every if is_builtin(value)]
            return every
        return [(name, getattr(package, name)) for name in found[package]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "inspect", SimpleNamespace(**vars(inspect) | {"getmembers": members}))
        yield
