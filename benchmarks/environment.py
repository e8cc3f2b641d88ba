"""The environment of a measurement: machine, versions, commit, date."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import stylefast

# CPU features by which the C++ kernels select instructions
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16")


def environment(device: str) -> dict[str, Any]:
    """Return the environment, ready for JSON.

    device: "cpu" or "cuda"; a GPU adds its name, memory, L2, driver, CUDA and cuDNN.
    """
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "stylefast": stylefast.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_features": cpu_features(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # of the last minute: near 0 on an idle machine
        "load_before": round(os.getloadavg()[0], 2),
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": card.name,
            "capability": 10 * card.major + card.minor,
            "gpu_memory_gb": round(card.total_memory / 1e9, 1),
            "gpu_l2_mb": round(card.L2_cache_size / 1e6, 1),
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return found


def cpu_features() -> list[str]:
    """Return the `CPU_FEATURES` that this CPU reports; empty if the system does not tell."""
    flags = set(_cpuinfo("flags").split())
    return [name for name in CPU_FEATURES if name in flags]


def cpu_model() -> str:
    """Return the CPU's name, or its architecture if the system does not tell."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def commit() -> str | None:
    """Return the checkout's commit, followed by "+changes" if files differ from it; None outside git."""
    folder = Path(__file__).parent
    head = _output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    return head + ("+changes" if _output("git", "-C", str(folder), "status", "--porcelain", "-uno") else "")


def _cpuinfo(name: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
