"""What the tests of the C++ kernels share, and a quicker look round for Triton's interpreter."""

import inspect
import os
from types import SimpleNamespace

import pytest

INSTRUCTION_SETS = ("avx2", "avx512", "avx512_bf16")  # each has the one before


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    """Caps the C++ kernels at each instruction set that this CPU has."""
    from stylefast._extension import extension

    best = extension().instruction_set()
    if not best or INSTRUCTION_SETS.index(request.param) > INSTRUCTION_SETS.index(best):
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("STYLEFAST_CPU", request.param)
    return request.param


@pytest.fixture
def form(request, monkeypatch):
    """Return the form that a test is parametrised with (`conformance.each`)."""
    request.param.prepare(monkeypatch)
    return request.param


@pytest.fixture
def threads():
    """`torch.set_num_threads` for one test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
