"""All GPU checks in one command of at most nine minutes: `make gpu`.

Builds the C++ extension in place if there is a compiler, runs the tests marked `gpu`, then the benchmarks of the
kernels and of the engine, which share the remaining time. `make gpu PARTS=runtime` gives all of it to one of the parts
tests, kernels, runtime and exports; the engine's whole list needs a call of its own, and so do exported engines, which
run only if named, because compiling SDXL takes minutes. Nothing is installed and no network is used; missing
pure-Python packages, such as the diffusers that the engine needs, are taken from build/gpu-wheels (`make gpu-wheels`),
and missing runtimes of exports are skipped and named in the results.
A failing part does not stop the others. Results are also copied to the folder in the environment variable OUT. Exit
code: 1 if tests failed or could not run, plus 2 if the kernels' benchmarks did not finish, plus 4 if the engine's and
plus 8 if the exports' did not finish or missed a goal.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks import gpu_wheels

REMEDY = "run `make gpu-wheels` where there is a network, and carry build/gpu-wheels along"
CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "benchmarks" / "results"

MINUTES = 9.0  # for the whole run
BUILD_SECONDS, TEST_SECONDS = 150, 180
BENCHMARK_MINUTES = 5.0
SPARE_SECONDS = 30  # kept out of the benchmarks' budget, because a started case is finished
USUAL = ("tests", "kernels", "runtime")
PARTS = (*USUAL, "exports")
TESTS_FAILED, BENCHMARKS_FAILED, RUNTIME_FAILED, EXPORTS_FAILED = 1, 2, 4, 8
FAILURES = {"tests": TESTS_FAILED, "kernels": BENCHMARKS_FAILED, "runtime": RUNTIME_FAILED, "exports": EXPORTS_FAILED}


def main(argv: Sequence[str] = ()) -> int:
    """Run the usual parts, or those named; see the module."""
    start = time.monotonic()
    parts = [part for part in PARTS if part in argv] or list(USUAL)
    why = unusable() if set(argv) <= set(PARTS) else f"there are the parts {', '.join(PARTS)}, not {' '.join(argv)}"
    if why:
        print(f"error: {why}", file=sys.stderr)
        return sum(FAILURES[part] for part in parts)
    logs = Path(os.environ["OUT"]) if os.environ.get("OUT") else CHECKOUT / "build" / "gpu"
    logs.mkdir(parents=True, exist_ok=True)
    if brought := gpu_wheels.bring():
        print(f"from {gpu_wheels.WHEELS.relative_to(CHECKOUT)}: {', '.join(brought)}", flush=True)

    # during the tests, which don't need it, and finished before anything is timed
    build = threading.Thread(target=build_extension, args=(logs,))
    build.start()
    codes: dict[str, int | None] = {}
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if "tests" in parts and missing:
        print(f"tests: NOT RUN, {' and '.join(missing)} missing in {sys.executable}; {REMEDY}", flush=True)
        codes["tests"] = None
    elif "tests" in parts:
        codes["tests"] = run("tests", test_command(), TEST_SECONDS, logs)
    build.join()

    began = time.time()
    if "kernels" in parts:
        left = 60 * MINUTES - (time.monotonic() - start)
        left = left / 2 if "runtime" in parts else left
        codes["kernels"] = run("kernels", benchmark_command("kernels", left), left - 5, logs)
    for part in ("runtime", "exports"):
        if part not in parts:
            continue
        if find_spec("diffusers") is None:
            print(f"{part}: NOT RUN, diffusers missing in {sys.executable}; {REMEDY}", flush=True)
            codes[part] = None
            continue
        left = 60 * MINUTES - (time.monotonic() - start)
        left = left / 2 if part == "runtime" and "exports" in parts else left
        codes[part] = run(part, benchmark_command(part, left), left - 5, logs)
    written = [path for path in sorted(RESULTS.glob("*-*.json")) if path.stat().st_mtime >= began - 1]
    for path in written:
        shutil.copy(path, logs)

    said = "; ".join(f"{part}: {verdict(code)}" for part, code in codes.items())
    print(
        f"{said}; {time.monotonic() - start:.0f} s; "
        f"results: {', '.join(path.name for path in written) or 'none'}, logs in {logs}"
    )
    return sum(FAILURES[part] for part, code in codes.items() if code != 0)


def unusable() -> str:
    """Return why this Python can't run the checks; "" if it can."""
    if find_spec("torch") is None:
        return f"{sys.executable} has no torch; name another: make gpu GPU_PYTHON=..."
    if find_spec("triton") is None:
        return f"{sys.executable} has no triton; name another: make gpu GPU_PYTHON=..."
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device here; `make bench` measures the CPU kernels"
    return ""


def build_extension(logs: Path) -> None:
    """Build the C++ extension in place, or print one line on why not."""
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        print("extension: not built, there is no C++ compiler; GPU kernels don't need it", flush=True)
        return
    code = run("extension", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], BUILD_SECONDS, logs)
    print(f"extension: {verdict(code)}", flush=True)


def test_command() -> list[str]:
    """Return the command for the tests marked `gpu`; parallel if pytest-xdist exists, as compiling takes most time."""
    processes = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    folders = ["tests/kernels", *(["tests/runtime"] if find_spec("diffusers") else [])]
    return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *processes, *folders]


def benchmark_command(name: str, seconds_left: float) -> list[str]:
    """Return the command of a benchmark with the remaining budget."""
    most = BENCHMARK_MINUTES if name == "kernels" else MINUTES
    minutes = max(0.5, min(most, (seconds_left - SPARE_SECONDS) / 60))
    return [sys.executable, "-m", "benchmarks", name, "--device", "cuda", "--minutes", f"{minutes:.1f}"]


def run(name: str, command: Sequence[str], seconds: float, logs: Path) -> int | None:
    """Run a step, showing its output and saving it as <name>.log. Returns its exit code, or None on a timeout."""
    print(f"--- {name}: {' '.join(command)}", flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    over = threading.Event()

    def stop():
        over.set()
        # the whole process group: a build or pytest has child processes
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    watch = threading.Timer(max(seconds, 1.0), stop)
    watch.start()
    try:
        with (logs / f"{name}.log").open("w", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                print(line, end="", flush=True)
        code = process.wait()
    finally:
        watch.cancel()
    if over.is_set():
        print(f"{name}: stopped, {seconds:.0f} seconds are over", flush=True)
        return None
    return code


def verdict(code: int | None) -> str:
    """Describe a step's exit code."""
    return "passed" if code == 0 else "not run to the end" if code is None else f"FAILED with exit code {code}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
