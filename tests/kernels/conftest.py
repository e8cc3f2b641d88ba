"""What the tests of the C++ kernels share."""

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
def threads():
    """`torch.set_num_threads` for one test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
