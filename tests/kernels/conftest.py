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
def quicker_interpreter():
    """Have Triton's interpreter find out once what stays the same, not at every call of a function in a kernel."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.language.core import block_type, is_builtin
    from triton.runtime import interpreter

    found: dict[object, list[str]] = {}

    def members(package):
        """Look through one of Triton's modules once for what the interpreter replaces in it."""
        if package not in found:
            every = inspect.getmembers(package)
            found[package] = [name for name, value in every if is_builtin(value)]
            return every
        return [(name, getattr(package, name)) for name in found[package]]

    running: list[set[int]] = []  # the globals that are patched, for each kernel that is being run
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_once(function):
        """Replace the language in a function's module, unless that was done since its kernel began."""
        module = id(function.__globals__)
        if not running or module not in running[-1]:
            for patched in running[-1:]:
                patched.add(module)
            return patch_lang(function)
        return None

    def launched(*arguments, **named):
        running.append(set())
        try:
            return launch(*arguments, **named)
        finally:
            running.pop()

    known: dict[str, object] = {}
    numpys = interpreter._get_np_dtype

    def numpys_once(kind):
        """NumPy's type for one of Triton's, which for a block is that of its elements."""
        element = kind.element_ty if isinstance(kind, block_type) else kind
        if element.name not in known:
            known[element.name] = numpys(element)
        return known[element.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "inspect", SimpleNamespace(**vars(inspect) | {"getmembers": members}))
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        patch.setattr(interpreter, "_get_np_dtype", numpys_once)
        yield
