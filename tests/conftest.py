"""What all tests share: seeds, no network, and the checkout's files."""

import os
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest
from hypothesis import settings

# before any import of transformers or diffusers, which read them once
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


def _has_gpu() -> bool:
    if not glob("/dev/nvidia[0-9]*"):  # tests that never touch torch should not wait for its import
        return False
    import torch

    return torch.cuda.is_available()


# Triton reads this when a kernel is defined: without a GPU its kernels run interpreted, on CPU tensors
if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the same examples on every machine, and no time limit on one that shares its cores
settings.register_profile("stylefast", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("stylefast")

CHECKOUT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
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
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


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
