"""The C++ sources keep to C++17: the oldest torch that is supported builds extensions with that standard."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

SOURCES = sorted(path.name for path in (Path(__file__).resolve().parents[2] / "csrc").glob("*.cpp"))


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_is_valid_cpp_17(checkout, source):
    from torch.utils.cpp_extension import include_paths

    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "no C++ compiler here, and the extension needs one"
    folders = [f"-isystem{folder}" for folder in (*include_paths(), sysconfig.get_paths()["include"])]
    command = [compiler, "-std=c++17", "-fsyntax-only", "-fopenmp", "-DTORCH_EXTENSION_NAME=_C", *folders]
    done = subprocess.run([*command, str(checkout / "csrc" / source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
