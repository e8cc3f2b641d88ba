"""All that a GPU machine is asked for in one command of at most nine minutes: `make gpu`.

Builds the C++ extension in place where there is a compiler, runs the tests marked `gpu`, then the kernel benchmarks.
Nothing is installed and no network is used. A failing test does not keep the benchmarks from running. Results also go
to the folder that the environment variable OUT names. Exit code: 1 if tests failed or could not run, plus 2 if the
benchmarks did not finish.
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

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "benchmarks" / "results"

MINUTES = 9.0  # all of it
BUILD_SECONDS, TEST_SECONDS = 150, 180
BENCHMARK_MINUTES = 5.0
SPARE_SECONDS = 30  # a case that has begun is finished: kept free of the benchmarks' budget
TESTS_FAILED, BENCHMARKS_FAILED = 1, 2


def main() -> int:
    """Run every step; see the module."""
    start = time.monotonic()
    why = unusable()
    if why:
        print(f"error: {why}", file=sys.stderr)
        return TESTS_FAILED + BENCHMARKS_FAILED
    logs = Path(os.environ["OUT"]) if os.environ.get("OUT") else CHECKOUT / "build" / "gpu"
    logs.mkdir(parents=True, exist_ok=True)

    # beside the tests, which don't need it, and over before anything is timed
    build = threading.Thread(target=build_extension, args=(logs,))
    build.start()
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        print(f"tests: NOT RUN, {' and '.join(missing)} missing in {sys.executable}; bring wheels", flush=True)
        tests = None
    else:
        tests = run("tests", test_command(), TEST_SECONDS, logs)
    build.join()

    left = 60 * MINUTES - (time.monotonic() - start)
    began = time.time()
    benchmarks = run("benchmarks", benchmark_command(left), left - 5, logs)
    written = [path for path in sorted(RESULTS.glob("kernels-*.json")) if path.stat().st_mtime >= began - 1]
    for path in written:
        shutil.copy(path, logs)

    code = (TESTS_FAILED if tests != 0 else 0) + (BENCHMARKS_FAILED if benchmarks != 0 else 0)
    print(f"tests: {verdict(tests)}; benchmarks: {verdict(benchmarks)}; {time.monotonic() - start:.0f} s; "
          f"results: {', '.join(path.name for path in written) or 'none'}, logs in {logs}")  # fmt: skip
    return code


def unusable() -> str:
    """Why this Python can't do it; the empty string if it can."""
    if find_spec("torch") is None:
        return f"{sys.executable} has no torch; name another: make gpu GPU_PYTHON=..."
    if find_spec("triton") is None:
        return f"{sys.executable} has no triton; name another: make gpu GPU_PYTHON=..."
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device here; `make bench` measures the CPU kernels"
    return ""


def build_extension(logs: Path) -> None:
    """The C++ extension in place, or one line on why not."""
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        print("extension: not built, there is no C++ compiler; GPU kernels don't need it", flush=True)
        return
    code = run("extension", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], BUILD_SECONDS, logs)
    print(f"extension: {verdict(code)}", flush=True)


def test_command() -> list[str]:
    """The tests marked `gpu`; in several processes where pytest-xdist is there, as most of their time is compiling."""
    processes = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *processes, "tests/kernels"]


def benchmark_command(seconds_left: float) -> list[str]:
    """The kernel benchmarks with the budget that is left."""
    minutes = max(0.5, min(BENCHMARK_MINUTES, (seconds_left - SPARE_SECONDS) / 60))
    return [sys.executable, "-m", "benchmarks", "kernels", "--device", "cuda", "--minutes", f"{minutes:.1f}"]


def run(name: str, command: Sequence[str], seconds: float, logs: Path) -> int | None:
    """Run a step, its output shown and kept as <name>.log. Returns its exit code, or None if its time ran out."""
    print(f"--- {name}: {' '.join(command)}", flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    over = threading.Event()

    def stop():
        over.set()
        # its whole process group: a build or pytest has children of its own
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
    """A step's exit code in words."""
    return "passed" if code == 0 else "not run to the end" if code is None else f"FAILED with exit code {code}"


if __name__ == "__main__":
    sys.exit(main())
