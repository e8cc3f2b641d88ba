"""The CPUs that the tests can be run as: what chooses its instructions by itself is told to choose lesser ones.

    env $(python tests/cpu_levels.py avx2) python -m pytest tests

Prints the variables of a level, for a shell; "lesser" is the first level below what this CPU has. A level caps what
PyTorch, oneDNN, MKL and our own kernels use. It can't take instructions away from a compiler that looks at the CPU
itself, nor from ONNX Runtime and TensorRT.
"""

import getpass
import os
import sys
import tempfile
from pathlib import Path

NAME = "STYLEFAST_TEST_LEVEL"  # set beside the others, so that a run says what it ran as
LEVELS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "STYLEFAST_CPU": "avx2",
    },
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "STYLEFAST_CPU": "none",
    },
}


def variables(level: str) -> dict[str, str]:
    """The environment variables of a level, its name among them."""
    if level == "lesser":
        level = "avx2" if has_avx512() else "default"
    if level not in LEVELS:
        sys.exit(f"there is no CPU level {level!r}; there are {', '.join(LEVELS)} and lesser")
    # PyTorch's compiler finds graphs again without a look at ATEN_CPU_CAPABILITY: code that it generated for vectors of
    # another width would be compiled for this one, and writes beyond the ends of tensors
    code = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{level}")
    return {**LEVELS[level], NAME: level, "TORCHINDUCTOR_CACHE_DIR": str(code)}


def has_avx512() -> bool:
    """Whether PyTorch would use AVX-512 here."""
    information = Path("/proc/cpuinfo")
    return information.exists() and "avx512vl" in information.read_text()


def ran_as() -> str:
    """What PyTorch, oneDNN and our kernels use in this process, in words, for the head of a log."""
    import torch

    from stylefast._extension import extension

    bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ours = extension().instruction_set() if extension() is not None else ""
    return (
        f"CPU level {os.environ.get(NAME, 'native')}: PyTorch uses {torch.backends.cpu.get_cpu_capability()}, oneDNN "
        f"{'has' if bfloat16 else 'lacks'} bfloat16, our kernels use {ours or 'the forms of PyTorch'}"
    )


if __name__ == "__main__":
    print(*(f"{name}={value}" for name, value in variables(*sys.argv[1:] or ["lesser"]).items()))
