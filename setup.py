"""What pyproject.toml can't say: packages that live in sibling folders, and a C++ extension that may be absent.

The variable STYLEFAST_EXTENSION is "0" to install without the extension, and "keep" to take the one that lies in the
build folder if it is no older than its sources, which torch would compile anew.
"""

import os
import shlex
import subprocess
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# package name -> folder; `kernels` and `export` stand beside `stylefast` but install inside it
PACKAGE_DIRS = {"stylefast": "stylefast", "stylefast.kernels": "kernels", "stylefast.export": "export"}

SOURCES = [
    "csrc/arguments.cpp",
    "csrc/attention_avx2.cpp",
    "csrc/attention_avx512.cpp",
    "csrc/attention_avx512_bf16.cpp",
    "csrc/attention_operations.cpp",
    "csrc/bindings.cpp",
    "csrc/copies.cpp",
    "csrc/cpu_features.cpp",
    "csrc/page_pool.cpp",
    "csrc/planner.cpp",
    "csrc/streaming_avx2.cpp",
    "csrc/streaming_avx512.cpp",
    "csrc/streaming_operations.cpp",
]
HEADERS = [
    "csrc/adain_affine_kernel.h",
    "csrc/arguments.h",
    "csrc/attention.h",
    "csrc/copies.h",
    "csrc/cpu_features.h",
    "csrc/dequantise_kernel.h",
    "csrc/float_compute.h",
    "csrc/gated_attention_kernel.h",
    "csrc/geglu_kernel.h",
    "csrc/group_norm_kernel.h",
    "csrc/guided_step_kernel.h",
    "csrc/layer_norm_kernel.h",
    "csrc/operations.h",
    "csrc/page_pool.h",
    "csrc/parallel.h",
    "csrc/planner.h",
    "csrc/row_lora_kernel.h",
    "csrc/shared_attention_kernel.h",
    "csrc/span_kernel.h",
    "csrc/streaming.h",
    "csrc/tile_kernel.h",
    "csrc/token_stats_kernel.h",
    "csrc/vector_avx2.h",
    "csrc/vector_avx512.h",
    "csrc/views.h",
]


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
        from torch.utils.cpp_extension import CppExtension
    except ImportError as error:
        warn(
            f"torch can't be imported here ({error}), so stylefast installs without its C++ extension; "
            "install torch first, then stylefast with `pip install --no-build-isolation`"
        )
        return []
    compile_flags, link_flags = build_flags()
    return [
        CppExtension(
            "stylefast._C",
            SOURCES,
            depends=HEADERS,
            extra_compile_args={"cxx": compile_flags},
            extra_link_args=link_flags,
            optional=True,
        )
    ]


def build_flags() -> tuple[list[str], list[str]]:
    # no -march: the kernels choose their instructions at run time
    compile_flags = ["-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden"]
    link_flags = []
    if sys.platform.startswith("linux"):
        compile_flags.append("-fopenmp")
        link_flags.append("-s")
        if compiler_is_clang():
            link_flags.append("-fopenmp")  # its code calls LLVM's OpenMP library, which torch has not loaded
        else:
            # GCC 12 warns of variables that its own headers leave unset on purpose. No -fopenmp for the linker: torch
            # has loaded the library, and a second copy would bring its own threads
            compile_flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    return compile_flags, link_flags


def compiler_is_clang() -> bool:
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "--version"]
    try:
        return "clang" in subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return False  # the build will say what is missing


class OptionalBuild(build_ext):
    """Builds the extension if it can; otherwise says what is missing and lets the pure-Python install go on."""

    def finalize_options(self):
        super().finalize_options()
        if os.environ.get("STYLEFAST_EXTENSION") == "keep":
            self.force = False  # which torch sets: keep what lies in the build folder and is no older than its sources

    def run(self):
        if not self.extensions:
            return
        os.environ.setdefault("MAX_JOBS", "2")
        try:
            super().run()
        except Exception as error:  # compilers fail in many ways, and none of them may stop the install
            names = ", ".join(extension.name for extension in self.extensions)
            warn(
                f"{names} was not built ({error}); stylefast runs without it. It needs a C++20 compiler, "
                "Python's headers (for example g++ and python3-dev) and the torch that it will run with."
            )


def build_command(extensions: list[Extension]) -> type[build_ext]:
    if not extensions:
        return OptionalBuild  # importing torch takes seconds, three times in an install
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        return OptionalBuild
    # OptionalBuild comes first, so that it sees what BuildExtension itself refuses, such as a missing compiler
    return type("OptionalTorchBuild", (OptionalBuild, BuildExtension), {})


modules = extensions()
setup(
    packages=packages(),
    package_dir=PACKAGE_DIRS,
    package_data={
        "stylefast": ["py.typed", "_C.pyi"],
        "stylefast.models": ["tiny/**/*"],
        "stylefast.serving.playground": ["*.css", "*.html", "*.js", "*.svg"],
        "stylefast.kernels": ["tuning/*.json"],
        "stylefast.export": ["triton_repo/models/*.py"],
    },
    include_package_data=False,
    ext_modules=modules,
    cmdclass={"build_ext": build_command(modules)},
)
