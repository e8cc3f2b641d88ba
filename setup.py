"""What pyproject.toml can't say: packages that live in sibling folders, and a C++ extension that may be absent."""

import os
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# package name -> folder; `kernels` and `export` stand beside `stylefast` but install inside it
PACKAGE_DIRS = {"stylefast": "stylefast", "stylefast.kernels": "kernels", "stylefast.export": "export"}


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def packages() -> list[str]:
    found = []
    for package, folder in PACKAGE_DIRS.items():
        found += [package, *(f"{package}.{inner}" for inner in find_packages(folder))]
    return found


def extensions() -> list[Extension]:
    if os.environ.get("STYLEFAST_EXTENSION") == "0":
        warn("STYLEFAST_EXTENSION=0: stylefast installs without its C++ extension")
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        warn("pybind11 is not installed, so stylefast installs without its C++ extension; `pip install pybind11`")
        return []
    sources = ["csrc/bindings.cpp", "csrc/planner.cpp"]
    return [Pybind11Extension("stylefast._C", sources, depends=["csrc/planner.h"], cxx_std=17, optional=True)]


class OptionalBuild(build_ext):
    """Builds the extension if it can; otherwise says what is missing and lets the pure-Python install go on."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:  # compilers fail in many ways, and none of them may stop the install
            warn(
                f"{ext.name} was not built ({error}); stylefast runs without it. "
                "It needs a C++17 compiler and Python's headers (for example g++ and python3-dev)."
            )


setup(
    packages=packages(),
    package_dir=PACKAGE_DIRS,
    package_data={"stylefast.models": ["tiny/**/*"], "stylefast.kernels": ["tuning/*.json"]},
    include_package_data=False,
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuild},
)
