"""What all tests share: seeds, no network, and the checkout's files."""

import gc
import os
import re
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest
from hypothesis import settings

from tests.numerics import is_numeric

# before any import of transformers or diffusers, which read them once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


def _has_gpu() -> bool:
    if not glob("/dev/nvidia[0-9]*"):  # tests that never touch torch should not wait for its import
        return False
    import torch

    return torch.cuda.is_available()


_GPU = _has_gpu()
# Triton reads this when a kernel is defined: without a GPU its kernels run interpreted, on CPU tensors
if not _GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the same examples on every machine, and no time limit on one that shares its cores
settings.register_profile("stylefast", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("stylefast")

CHECKOUT = Path(__file__).resolve().parent.parent


def pytest_collection_finish():
    """What was imported so far stays to the end: collections of garbage needn't look through it, nor come as often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


def pytest_unconfigure():
    gc.unfreeze()  # or extension modules would complain of what outlives them


def pytest_ignore_collect(collection_path, config):
    """Leave out whole modules of which no test would run: importing ONNX, TensorRT and the like takes seconds."""
    numerics = re.fullmatch(r"numerics( and (?!.*\bor\b).*)?", config.option.markexpr or "")
    if not numerics or not collection_path.name.startswith("test_") or collection_path.suffix != ".py":
        return None
    return None if is_numeric(collection_path) else True


def pytest_terminal_summary(terminalreporter):
    if "STYLEFAST_TEST_LEVEL" in os.environ:
        from tests.cpu_levels import ran_as

        terminalreporter.write_line(ran_as())


def pytest_collection_modifyitems(items):
    for item in items:
        if is_numeric(item.path) and "triton" not in _words(item):  # NumPy interprets Triton's kernels
            item.add_marker("numerics")
    _skip_gpu(items)
    _skip_vectors(items)


def _words(item) -> list[str]:
    """Return the words of a test's parameters."""
    return re.split(r"[\[\]-]", item.name)[1:]


def _skip_vectors(items):
    if os.environ.get("STYLEFAST_CPU") != "none":
        return
    for item in items:
        named = item.path.name.startswith(("test_cpp_", "test_fused_")) or "cpp" in _words(item)
        if named and item.path.parent.name in ("kernels", "oracle", "engine"):
            item.add_marker(pytest.mark.skip(reason="STYLEFAST_CPU=none leaves the work to PyTorch"))


def _skip_gpu(items):
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded():
    # tests that never touch torch, such as those of packaging, should not wait for its import
    if "torch" not in sys.modules:
        return
    torch = sys.modules["torch"]
    if _GPU:
        torch.manual_seed(0)
    else:  # the same without notes for devices that are not there, which take longer than many a test
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the checkout that the tests belong to."""
    return CHECKOUT


@pytest.fixture(scope="session")
def project_files(checkout) -> list[Path]:
    """Every file that is committed or could be: all but what git ignores."""
    command = ["git", "-C", str(checkout), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode == 0:
        files = [checkout / name for name in listed.stdout.split("\0") if name]
    else:
        hidden = {".venv", "build", "__pycache__"}
        files = [path for path in checkout.rglob("*") if not hidden.intersection(path.relative_to(checkout).parts)]
    return [path for path in files if path.is_file()]
